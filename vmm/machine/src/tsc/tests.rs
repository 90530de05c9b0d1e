//! The traps at the exits of a processor that stands where the test puts it.

mod gp;
mod kernels;

use std::rc::Rc;

use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress};

use super::cr4::TSD;
use super::paging::tests::{guest, map};
use super::*;
use crate::tests::{Did, FakeCpu};

/// A page of the kernel's code, and where it lies.
const TEXT: u64 = 0xffff_ffff_8100_0000;
const TEXT_GPA: u64 = 0x6000;
const TSC: u64 = 0x1234_5678_9abc_def0;

struct World {
    memory: Rc<Memory>,
    cpu: FakeCpu,
    trap: TscTrap,
    at: u64,
}

impl World {
    /// A processor in the kernel, at the start of [`TEXT`], which is full of NOPs.
    fn new(mode: TscMode, kernel: KernelCode) -> Self {
        let (memory, mut sregs) = guest();
        let memory = Rc::new(memory);
        map(&memory, TEXT, TEXT_GPA, 1);
        memory.write_slice(&[0x90; 0x1000], GuestAddress(TEXT_GPA)).unwrap();
        sregs.cs.selector = 0x10;
        sregs.cr4 |= TSD;
        sregs.efer = EFER_LMA;
        let cpu = FakeCpu { memory: Some(memory.clone()), ..Default::default() };
        cpu.state.borrow_mut().sregs = sregs;
        cpu.state.borrow_mut().regs.rip = TEXT;
        Self { memory, cpu, trap: TscTrap::new(mode, kernel), at: 0 }
    }

    fn trapping() -> Self {
        Self::new(TscMode::Trap, KernelCode::default())
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    fn bytes(&self, gpa: u64) -> [u8; 2] {
        self.memory.read_obj(GuestAddress(gpa)).unwrap()
    }

    fn regs(&mut self) -> &mut kvm_regs {
        &mut self.cpu.state.get_mut().regs
    }

    fn sregs(&mut self) -> &mut kvm_sregs {
        &mut self.cpu.state.get_mut().sregs
    }

    fn try_exit(&mut self, exit: Exit) -> Result<Option<Trap>, CpuError> {
        let bytes = match exit {
            Exit::Pio { size_bytes, count, .. } => usize::from(size_bytes) * count as usize,
            _ => 0,
        };
        self.at += 1;
        self.cpu.stand_at(exit, &vec![0xee; bytes]);
        self.trap.at_exit(Ordinal(self.at), exit, TSC, &mut self.cpu, &self.memory)
    }

    fn exit(&mut self, exit: Exit) -> Option<Trap> {
        self.try_exit(exit).unwrap()
    }

    /// As [`Self::exit`], at the exit with this ordinal.
    fn exit_at(&mut self, at: u64, exit: Exit) -> Option<Trap> {
        self.at = at - 1;
        self.exit(exit)
    }

    fn at_efer(&mut self) {
        self.trap.at_efer(&mut self.cpu, &self.memory).unwrap();
    }

    /// Which bits of CR4 the guest reads, by `MOV RBX, CR4`.
    fn shown_cr4(&mut self) -> u64 {
        self.put(TEXT_GPA, &Trapped::ReadCr4(3).replacement());
        self.regs().rip = TEXT;
        let trap = self.exit(pio(0x13, Direction::Read, 1)).unwrap();
        assert_eq!((trap.port, trap.data), (0x13, self.regs().rbx));
        trap.data
    }

    /// The guest writes to CR4, by `MOV CR4, RBX`.
    fn write_cr4(&mut self, value: u64) -> Option<Trap> {
        self.put(TEXT_GPA, &Trapped::WriteCr4(3).replacement());
        self.regs().rip = TEXT;
        self.regs().rbx = value;
        self.cpu.take_did();
        self.exit(pio(0x13, Direction::Write, 1))
    }
}

fn pio(port: u16, direction: Direction, size_bytes: u8) -> Exit {
    Exit::Pio { port, direction, size_bytes, count: 1 }
}

#[test]
fn the_kernels_counter_is_in_its_registers_when_the_access_is_done() {
    let mut world = World::trapping();
    world.regs().rcx = 7;
    let trap = world.exit(pio(RDTSC_PORT, Direction::Read, 4)).unwrap();
    assert_eq!((trap.port, trap.data), (RDTSC_PORT, TSC));
    // The processor puts the data of the access into EAX.
    assert_eq!(world.cpu.data, (TSC as u32).to_le_bytes());
    assert_eq!((world.regs().rdx, world.regs().rcx), (TSC >> 32, 7));
    let trap = world.exit(pio(RDTSCP_PORT, Direction::Read, 4)).unwrap();
    assert_eq!((trap.port, trap.data, world.regs().rcx), (RDTSCP_PORT, TSC, 0));
}

#[test]
fn accesses_that_no_replacement_makes_are_the_devices() {
    let mut world = World::trapping();
    world.put(TEXT_GPA, &Trapped::ReadCr4(3).replacement());
    let twice = Exit::Pio { port: 0x13, direction: Direction::Read, size_bytes: 1, count: 2 };
    for exit in [
        pio(RDTSC_PORT, Direction::Read, 1),
        pio(RDTSC_PORT, Direction::Write, 4),
        pio(RDTSCP_PORT, Direction::Read, 2),
        pio(0x13, Direction::Read, 2),
        pio(0x20, Direction::Read, 1),
        pio(GP_PORT, Direction::Read, 1),
        pio(GP_PORT, Direction::Write, 1),
        pio(HOOK_PORT, Direction::Read, 1),
        twice,
        Exit::Hlt,
    ] {
        assert_eq!(world.exit(exit), None, "{exit:?}");
    }
    // A port access of the kernel's own, and a user's.
    world.regs().rip = TEXT + 2;
    assert_eq!(world.exit(pio(0x13, Direction::Read, 1)), None);
    world.regs().rip = TEXT;
    world.sregs().cs.selector = 0x33;
    assert_eq!(world.exit(pio(0x13, Direction::Read, 1)), None);
    world.sregs().cs.selector = 0x10;
    assert!(world.exit(pio(0x13, Direction::Read, 1)).is_some());
}

#[test]
fn which_exits_may_read_the_counter_is_known() {
    for port in [RDTSC_PORT, RDTSCP_PORT, GP_PORT] {
        assert!(TscTrap::reads_clock(pio(port, Direction::Read, 4)), "{port:#x}");
    }
    assert!(!TscTrap::reads_clock(pio(HOOK_PORT, Direction::Read, 1)));
    assert!(!TscTrap::reads_clock(Exit::Hlt));
}

#[test]
fn the_guest_reads_the_cr4_it_wrote() {
    let mut world = World::trapping();
    assert_eq!(world.shown_cr4(), 0x20, "the bit is set and not shown");
    let trap = world.write_cr4(0xa0).unwrap();
    assert_eq!((trap.port, trap.data, world.sregs().cr4), (0x13, 0xa0, 0xa0 | TSD));
    assert_eq!(world.cpu.take_did(), []);
    assert_eq!(world.shown_cr4(), 0xa0);
    world.write_cr4(0xa0 | TSD);
    assert_eq!((world.shown_cr4(), world.sregs().cr4), (0xa0 | TSD, 0xa0 | TSD));
    world.write_cr4(0xa0);
    assert_eq!(world.shown_cr4(), 0xa0);
}

#[test]
fn a_read_of_cr4_leaves_rax_alone_unless_it_goes_there() {
    let mut world = World::trapping();
    world.regs().rax = 0x1234;
    world.shown_cr4();
    // The processor puts the data of the access into AL.
    assert_eq!((world.cpu.data[0], world.regs().rax), (0x34, 0x1234));
    world.put(TEXT_GPA, &Trapped::ReadCr4(0).replacement());
    world.exit(pio(0x10, Direction::Read, 1)).unwrap();
    assert_eq!((world.cpu.data[0], world.regs().rax), (0x20, 0x20));
}

#[test]
fn a_value_that_cr4_does_not_take_is_a_general_protection_fault() {
    let mut world = World::trapping();
    world.cpu.refused_cr4 = 1 << 13;
    // Bits the CPU has not, and one that only a change of mode can set.
    for value in [0x20 | TSD | 1 << 13, 0x20 | TSD | 1 << 12] {
        let trap = world.write_cr4(value).unwrap();
        assert_eq!(trap.data, value);
        let fault = [Did::CompleteIo, Did::Raise(13, Some(0)), Did::CompleteIo];
        assert_eq!(world.cpu.take_did(), fault);
        assert_eq!(world.regs().rip, TEXT, "the fault is the instruction's");
        assert_eq!(world.sregs().cr4, 0x20 | TSD);
        assert_eq!(world.shown_cr4(), 0x20, "nor does the guest's own bit change");
    }
    world.cpu.fails.set(Some("set_sregs"));
    world.put(TEXT_GPA, &Trapped::WriteCr4(3).replacement());
    world.regs().rip = TEXT;
    let failed = world.try_exit(pio(0x13, Direction::Write, 1));
    assert!(failed.is_err(), "the host's failure is no fault of the guest");
}

#[test]
fn what_is_remembered_can_be_saved_and_forgotten() {
    let mut world = World::trapping();
    let first = world.trap.save();
    world.write_cr4(0x20 | TSD);
    let saved = world.trap.save();
    assert_ne!(saved, first);
    let mut other = World::trapping();
    other.trap.restore(saved.clone());
    assert_eq!((other.shown_cr4(), other.trap.save()), (0x20 | TSD, saved));
    other.trap.reset();
    assert_eq!(other.trap.save(), first);
}
