//! The guest's serial console on the host's standard input.

use std::io::{IsTerminal, Read};
use std::sync::Arc;

use ftvmm_devices::Input;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::input::LiveQueue;
use crate::run_loop::StopCause;

/// Ctrl-A, then x ends the run, b sends a break, as in QEMU.
const ESCAPE: u8 = 0x01;
const ESCAPE_QUIT: u8 = b'x';
const ESCAPE_BREAK: u8 = b'b';

/// Standard input switched to raw mode if it is a terminal; switched back on drop.
pub struct RawTerminal {
    before: Option<Termios>,
}

impl RawTerminal {
    /// Switches standard input to raw mode; leaves anything but a terminal alone.
    pub fn enter() -> Self {
        let stdin = std::io::stdin();
        let before = stdin.is_terminal().then(|| tcgetattr(&stdin).ok()).flatten();
        if let Some(before) = &before {
            let mut raw = before.clone();
            cfmakeraw(&mut raw);
            let _ = tcsetattr(&stdin, SetArg::TCSANOW, &raw);
        }
        Self { before }
    }

    fn is_raw(&self) -> bool {
        self.before.is_some()
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, before);
        }
    }
}

/// Starts the thread that hands standard input to the guest until it ends. It lives as long as the process:
/// a blocking read of standard input cannot be taken back.
///
/// # Errors
/// When the host has no thread left.
pub fn read_console(queue: Arc<LiveQueue>, terminal: &RawTerminal) -> std::io::Result<()> {
    let escapes = terminal.is_raw();
    std::thread::Builder::new().name("console".into()).spawn(move || {
        let mut buffer = [0; 4096];
        let mut escaped = false;
        let mut stdin = std::io::stdin();
        while let Ok(count @ 1..) = stdin.read(&mut buffer) {
            let mut typed = Vec::with_capacity(count);
            for &byte in &buffer[..count] {
                match (escapes && escaped, byte) {
                    (true, ESCAPE_QUIT) => queue.stop(StopCause::Requested),
                    (true, ESCAPE_BREAK) => {
                        queue.push_console(&std::mem::take(&mut typed));
                        queue.push_signal(Input::ConsoleBreak);
                        escaped = false;
                    }
                    (false, ESCAPE) if escapes => escaped = true,
                    _ => {
                        typed.push(byte);
                        escaped = false;
                    }
                }
            }
            queue.push_console(&typed);
        }
    })?;
    Ok(())
}
