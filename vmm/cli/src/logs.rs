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
