//! `unread PROGRAM ARGUMENTS…`: becomes PROGRAM with a standard output and a standard error that
//! nobody reads: pipes that are full from the start and are never closed, like a terminal stopped
//! by Ctrl-S.

use std::error::Error;
use std::io::{ErrorKind, PipeWriter, Write, pipe};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};

/// A pipe without room; its other end stays open in this process and in what it becomes.
fn full_pipe() -> Result<PipeWriter, Box<dyn Error>> {
    let (reader, mut writer) = pipe()?;
    fcntl(&reader, FcntlArg::F_SETFD(FdFlag::empty()))?;
    std::mem::forget(reader);
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    for piece in [&[b'.'; 4096][..], b"."] {
        loop {
            match writer.write(piece) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(writer)
}

#[allow(clippy::disallowed_methods, reason = "a host has the programs that the lab gave it")]
fn main() -> Result<(), Box<dyn Error>> {
    let mut argv = std::env::args_os().skip(1);
    let program = argv.next().ok_or("usage: unread PROGRAM ARGUMENTS...")?;
    let (stdout, stderr) = (full_pipe()?, full_pipe()?);
    Err(Command::new(program).args(argv).stdout(stdout).stderr(stderr).exec().into())
}
