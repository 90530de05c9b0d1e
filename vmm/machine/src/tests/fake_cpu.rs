//! A processor of plain registers: it stops for what it is told, and remembers what was done to it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::io::{Error, ErrorKind};
use std::rc::Rc;

use ftvmm_replication::encoding::{decode, encode};
use kvm_bindings::{kvm_debugregs, kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::cpu::{Cpu, CpuError, DirtyLog};
use crate::exit::{Direction, Exit};
use crate::memory::Memory;
use crate::vcpu_state::VcpuState;

/// Length of `IN` and `OUT` with an immediate port, which is all that stands in for anything.
const PORT_ACCESS_BYTES: u64 = 2;

/// What was done to the processor, in order; calls that change nothing are not in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Did {
    Run {
        want_window: bool,
    },
    CompleteIo,
    /// With the two bytes at [`FakeCpu::watched`] meanwhile.
    Step([u8; 2]),
    Inject(u8),
    InjectNmi,
    Raise(u8, Option<u32>),
    AnswerMsr(Option<u64>),
    Save,
    Restore,
    PowerOn,
}

/// See the module documentation.
#[derive(Default)]
pub struct FakeCpu {
    pub state: RefCell<VcpuState>,
    /// What it stops for next, with the data the guest gives.
    pub script: VecDeque<(Exit, Vec<u8>)>,
    /// Data of the exit.
    pub data: Vec<u8>,
    pub did: RefCell<Vec<Did>>,
    /// It can take an interrupt between two exits, and once the exit is complete.
    pub takes_interrupt: bool,
    pub accepts_interrupt: bool,
    pub accepts_nmi: bool,
    pub masks_nmis: bool,
    /// The call of this name fails.
    pub fails: Cell<Option<&'static str>>,
    /// It does not take these bits in CR4.
    pub refused_cr4: u64,
    /// A guest-physical address that is looked at in every step.
    pub watched: u64,
    /// How far each step goes.
    pub step_bytes: VecDeque<u64>,
    /// What is zeroed at power-on.
    pub memory: Option<Rc<Memory>>,
    /// The bytes at RIP.
    pub code: Vec<u8>,
    /// Where the port access stands that is not complete, and whether it is a read.
    pub access: Option<(u64, bool)>,
}

/// The same state once more.
pub fn copied(state: &VcpuState) -> VcpuState {
    decode(&encode(state)).unwrap()
}

impl FakeCpu {
    /// The guest stops for `exit` with this data.
    pub fn stand_at(&mut self, exit: Exit, data: &[u8]) {
        self.access = match exit {
            Exit::Pio { direction, .. } => {
                Some((self.state.borrow().regs.rip, direction == Direction::Read))
            }
            _ => None,
        };
        self.data = data.to_vec();
    }

    /// What was done since the last call.
    pub fn take_did(&self) -> Vec<Did> {
        self.did.take()
    }

    fn note(&self, did: Did) {
        self.did.borrow_mut().push(did);
    }

    fn call(&self, call: &'static str) -> Result<(), CpuError> {
        match self.fails.get() {
            Some(fails) if fails == call => Err(failed(call, ErrorKind::Other)),
            _ => Ok(()),
        }
    }
}

fn failed(call: &'static str, kind: ErrorKind) -> CpuError {
    CpuError::Call { call, cause: Error::from(kind) }
}

// SAFETY: it starts no thread, and memory is written only where a test has a method write it.
unsafe impl Cpu for FakeCpu {
    fn run(&mut self, want_window: bool) -> Result<Exit, CpuError> {
        self.call("run")?;
        self.note(Did::Run { want_window });
        let (exit, data) = self.script.pop_front().unwrap();
        self.stand_at(exit, &data);
        Ok(exit)
    }

    fn complete_io(&mut self) -> Result<(), CpuError> {
        self.call("complete_io")?;
        self.note(Did::CompleteIo);
        let regs = &mut self.state.borrow_mut().regs;
        if let Some((rip, is_read)) = self.access.take().filter(|(rip, _)| *rip == regs.rip) {
            regs.rip = rip + PORT_ACCESS_BYTES;
            if is_read {
                regs.rax = regs.rax & !0xff | u64::from(self.data[0]);
            }
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), CpuError> {
        self.call("step")?;
        let bytes = self.memory.as_ref().unwrap().read_obj(GuestAddress(self.watched));
        self.note(Did::Step(bytes.unwrap()));
        self.state.borrow_mut().regs.rip += self.step_bytes.pop_front().unwrap();
        Ok(())
    }

    fn pio_data(&mut self) -> &mut [u8] {
        &mut self.data
    }

    fn mmio_data(&mut self) -> &mut [u8] {
        &mut self.data
    }

    fn answer_msr(&mut self, answer: Option<u64>) {
        self.note(Did::AnswerMsr(answer));
    }

    fn interrupts_enabled(&mut self) -> bool {
        self.state.borrow().interrupts_enabled()
    }

    fn can_take_interrupt(&mut self) -> Result<bool, CpuError> {
        self.call("can_take_interrupt").map(|()| self.takes_interrupt)
    }

    fn accepts_interrupt(&mut self) -> Result<bool, CpuError> {
        self.call("accepts_interrupt").map(|()| self.accepts_interrupt)
    }

    fn inject(&mut self, vector: u8) -> Result<(), CpuError> {
        self.note(Did::Inject(vector));
        Ok(())
    }

    fn accepts_nmi(&mut self) -> Result<bool, CpuError> {
        self.call("accepts_nmi").map(|()| self.accepts_nmi)
    }

    fn masks_nmis(&self) -> Result<bool, CpuError> {
        self.call("masks_nmis").map(|()| self.masks_nmis)
    }

    fn inject_nmi(&mut self) -> Result<(), CpuError> {
        self.note(Did::InjectNmi);
        Ok(())
    }

    fn raise(&self, vector: u8, error_code: Option<u32>) -> Result<(), CpuError> {
        self.note(Did::Raise(vector, error_code));
        Ok(())
    }

    fn regs(&self) -> Result<kvm_regs, CpuError> {
        self.call("regs").map(|()| self.state.borrow().regs)
    }

    fn set_regs(&self, regs: &kvm_regs) -> Result<(), CpuError> {
        self.call("set_regs")?;
        self.state.borrow_mut().regs = *regs;
        Ok(())
    }

    fn sregs(&self) -> Result<kvm_sregs, CpuError> {
        self.call("sregs").map(|()| self.state.borrow().sregs)
    }

    fn exit_sregs(&self) -> Result<kvm_sregs, CpuError> {
        self.call("exit_sregs").map(|()| self.state.borrow().sregs)
    }

    fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), CpuError> {
        self.call("set_sregs")?;
        if sregs.cr4 & self.refused_cr4 != 0 {
            return Err(failed("set_sregs", ErrorKind::InvalidInput));
        }
        self.state.borrow_mut().sregs = *sregs;
        Ok(())
    }

    fn debug_regs(&self) -> Result<kvm_debugregs, CpuError> {
        Ok(self.state.borrow().debug)
    }

    fn set_debug_regs(&self, regs: &kvm_debugregs) -> Result<(), CpuError> {
        self.state.borrow_mut().debug = *regs;
        Ok(())
    }

    fn code_at_rip(&self, _: &Memory) -> Result<Vec<u8>, CpuError> {
        self.call("code_at_rip").map(|()| self.code.clone())
    }

    fn state(&self) -> Result<VcpuState, CpuError> {
        self.call("state").map(|()| copied(&self.state.borrow()))
    }

    fn save(&mut self) -> Result<VcpuState, CpuError> {
        self.call("save")?;
        self.note(Did::Save);
        self.state()
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), CpuError> {
        self.call("restore")?;
        self.note(Did::Restore);
        *self.state.borrow_mut() = copied(state);
        Ok(())
    }

    fn power_on_again(&mut self, power_on: &VcpuState) -> Result<(), CpuError> {
        self.call("power_on_again")?;
        self.note(Did::PowerOn);
        *self.state.borrow_mut() = copied(power_on);
        for region in self.memory.iter().flat_map(|memory| memory.iter()) {
            let zeroes = vec![0; region.len() as usize];
            region.write_slice(&zeroes, vm_memory::MemoryRegionAddress(0)).unwrap();
        }
        Ok(())
    }
}

/// What a call cleared: the slot and its pages.
pub type Cleared = (u32, Vec<usize>);

/// A log of dirty pages that the test writes; clones are the same log.
#[derive(Clone, Default)]
pub struct FakeLog {
    pages: Rc<RefCell<BTreeSet<(u32, usize)>>>,
    pub cleared: Rc<RefCell<Vec<Cleared>>>,
    pub fails: Rc<Cell<bool>>,
}

impl FakeLog {
    /// The guest writes to a page.
    pub fn mark(&self, slot: u32, page: usize) {
        self.pages.borrow_mut().insert((slot, page));
    }

    /// Whether the next write to the page is seen.
    pub fn has(&self, slot: u32, page: usize) -> bool {
        self.pages.borrow().contains(&(slot, page))
    }
}

impl DirtyLog for FakeLog {
    fn read(&self, slot: u32, memory_bytes: usize) -> Result<Vec<u64>, CpuError> {
        if self.fails.get() {
            return Err(failed("KVM_GET_DIRTY_LOG", ErrorKind::Other));
        }
        let mut bits = vec![0; (memory_bytes / 4096).div_ceil(64)];
        for (_, page) in self.pages.borrow().iter().filter(|(of, _)| *of == slot) {
            bits[page / 64] |= 1 << (page % 64);
        }
        Ok(bits)
    }

    fn clear(&self, slot: u32, pages: u32, bits: &[u64]) -> Result<(), CpuError> {
        let is_set = |page: &usize| bits[page / 64] >> (page % 64) & 1 == 1;
        let cleared: Vec<usize> = (0..pages as usize).filter(is_set).collect();
        self.pages.borrow_mut().retain(|(of, page)| *of != slot || !cleared.contains(page));
        self.cleared.borrow_mut().push((slot, cleared));
        Ok(())
    }
}
