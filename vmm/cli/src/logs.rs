//! `ftvmm log stat|dump`; `diff` is next door.

use std::path::Path;

use ftvmm_replication::log_stat::stat;

use super::CommandError;
use super::args::LogCommand;
use super::diff::diff;
use super::print::print_line;
use super::recording::{damaged, open_log};

/// Does what the command says, on standard output.
///
/// # Errors
/// When a file is no recording or is damaged before its tail; `diff` of two different recordings
/// answers with a divergence.
pub fn logs(command: &LogCommand) -> Result<(), CommandError> {
    match command {
        LogCommand::Stat { files } => files.iter().try_for_each(|file| print_stat(file)),
        LogCommand::Dump { file } => dump(file),
        LogCommand::Diff { left, right, vmlinux } => diff(left, right, vmlinux.as_deref()),
    }
}

fn print_stat(path: &Path) -> Result<(), CommandError> {
    let stat = stat(&mut open_log(path)?).map_err(damaged(path))?;
    print_line(format_args!("{}:\n{stat}", path.display()))
}

fn dump(path: &Path) -> Result<(), CommandError> {
    let mut reader = open_log(path)?;
    print_line(format_args!("{:#?}", reader.header()))?;
    while let Some(group) = reader.next_group().map_err(damaged(path))? {
        for record in &group.records {
            print_line(record)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::recording::tests::recorded;
    use super::*;

    fn run(command: &LogCommand) -> Result<(), String> {
        logs(command).map_err(|error| error.to_string())
    }

    #[test]
    fn recordings_of_the_same_inputs_are_the_same_and_others_part_where_they_part() {
        let folder = tempfile::tempdir().unwrap();
        let of = |name, times_ns| recorded(folder.path(), name, times_ns);
        let (left, same) = (of("left", &[10, 20, 30]), of("same", &[10, 20, 30]));
        let diff = |right| run(&LogCommand::Diff { left: left.clone(), right, vmlinux: None });
        diff(same).unwrap();
        let other = diff(of("other", &[10, 21, 30])).unwrap_err();
        assert!(other.starts_with("divergence: ") && other.contains("exit 2"), "{other}");
        let shorter = diff(of("shorter", &[10, 20])).unwrap_err();
        assert!(shorter.contains("exit 3"), "{shorter}");
        let none = diff(folder.path().join("none")).unwrap_err();
        assert!(none.contains("/none'"), "{none}");
    }

    #[test]
    fn a_recording_that_is_damaged_before_its_tail_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        // Enough for several groups: the damage is in the first one, whose records are not printed.
        let times_ns: Vec<u64> = (0..30_000).map(|exit| exit * exit).collect();
        let file = recorded(folder.path(), "log", &times_ns);
        let files = vec![file.clone()];
        run(&LogCommand::Stat { files: files.clone() }).unwrap();
        let mut bytes = std::fs::read(&file).unwrap();
        let early = bytes.len() / 4;
        bytes[early] ^= 1;
        std::fs::write(&file, bytes).unwrap();
        for command in [LogCommand::Stat { files }, LogCommand::Dump { file: file.clone() }] {
            let error = run(&command).unwrap_err();
            assert!(error.starts_with(&format!("recording '{}'", file.display())), "{error}");
        }
    }
}
