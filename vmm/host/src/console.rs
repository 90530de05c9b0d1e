//! The guest's serial console: what it prints goes to standard output, what is typed on standard
//! input to the guest.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};

use super::spool::{Spool, Taken};
use crate::contain::Thread;
use crate::sync::{Mutex, lock};

/// Ctrl-A, then x ends the run, b sends a break, as in QEMU.
const ESCAPE: u8 = 0x01;
const ESCAPE_QUIT: u8 = b'x';
const ESCAPE_BREAK: u8 = b'b';
/// What a guest may print ahead of its reader: many boots of a talkative kernel.
const PRINTED_BYTES_MAX: usize = 1 << 20;
/// How long the end of a run waits for a reader that has stopped.
const TIMEOUT: Duration = Duration::from_secs(2);
/// How often a program in the background looks whether it may read its terminal.
const BACKGROUND_LOOK: Duration = Duration::from_secs(1);

/// The output of the guest's serial port. The guest never waits for its reader: a stopped terminal
/// would stop the guest, while the host went on sending heartbeats.
pub struct Console {
    spool: Spool,
    warned: AtomicBool,
}

impl Console {
    /// Standard output.
    ///
    /// # Errors
    /// When the host has no descriptor or thread left.
    pub fn start() -> io::Result<Arc<Self>> {
        let out = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        let spool = Spool::start(Thread::ConsoleOut, out, PRINTED_BYTES_MAX)?;
        Ok(Arc::new(Self { spool, warned: AtomicBool::new(false) }))
    }

    /// Prints what the guest printed.
    pub fn print(&self, bytes: &[u8]) {
        let why = match self.spool.push(bytes) {
            Taken::Whole => return,
            Taken::Dropped { .. } => "nobody reads it".to_owned(),
            Taken::Closed { why } => why,
        };
        if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(why, "what the guest prints is dropped from here on; the guest goes on");
        }
    }

    /// Bytes of the guest's output that were dropped.
    pub fn dropped_bytes(&self) -> u64 {
        self.spool.dropped_bytes()
    }

    /// The run is over: waits a short time for the reader.
    pub fn finish(&self) {
        self.spool.finish(TIMEOUT);
    }
}

/// What standard input was before it was switched to raw mode. There is one for the process, which
/// may have to end without coming back to who switched it.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Switches a terminal that [`RawTerminal`] has switched back to what it was.
pub fn restore_terminal() {
    if let Some(before) = lock(&BEFORE).take() {
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &before);
    }
}

/// Standard input switched to raw mode if it is a terminal; switched back on drop.
pub struct RawTerminal {
    is_raw: bool,
}

impl RawTerminal {
    /// Switches standard input to raw mode; leaves alone what is no terminal, or another program's
    /// at the moment.
    pub fn enter() -> Self {
        let stdin = io::stdin();
        let before = (stdin.is_terminal() && !in_background()).then(|| tcgetattr(&stdin).ok());
        let Some(before) = before.flatten() else { return Self { is_raw: false } };
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        *lock(&BEFORE) = Some(before);
        let _ = tcsetattr(&stdin, SetArg::TCSANOW, &raw);
        Self { is_raw: true }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// Standard input is a terminal that belongs to another program now.
fn in_background() -> bool {
    tcgetpgrp(io::stdin()).is_ok_and(|foreground| foreground != getpgrp())
}

/// Input at the terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Typed<'a> {
    /// Types these bytes for the guest.
    Bytes(&'a [u8]),
    /// Sends the guest a break.
    Break,
    /// Ends the run.
    Quit,
}

/// Starts the thread that hands what is typed on standard input to `on_typed` until it ends. It
/// lives as long as the process: a blocking read of standard input cannot be taken back.
///
/// # Errors
/// When the host has no thread left.
pub fn read_console(
    terminal: &RawTerminal,
    on_typed: impl Fn(Typed<'_>) + Send + 'static,
) -> io::Result<()> {
    let escapes = terminal.is_raw;
    Thread::Console.start(move || {
        let mut buffer = [0; 4096];
        let mut escaped = false;
        let mut stdin = io::stdin();
        loop {
            let count = match stdin.read(&mut buffer) {
                Ok(count @ 1..) => count,
                // SIGTTIN is blocked, so that a program in the background reads this error.
                Err(e) if e.raw_os_error() == Some(libc::EIO) && in_background() => {
                    std::thread::sleep(BACKGROUND_LOOK);
                    continue;
                }
                _ => return,
            };
            let mut typed = Vec::with_capacity(count);
            for &byte in &buffer[..count] {
                match (escapes && escaped, byte) {
                    (true, ESCAPE_QUIT) => on_typed(Typed::Quit),
                    (true, ESCAPE_BREAK) => {
                        on_typed(Typed::Bytes(&std::mem::take(&mut typed)));
                        on_typed(Typed::Break);
                        escaped = false;
                    }
                    (false, ESCAPE) if escapes => escaped = true,
                    _ => {
                        typed.push(byte);
                        escaped = false;
                    }
                }
            }
            on_typed(Typed::Bytes(&typed));
        }
    })?;
    Ok(())
}
