//! Outputs of a guest that speaks for itself: frames to the tap, console bytes to standard output.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ftvmm_devices::Output;
use ftvmm_replication::Ordinal;

use super::{Console, Tap};
use crate::disk::Disk;
use crate::input::InputError;
use crate::run_loop::OutputSink;

/// Writes to the host at once.
pub struct HostOutputs {
    tap: Option<Tap>,
    disk: Option<Arc<Disk>>,
    console: Arc<Console>,
    frames: Arc<AtomicU64>,
}

impl HostOutputs {
    /// Outputs to `console`, and to `tap` and `disk`, if the guest has them.
    pub fn new(tap: Option<Tap>, disk: Option<Arc<Disk>>, console: Arc<Console>) -> Self {
        Self { tap, disk, console, frames: Arc::default() }
    }

    /// Frames the guest sent so far, for whoever counts along.
    pub fn frames(&self) -> Arc<AtomicU64> {
        self.frames.clone()
    }
}

impl OutputSink for HostOutputs {
    fn emit(&mut self, _: Ordinal, _: u64, output: Output) -> Result<(), InputError> {
        match output {
            Output::Frame(frame) => {
                self.frames.fetch_add(1, Ordering::Relaxed);
                match &self.tap {
                    Some(tap) => {
                        tap.write_frame(&frame).map_err(|source| InputError::Tap { source })
                    }
                    None => Ok(()),
                }
            }
            Output::Console(bytes) => {
                self.console.print(&bytes);
                Ok(())
            }
            Output::Disk(request) => {
                if let Some(disk) = &self.disk {
                    disk.submit(request);
                }
                Ok(())
            }
        }
    }
}

/// Prints what a replayed guest printed, as fast as it is read: nobody waits for a replay. A console nobody reads any more
/// does not end it.
pub fn print_console(bytes: &[u8]) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(bytes).and_then(|()| stdout.flush());
}
