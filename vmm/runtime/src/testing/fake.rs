//! A machine without a processor, for tests: it makes the exits it is told to make, and says what
//! is done to it.

use std::collections::VecDeque;

use ftvmm_devices::{Board, BoardConfig, Input, Output};
use ftvmm_machine::exit::{Direction, Exit};
use ftvmm_machine::machine_state::{MachineState, ResumePoint, StateError};
use ftvmm_machine::page_tracker::LoadError;
use ftvmm_machine::situation::{RunMode, RunSituation};
use ftvmm_machine::tsc::TscTrapState;
use ftvmm_machine::vcpu_state::VcpuState;
use ftvmm_machine::virtual_machine::{Handled, RestartError};
use ftvmm_machine::{CpuError, VirtualMachine};
use ftvmm_replication::{
    Check, End, EndReason, MemoryCheckMode, Ordinal, OutputDigest, Slice, StatePart,
};

use super::Told;

/// Where the fake stands whose state was restored.
pub const RESTORED: (Ordinal, Exit) = (Ordinal(70), Exit::Hlt);
/// Its guest time.
pub const NOW_NS: u64 = 5000;

/// An exit that has an ordinal.
pub const PIO: Exit = Exit::Pio { port: 1, direction: Direction::Write, size_bytes: 1, count: 1 };

/// The machine; see the module documentation.
pub struct Fake {
    /// What was done to it.
    pub told: Told,
    exits: VecDeque<Exit>,
    /// What exits lead to, by ordinal.
    pub handled: Vec<(Ordinal, Handled)>,
    /// What the guest sends at each exit.
    pub outputs: Vec<Output>,
    /// Says when the machine is dropped.
    pub ends: Option<EndTold>,
}

/// Tells of its own end.
pub struct EndTold(pub Told, pub &'static str);

impl Drop for EndTold {
    fn drop(&mut self) {
        self.0.tell(format!("{} ends", self.1));
    }
}

impl Fake {
    /// Makes `exits`, and fails afterwards.
    pub fn new(exits: &[Exit]) -> Self {
        let (handled, outputs) = (Vec::new(), Vec::new());
        let exits = exits.iter().copied().collect();
        Self { told: Told::default(), exits, handled, outputs, ends: None }
    }

    /// A state of the fake.
    pub fn state(at: Ordinal) -> MachineState {
        let board = BoardConfig { rtc_epoch_s: 0, net: None, disk_bytes: None };
        MachineState {
            at,
            resume_point: ResumePoint::Halt,
            vcpu: VcpuState::default(),
            board: Board::new(&board).save(),
            tsc: TscTrapState::default(),
            chain: 0,
            outputs: 0,
            inputs: 0,
            slices: 0,
            memory_digest: 0,
            disk_answers: Vec::new(),
        }
    }
}

impl VirtualMachine for Fake {
    fn run(&mut self, mode: RunMode) -> Result<Exit, CpuError> {
        self.told.tell(format!("run {mode:?}"));
        let out = CpuError::UnknownExit { reason: 17, suberror: 1, rip: 0 };
        self.exits.pop_front().ok_or(out)
    }

    fn interrupt_waits(&self) -> bool {
        false
    }

    fn situation(&mut self, at: Ordinal, exit: Exit) -> Result<RunSituation, CpuError> {
        let here = exit.is_synchronous().then_some(at);
        Ok(RunSituation { at: here, last: at, ..RunSituation::default() })
    }

    fn apply(&mut self, _: Input) {
        self.told.tell("apply");
    }

    fn measure(&mut self, memory: MemoryCheckMode) -> Result<Check, CpuError> {
        self.told.tell(format!("measure {memory:?}"));
        Ok(Check::default())
    }

    fn capture(&mut self) -> Result<Vec<Slice>, CpuError> {
        self.told.tell("capture");
        Ok(vec![Slice { pages: vec![], cpu: Some(vec![1]) }])
    }

    fn load(&mut self, _: &[Slice]) -> Result<(), LoadError> {
        self.told.tell("load");
        Ok(())
    }

    fn save(&mut self, at: Ordinal, exit: Exit) -> Result<Option<MachineState>, CpuError> {
        self.told.tell("save");
        Ok(ResumePoint::of(exit).map(|_| Self::state(at)))
    }

    fn restore(&mut self, part: &StatePart) -> Result<Option<(Ordinal, Exit)>, StateError> {
        self.told.tell("restore");
        Ok(matches!(part, StatePart::Machine(_)).then_some(RESTORED))
    }

    fn now_ns(&self) -> u64 {
        NOW_NS
    }

    fn handle(&mut self, at: Ordinal, exit: Exit) -> Result<Handled, CpuError> {
        let kind = match exit {
            Exit::Slice => "slice",
            Exit::Interrupted => "nothing",
            _ => "exit",
        };
        self.told.tell(format!("handle {kind} {at}"));
        let handled = self.handled.iter().find(|(ordinal, _)| *ordinal == at);
        Ok(handled.map_or(Handled::GoesOn, |(_, handled)| *handled))
    }

    fn take_outputs(&mut self) -> Vec<Output> {
        self.outputs.clone()
    }

    fn digest_output(&mut self, at: Ordinal, _: &Output) -> Option<OutputDigest> {
        Some(OutputDigest::of(at, 0, &[]))
    }

    fn restart(&mut self, at: Ordinal) -> Result<(), RestartError> {
        self.told.tell(format!("restart {at}"));
        Ok(())
    }

    fn deliver_interrupt(&mut self) -> Result<(), CpuError> {
        self.told.tell("interrupt");
        Ok(())
    }

    fn end(&self, reason: EndReason) -> Result<End, CpuError> {
        Ok(End { state_digest: [7; 32], chain: 0, outputs: 0, reason })
    }
}
