//! Outputs of a guest without a pair, frames to the tap and console bytes to standard
//! output; and of one that is replayed.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ftvmm_devices::Output;
use ftvmm_host::disk::Disk;
use ftvmm_host::profile::{self, Phase};
use ftvmm_host::{Console, Tap};
use ftvmm_machine::net_watch::NetWatch;
use ftvmm_replication::{Ordinal, OutputDigest};

use crate::input_error::InputError;
use crate::step::OutputSink;

/// Writes to the host at once.
pub struct HostOutputs {
    tap: Option<Tap>,
    disk: Option<Arc<Disk>>,
    console: Arc<Console>,
    frames: Arc<AtomicU64>,
    network: Arc<NetWatch>,
}

impl HostOutputs {
    /// Outputs to `console`, and to `tap` and `disk`, if the guest has them; what the tap drops is
    /// told to `network`.
    pub fn new(
        tap: Option<Tap>,
        disk: Option<Arc<Disk>>,
        console: Arc<Console>,
        network: Arc<NetWatch>,
    ) -> Self {
        Self { tap, disk, console, frames: Arc::default(), network }
    }

    /// The counter of frames that the guest sent.
    pub fn frames(&self) -> Arc<AtomicU64> {
        self.frames.clone()
    }
}

impl OutputSink for HostOutputs {
    fn emit(
        &mut self,
        _: Ordinal,
        _: Option<OutputDigest>,
        output: Output,
    ) -> Result<(), InputError> {
        match output {
            Output::Frame(frame) => {
                self.frames.fetch_add(1, Ordering::Relaxed);
                let Some(tap) = &self.tap else { return Ok(()) };
                let _tap = profile::enter(Phase::Tap);
                if !tap.write_frame(&frame).map_err(|cause| InputError::Tap { cause })? {
                    self.network.tap_dropped();
                }
                Ok(())
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

/// Outputs of a guest that is replayed: they are counted, and what it prints is printed again.
#[derive(Default)]
pub struct ReplayOutputs {
    frames: u64,
}

impl ReplayOutputs {
    /// Frames the guest sent so far.
    pub fn frames(&self) -> u64 {
        self.frames
    }
}

impl OutputSink for ReplayOutputs {
    fn emit(
        &mut self,
        _: Ordinal,
        _: Option<OutputDigest>,
        output: Output,
    ) -> Result<(), InputError> {
        match output {
            Output::Frame(_) => self.frames += 1,
            Output::Console(bytes) => print_console(&bytes),
            // The log has the answers.
            Output::Disk(_) => {}
        }
        Ok(())
    }
}

/// Prints and waits for the reader: a replay has no client that waits. A reader that has gone does
/// not end the replay.
fn print_console(bytes: &[u8]) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(bytes).and_then(|()| stdout.flush());
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    fn frame() -> Output {
        Output::Frame(vec![7; 60])
    }

    #[test]
    fn frames_reach_the_tap_and_are_counted_when_it_does_not_take_them() {
        let (network, socket) = UnixDatagram::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        let tap = Tap::over("lo", File::from(OwnedFd::from(socket)));
        let (console, watch) = (Console::start().unwrap(), Arc::<NetWatch>::default());
        let mut outputs = HostOutputs::new(Some(tap), None, console, watch.clone());
        let mut sent = 0;
        while watch.report().tx_dropped_by_tap == 0 {
            outputs.emit(Ordinal(1), None, frame()).unwrap();
            sent += 1;
        }
        assert_eq!(outputs.frames().load(Ordering::Relaxed), sent);
        let mut buffer = [0; 100];
        network.set_nonblocking(true).unwrap();
        for _ in 1..sent {
            assert_eq!(network.recv(&mut buffer).unwrap(), 60);
        }
        assert!(network.recv(&mut buffer).is_err(), "one was dropped");
    }

    #[test]
    fn a_replay_counts_frames_and_sends_none() {
        let mut outputs = ReplayOutputs::default();
        outputs.emit(Ordinal(1), None, frame()).unwrap();
        outputs.emit(Ordinal(2), None, frame()).unwrap();
        assert_eq!(outputs.frames(), 2);
    }
}
