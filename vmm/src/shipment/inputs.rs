//! The vCPU's side of a shipment: any source of inputs, whose guest can be stopped for its state.

use std::sync::Arc;

use ftvmm_replication::{Check, MemoryLook, Ordinal, Slice, StatePart};

use super::blocks::read_blocks;
use super::rendezvous::{Stop, Wanted};
use super::{Rest, Shipment};
use crate::input::InputError;
use crate::machine_state::MachineState;
use crate::run_loop::{InputSource, RunMode, Situation, Step};

/// Where a guest can be stopped for its state, and what comes first there.
#[derive(Default)]
struct Halt {
    /// The last point at which the guest was stopped between two exits.
    captured: Option<Ordinal>,
    /// The exit at which the copy of memory was renewed, and the log says so; nothing has been applied since.
    renewed: Option<Ordinal>,
}

impl Halt {
    /// What brings the guest closer to giving its state; `None` at an exit that must be completed first.
    fn step(&self, situation: &Situation) -> Option<Step> {
        match situation.at {
            None => Some(Step::Capture),
            Some(at) if !situation.halted && self.captured != Some(at) => None,
            Some(at) if self.renewed == Some(at) => Some(Step::TakeState),
            // The state is taken with the copy up to date. Whoever follows the log must know of that, or the next
            // slice does not fit his copy.
            Some(_) => Some(Step::Measure { memory: MemoryLook::Renew }),
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
pub struct ShippedInputs<S> {
    source: S,
    shipment: Option<Arc<Shipment>>,
    halt: Halt,
    /// When a look was asked for that has not been answered.
    looks_since_ns: Option<u64>,
    stopped_since_ns: Option<u64>,
}

impl<S: InputSource> ShippedInputs<S> {
    /// `source`, for a guest that can be shipped when there is a `shipment`.
    pub fn new(source: S, shipment: Option<Arc<Shipment>>) -> Self {
        Self {
            source,
            shipment,
            halt: Halt::default(),
            looks_since_ns: None,
            stopped_since_ns: None,
        }
    }

    /// The source under it.
    pub fn source(&mut self) -> &mut S {
        &mut self.source
    }

    /// The source again, when the run has ended.
    pub fn into_source(self) -> S {
        self.source
    }

    /// What the shipment wants here, if anything.
    fn wanted(&mut self, situation: &Situation) -> Option<Step> {
        let shipment = self.shipment.as_ref()?;
        if shipment.meeting.wants(Wanted::Look) && situation.at.is_some() {
            self.looks_since_ns = Some(shipment.clock.host_now_ns());
            return Some(Step::Measure { memory: MemoryLook::Renew });
        }
        if !shipment.meeting.wants(Wanted::Rest) {
            return None;
        }
        let step = self.halt.step(situation)?;
        self.stopped_since_ns.get_or_insert_with(|| shipment.clock.host_now_ns());
        Some(step)
    }
}

impl<S: InputSource> InputSource for ShippedInputs<S> {
    fn next(&mut self, situation: &Situation) -> Result<Step, InputError> {
        if let Some(step) = self.wanted(situation) {
            return Ok(step);
        }
        let step = self.source.next(situation)?;
        self.halt.given(&step);
        Ok(step)
    }

    fn measured(&mut self, at: Ordinal, check: Check) -> Result<(), InputError> {
        if let (Some(since_ns), Some(shipment)) = (self.looks_since_ns.take(), &self.shipment) {
            shipment.meeting.looked(shipment.clock.host_now_ns() - since_ns);
        }
        self.halt.measured(at, &check);
        self.source.measured(at, check)
    }

    fn captured(&mut self, at: Ordinal, parts: Vec<Slice>) -> Result<(), InputError> {
        self.halt.captured(at);
        self.source.captured(at, parts)
    }

    fn state_taken(&mut self, mut machine: MachineState) -> Result<(), InputError> {
        let Some(shipment) = &self.shipment else { return Ok(()) };
        let since_ns = self.stopped_since_ns.take();
        let Some(destination) = shipment.meeting.take_destination() else { return Ok(()) };
        let at = machine.at;
        let pages = shipment.copy.take_unsent(usize::MAX);
        shipment.copy.end_transfer();
        let (mut blocks, mut disk_through) = (Vec::new(), 0);
        if let Some(disk) = &shipment.disk {
            // A disk that is slow is no processor that is held.
            let resting = shipment.queue.pulse().rest();
            machine.disk_answers = disk.drain();
            drop(resting);
            disk_through = disk.last_id();
            blocks = read_blocks(disk, &disk.take_changed())
                .map_err(|source| InputError::Disk { source })?;
            disk.note_changes(false);
        }
        let mark = destination.rest(Rest { pages, blocks, machine, disk_through });
        let now_ns = shipment.clock.host_now_ns();
        let stopped_ns = now_ns - since_ns.unwrap_or(now_ns);
        shipment.meeting.stopped(Stop { at, stopped_ns });
        mark.map_or(Ok(()), |mark| self.source.saved(at, mark))
    }

    fn state_put(&mut self, part: &StatePart, stands: Option<(Ordinal, u64)>) {
        self.source.state_put(part, stands);
    }

    fn run_mode(&mut self, at: Ordinal, interrupt_waits: bool) -> RunMode {
        self.source.run_mode(at, interrupt_waits)
    }
}

#[cfg(test)]
mod tests {
    use ftvmm_devices::Input;
    use ftvmm_replication::MemoryCheck;

    use super::*;

    const AT: Ordinal = Ordinal(7);

    fn at_exit(halted: bool) -> Situation {
        Situation { at: Some(AT), halted, ..Situation::default() }
    }

    fn check(renews_copy: bool) -> Check {
        let memory = Some(MemoryCheck { digest: 1, changed: vec![], renews_copy });
        Check { memory, ..Check::default() }
    }

    fn renews(step: Option<Step>) -> bool {
        matches!(step, Some(Step::Measure { memory: MemoryLook::Renew }))
    }

    #[test]
    fn the_log_knows_of_the_renewed_copy_before_a_halted_guest_gives_its_state() {
        let mut halt = Halt::default();
        assert!(renews(halt.step(&at_exit(true))));
        halt.measured(AT, &check(false));
        assert!(renews(halt.step(&at_exit(true))));
        halt.measured(AT, &check(true));
        assert!(matches!(halt.step(&at_exit(true)), Some(Step::TakeState)));
        // An input writes to memory.
        halt.given(&Step::Apply(Input::Time { now_ns: 1 }));
        assert!(renews(halt.step(&at_exit(true))));
    }

    #[test]
    fn a_slice_is_in_the_log_with_all_it_changed() {
        let mut halt = Halt::default();
        assert!(halt.step(&at_exit(false)).is_none());
        assert!(matches!(halt.step(&Situation::default()), Some(Step::Capture)));
        halt.captured(AT);
        assert!(matches!(halt.step(&at_exit(false)), Some(Step::TakeState)));
        halt.given(&Step::Apply(Input::Time { now_ns: 1 }));
        assert!(renews(halt.step(&at_exit(false))));
        let next = Situation { at: Some(AT.next()), ..Situation::default() };
        assert!(halt.step(&next).is_none());
    }
}
