//! The machine as the run loop sees it.

use ftvmm_devices::{Input, Output};
use ftvmm_replication::{
    Check, End, EndReason, MemoryCheckMode, Ordinal, OutputDigest, Slice, StatePart,
};

use super::Machine;
use crate::kvm::{Exit, KvmError};
use crate::machine_state::{MachineState, StateError};
use crate::page_tracker::LoadError;
use crate::step::{RunMode, Situation};
use crate::virtual_machine::{Handled, RestartError, VirtualMachine};

impl VirtualMachine for Machine {
    fn run(&mut self, mode: RunMode) -> Result<Exit, KvmError> {
        self.run(mode)
    }

    fn interrupt_waits(&self) -> bool {
        self.interrupt_waits()
    }

    fn situation(&mut self, at: Ordinal, exit: Exit) -> Result<Situation, KvmError> {
        self.situation(at, exit)
    }

    fn apply(&mut self, input: Input) {
        self.apply(input);
    }

    fn measure(&mut self, memory: MemoryCheckMode) -> Result<Check, KvmError> {
        self.measure(memory)
    }

    fn capture(&mut self) -> Result<Vec<Slice>, KvmError> {
        self.capture()
    }

    fn load(&mut self, parts: &[Slice]) -> Result<(), LoadError> {
        self.load(parts)
    }

    fn save(&mut self, at: Ordinal, exit: Exit) -> Result<Option<MachineState>, KvmError> {
        self.save(at, exit)
    }

    fn restore(&mut self, part: &StatePart) -> Result<Option<(Ordinal, Exit)>, StateError> {
        self.restore(part)
    }

    fn now_ns(&self) -> u64 {
        self.board().now_ns()
    }

    fn handle(&mut self, at: Ordinal, exit: Exit) -> Result<Handled, KvmError> {
        self.handle(at, exit)
    }

    fn take_outputs(&mut self) -> Vec<Output> {
        self.take_outputs()
    }

    fn digest_output(&mut self, at: Ordinal, output: &Output) -> Option<OutputDigest> {
        self.digest_output(at, output)
    }

    fn restart(&mut self, at: Ordinal) -> Result<(), RestartError> {
        self.restart(at)
    }

    fn deliver_interrupt(&mut self) -> Result<(), KvmError> {
        self.deliver_interrupt()
    }

    fn end(&self, reason: EndReason) -> Result<End, KvmError> {
        self.end(reason)
    }
}
