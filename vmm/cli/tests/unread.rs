//! What a command answers when nobody reads it any more.

use std::io::pipe;
use std::process::{Command, Stdio};

/// As a shell sees a process that SIGPIPE killed.
const KILLED_BY_SIGPIPE: i32 = 141;

#[test]
fn an_answer_nobody_reads_ends_the_command_quietly() {
    for arguments in [&["--help"][..], &["doctor"], &["doctor", "--json"]] {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        #[expect(clippy::disallowed_methods, reason = "our own program")]
        let mut command = Command::new(env!("CARGO_BIN_EXE_ftvmm"));
        let command = command.args(arguments).stdin(Stdio::null()).stdout(writer);
        let said = command.stderr(Stdio::piped()).output().unwrap();
        assert_eq!(said.status.code(), Some(KILLED_BY_SIGPIPE), "{arguments:?}: {said:?}");
        assert!(said.stderr.is_empty(), "{arguments:?}: {}", String::from_utf8_lossy(&said.stderr));
    }
}
