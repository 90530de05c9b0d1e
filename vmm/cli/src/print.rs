//! Prints a command's output. When the reader has closed the pipe, as `head` does, the process ends
//! quietly, like one that SIGPIPE kills.

use std::fmt::Display;
use std::io::{ErrorKind, Write};

use ftvmm_host::finish_stderr;

use super::{CommandError, host};

/// What a shell says of a process that SIGPIPE killed (128 and the signal's number).
const KILLED_BY_SIGPIPE: i32 = 141;

/// Prints `text`.
///
/// # Errors
/// When standard output takes no more: a full disk.
pub fn print(text: impl Display) -> Result<(), CommandError> {
    let mut stdout = std::io::stdout().lock();
    match write!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => {
            finish_stderr();
            std::process::exit(KILLED_BY_SIGPIPE)
        }
        printed => printed.map_err(host("write to standard output")),
    }
}

/// Prints `text` and ends the line.
///
/// # Errors
/// As [`print()`].
pub fn print_line(text: impl Display) -> Result<(), CommandError> {
    print(format_args!("{text}\n"))
}
