//! Outputs of a guest that speaks for itself: frames to the tap, console bytes to standard output.

use std::io::Write;

use ftvmm_devices::Output;
use ftvmm_replication::Ordinal;

use super::Tap;
use crate::input::InputError;
use crate::run_loop::OutputSink;

/// Writes to the host at once.
pub struct HostOutputs {
    tap: Option<Tap>,
    frames: u64,
}

impl HostOutputs {
    /// Outputs to `tap`, if the guest has one.
    pub fn new(tap: Option<Tap>) -> Self {
        Self { tap, frames: 0 }
    }

    /// Frames the guest sent so far.
    pub fn frames(&self) -> u64 {
        self.frames
    }
}

impl OutputSink for HostOutputs {
    fn emit(&mut self, _: Ordinal, _: u64, output: Output) -> Result<(), InputError> {
        match output {
            Output::Frame(frame) => {
                self.frames += 1;
                match &self.tap {
                    Some(tap) => {
                        tap.write_frame(&frame).map_err(|source| InputError::Tap { source })
                    }
                    None => Ok(()),
                }
            }
            Output::Console(bytes) => {
                print_console(&bytes);
                Ok(())
            }
        }
    }
}

/// Prints what the guest printed. A console nobody reads any more does not stop a guest.
pub fn print_console(bytes: &[u8]) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(bytes).and_then(|()| stdout.flush());
}
