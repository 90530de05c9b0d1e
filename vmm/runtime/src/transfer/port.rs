//! The vCPU thread's side of a transfer: it serves the sender's requests between inputs.

use std::sync::Arc;

use ftvmm_machine::machine_state::MachineState;
use ftvmm_machine::situation::RunSituation;
use ftvmm_replication::{Check, HostNs, MemoryCheckMode, Ordinal, SnapshotMark};

use super::blocks::read_blocks;
use super::rendezvous::{Stop, TransferRequest};
use super::{FinalState, Transfer};
use crate::input_error::InputError;
use crate::step::Step;

/// Where a guest can be stopped for its state, and which steps come first.
#[derive(Default)]
struct Halt {
    /// The last point at which the guest was stopped between two exits.
    captured: Option<Ordinal>,
    /// The exit at which the copy of memory was renewed, and the log says so; nothing has been
    /// applied since.
    renewed: Option<Ordinal>,
}

impl Halt {
    /// The next step towards saving the state; `None` at an exit that must be completed first.
    fn step(&self, situation: &RunSituation) -> Option<Step> {
        match situation.at {
            None => Some(Step::Capture),
            Some(at) if !situation.halted && self.captured != Some(at) => None,
            Some(at) if self.renewed == Some(at) => Some(Step::SaveState),
            // Saving renews the copy of memory. A replayer must renew its copy at the same point,
            // or the next slice does not fit.
            Some(_) => Some(Step::Measure { memory: MemoryCheckMode::Renew }),
        }
    }

    fn captured(&mut self, at: Ordinal) {
        (self.captured, self.renewed) = (Some(at), Some(at));
    }

    fn measured(&mut self, at: Ordinal, check: &Check) {
        if check.memory.as_ref().is_some_and(|memory| memory.renews_copy) {
            self.renewed = Some(at);
        }
    }

    fn given(&mut self, step: &Step) {
        if let Step::Apply(_) = step {
            self.renewed = None;
        }
    }
}

/// See the module documentation.
pub struct TransferPort {
    transfer: Arc<Transfer>,
    halt: Halt,
    /// When the dirty sync was ordered that has not been answered.
    sync_since: Option<HostNs>,
    stopped_since: Option<HostNs>,
}

impl TransferPort {
    /// For the guest whose state `transfer` sends.
    pub fn new(transfer: Arc<Transfer>) -> Self {
        Self { transfer, halt: Halt::default(), sync_since: None, stopped_since: None }
    }

    /// The step that the sender has requested here, if any.
    pub fn wanted(&mut self, situation: &RunSituation) -> Option<Step> {
        let transfer = &self.transfer;
        if transfer.rendezvous.wants(TransferRequest::DirtySync) && situation.at.is_some() {
            self.sync_since = Some(transfer.clock.host_now());
            return Some(Step::Measure { memory: MemoryCheckMode::Renew });
        }
        if !transfer.rendezvous.wants(TransferRequest::StopAndCopy) {
            return None;
        }
        let step = self.halt.step(situation)?;
        self.stopped_since.get_or_insert_with(|| transfer.clock.host_now());
        Some(step)
    }

    /// The guest is given `step`, which was not wanted here.
    pub fn given(&mut self, step: &Step) {
        self.halt.given(step);
    }

    /// The execution was measured at exit `at`.
    pub fn measured(&mut self, at: Ordinal, check: &Check) {
        if let Some(since) = self.sync_since.take() {
            let transfer = &self.transfer;
            transfer.rendezvous.synced(transfer.clock.host_now().since_ns(since));
        }
        self.halt.measured(at, check);
    }

    /// Exit `at` is a slice.
    pub fn captured(&mut self, at: Ordinal) {
        self.halt.captured(at);
    }

    /// Hands over the rest of the state with the machine. Returns the mark that is logged at this
    /// point, if any.
    ///
    /// # Errors
    /// When the disk cannot be read.
    pub fn saved(&mut self, mut machine: MachineState) -> Result<Option<SnapshotMark>, InputError> {
        let transfer = &self.transfer;
        let since = self.stopped_since.take();
        let Some(destination) = transfer.rendezvous.take_destination() else { return Ok(None) };
        let at = machine.at;
        let pages = transfer.copy.take_unsent(usize::MAX);
        transfer.copy.end_transfer();
        let (mut blocks, mut disk_through) = (Vec::new(), 0);
        if let Some(disk) = &transfer.disk {
            // A slow disk must not count as a blocked vCPU thread.
            let resting = transfer.queue.pulse().idle();
            machine.disk_answers = disk.drain();
            drop(resting);
            disk_through = disk.last_id();
            blocks = read_blocks(disk, &disk.take_changed())
                .map_err(|cause| InputError::Disk { cause })?;
            disk.note_changes(false);
        }
        let mark = destination.finish(FinalState { pages, blocks, machine, disk_through });
        let now = transfer.clock.host_now();
        let stopped_ns = now.since_ns(since.unwrap_or(now));
        transfer.rendezvous.stopped(Stop { at, stopped_ns });
        Ok(mark)
    }
}

#[cfg(test)]
mod tests {
    use ftvmm_devices::Input;
    use ftvmm_replication::MemoryCheck;

    use super::*;

    const AT: Ordinal = Ordinal(7);

    fn at_exit(halted: bool) -> RunSituation {
        RunSituation { at: Some(AT), halted, ..RunSituation::default() }
    }

    fn check(renews_copy: bool) -> Check {
        let memory = Some(MemoryCheck { digest: 1, changed: vec![], renews_copy });
        Check { memory, ..Check::default() }
    }

    fn renews(step: Option<Step>) -> bool {
        matches!(step, Some(Step::Measure { memory: MemoryCheckMode::Renew }))
    }

    #[test]
    fn the_log_knows_of_the_renewed_copy_before_a_halted_guest_gives_its_state() {
        let mut halt = Halt::default();
        assert!(renews(halt.step(&at_exit(true))));
        halt.measured(AT, &check(false));
        assert!(renews(halt.step(&at_exit(true))));
        halt.measured(AT, &check(true));
        assert!(matches!(halt.step(&at_exit(true)), Some(Step::SaveState)));
        // An input writes to memory.
        halt.given(&Step::Apply(Input::Time { now_ns: 1 }));
        assert!(renews(halt.step(&at_exit(true))));
    }

    #[test]
    fn a_slice_is_in_the_log_with_all_it_changed() {
        let mut halt = Halt::default();
        assert!(halt.step(&at_exit(false)).is_none());
        assert!(matches!(halt.step(&RunSituation::default()), Some(Step::Capture)));
        halt.captured(AT);
        assert!(matches!(halt.step(&at_exit(false)), Some(Step::SaveState)));
        halt.given(&Step::Apply(Input::Time { now_ns: 1 }));
        assert!(renews(halt.step(&at_exit(false))));
        let next = RunSituation { at: Some(AT.next()), ..RunSituation::default() };
        assert!(halt.step(&next).is_none());
    }
}
