//! `ftvmm log stat|dump|diff`.

use std::path::Path;

use ftvmm_replication::log_stat::{first_difference, stat};

use super::CommandError;
use super::args::LogCommand;
use super::replay::open_log;

/// Does what the command says, on standard output.
///
/// # Errors
/// When a file is no recording or is damaged before its tail; `diff` of two different recordings answers with
/// a divergence.
pub fn logs(command: &LogCommand) -> Result<(), CommandError> {
    match command {
        LogCommand::Stat { files } => files.iter().try_for_each(|file| print_stat(file)),
        LogCommand::Dump { file } => dump(file),
        LogCommand::Diff { left, right } => diff(left, right),
    }
}

fn damaged(path: &Path) -> impl Fn(ftvmm_replication::LogError) -> CommandError {
    move |e| CommandError::Recording { path: path.into(), why: e.to_string() }
}

fn print_stat(path: &Path) -> Result<(), CommandError> {
    let stat = stat(&mut open_log(path)?).map_err(damaged(path))?;
    println!("{}:\n{stat}", path.display());
    Ok(())
}

fn dump(path: &Path) -> Result<(), CommandError> {
    let mut reader = open_log(path)?;
    println!("{:#?}", reader.header());
    while let Some(group) = reader.next_group().map_err(damaged(path))? {
        for record in &group.records {
            println!("{record}");
        }
    }
    Ok(())
}

fn diff(left: &Path, right: &Path) -> Result<(), CommandError> {
    let found =
        first_difference(&mut open_log(left)?, &mut open_log(right)?).map_err(damaged(left))?;
    match found {
        None => {
            println!("the two recordings say the same");
            Ok(())
        }
        Some(difference) => Err(CommandError::Divergence(difference.to_string())),
    }
}
