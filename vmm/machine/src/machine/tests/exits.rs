//! How each kind of exit is answered, and what the exit chain takes of it.

use ftvmm_devices::Input;
use ftvmm_replication::Ordinal;

use super::port_read;
use crate::efer::EFER;
use crate::exit::{Direction, Exit};
use crate::msr::MsrAccess;
use crate::situation::RunMode;
use crate::tests::{Did, ENTRY, Guest};
use crate::virtual_machine::{Handled, VirtualMachine};

fn chain(guest: &mut Guest) -> u64 {
    let at = guest.at();
    guest.machine.situation(at, Exit::Interrupted).unwrap().chain
}

fn msr(index: u32, written: Option<u64>) -> Exit {
    Exit::Msr(MsrAccess { index, written })
}

#[test]
fn a_string_write_to_the_console_is_printed_byte_by_byte() {
    let mut guest = Guest::new();
    let exit = Exit::Pio { port: 0x3f8, direction: Direction::Write, size_bytes: 1, count: 3 };
    assert_eq!(guest.exit_with(exit, b"abc"), Handled::GoesOn);
    let outputs = guest.machine.take_outputs();
    assert_eq!(outputs, [ftvmm_devices::Output::Console(b"abc".to_vec())]);
    assert!(guest.machine.take_outputs().is_empty());
}

#[test]
fn a_string_read_asks_the_device_for_each_element() {
    let mut guest = Guest::new();
    let exit = Exit::Pio { port: 0x64, direction: Direction::Read, size_bytes: 1, count: 2 };
    guest.exit_with(exit, &[0; 2]);
    assert_eq!(guest.machine.vcpu().data, [1, 1], "the status of the keyboard controller");
    // No device has a register of two bytes there.
    let exit = Exit::Pio { port: 0x64, direction: Direction::Read, size_bytes: 2, count: 1 };
    guest.exit_with(exit, &[0; 2]);
    assert_eq!(guest.machine.vcpu().data, [0xff, 0xff]);
}

#[test]
fn a_memory_mapped_access_reaches_the_card() {
    let mut guest = Guest::new();
    assert_eq!(guest.mmio_read(0xd000_0000), 0x7472_6976, "the magic of virtio");
    guest.mmio_out(0xd000_0070, 1);
    assert_eq!(guest.mmio_read(0xd000_0070), 1);
    assert_eq!(guest.mmio_read(0xe000_0000), u32::MAX, "nothing is there");
}

#[test]
fn every_answered_exit_is_in_the_chain() {
    let after = |exits: &[(Exit, &[u8])]| {
        let mut guest = Guest::new();
        for (exit, data) in exits {
            guest.exit_with(*exit, data);
        }
        chain(&mut guest)
    };
    let read = Exit::Mmio { addr: 0xd000_0000, direction: Direction::Read, size_bytes: 4 };
    let other = Exit::Mmio { addr: 0xd000_0004, direction: Direction::Read, size_bytes: 4 };
    let exits: [&[(Exit, &[u8])]; 8] = [
        &[],
        &[(port_read(0x64), &[0])],
        &[(port_read(0x60), &[0])],
        &[(read, &[0; 4])],
        &[(other, &[0; 4])],
        &[(msr(0x1b, None), &[])],
        &[(msr(0x1b, Some(7)), &[])],
        &[(Exit::Slice, &[])],
    ];
    let chains = exits.map(after);
    for (number, exits) in exits.iter().enumerate() {
        assert_eq!(chains[number], after(exits), "it is a function of the exits");
        assert!(!chains[..number].contains(&chains[number]), "{exits:?}");
    }
    // These two change nothing.
    assert_eq!(chains[0], after(&[(Exit::Interrupted, &[]), (Exit::WindowOpen, &[])]));
}

#[test]
fn registers_are_answered_by_the_bank_and_unknown_ones_fault() {
    let mut guest = Guest::new();
    guest.machine.apply(Input::Time { now_ns: 4711 });
    for (exit, answer) in [
        (msr(0x10, None), Some(4711)),
        (msr(0x10, Some(1)), Some(0)),
        (msr(0x1b, None), Some(7)),
        (msr(0x1c, None), None),
    ] {
        guest.take_did();
        assert_eq!(guest.exit(exit), Handled::GoesOn);
        assert_eq!(guest.take_did(), [Did::AnswerMsr(answer)], "{exit:?}");
    }
    assert_eq!(guest.machine.msrs().unknown()[&0x1c], 1);
}

#[test]
fn a_register_that_is_absent_is_not_one_that_reads_zero() {
    // The same write of EFER is done without paging, and a fault with it.
    let after = |cr0| {
        let mut guest = Guest::new();
        guest.machine.vcpu().state.get_mut().sregs.cr0 = cr0;
        guest.exit(msr(EFER, Some(0)));
        chain(&mut guest)
    };
    assert_ne!(after(0x11), after(0x8000_0011));
}

#[test]
fn efer_is_the_processors_and_is_answered_as_the_cpu_would() {
    let mut guest = Guest::new();
    // A kernel whose writes of CR4 are no port accesses took the bit away.
    guest.machine.vcpu().state.get_mut().sregs.cr4 = 0x20;
    guest.exit(msr(EFER, None));
    assert_eq!(guest.machine.vcpu().state.borrow().sregs.cr4, 0x24);
    assert_eq!(guest.take_did(), [Did::AnswerMsr(Some(0x500))], "LME and LMA since boot");
    guest.exit(msr(EFER, Some(0xd01)));
    assert_eq!(guest.take_did(), [Did::AnswerMsr(Some(0))]);
    assert_eq!(guest.machine.vcpu().state.borrow().sregs.efer, 0xd01);
    // LME cannot change under paging.
    guest.exit(msr(EFER, Some(0)));
    assert_eq!(guest.take_did(), [Did::AnswerMsr(None)]);
    assert_eq!(guest.machine.vcpu().state.borrow().sregs.efer, 0xd01);
}

#[test]
fn the_counter_the_kernel_reads_is_guest_time() {
    let mut guest = Guest::new();
    guest.machine.apply(Input::Time { now_ns: 0x1_2345_6789 });
    // The kernel's RDTSC is a read of four bytes now.
    let exit = Exit::Pio { port: 0x55, direction: Direction::Read, size_bytes: 4, count: 1 };
    let before = chain(&mut guest);
    assert_eq!(guest.exit_with(exit, &[0; 4]), Handled::GoesOn);
    assert_eq!(guest.machine.vcpu().data, 0x2345_6789u32.to_le_bytes());
    assert_eq!(guest.machine.vcpu().state.borrow().regs.rdx, 1);
    assert_ne!(chain(&mut guest), before);
    assert_eq!(guest.machine.tsc().counters().sites, 1);
}

#[test]
fn what_reads_a_clock_is_known_before_it_is_answered() {
    let mut guest = Guest::new();
    let mut reads = |exit| {
        let situation = guest.machine.situation(Ordinal(1), exit).unwrap();
        (situation.reads_clock, situation.reads_counter)
    };
    assert_eq!(reads(port_read(0x57)), (true, true));
    assert_eq!(reads(port_read(0x40)), (true, false), "the 8254");
    assert_eq!(reads(port_read(0x64)), (false, false));
    assert_eq!(reads(msr(0x10, None)), (true, false));
    assert_eq!(reads(msr(0x1b, None)), (false, false));
    assert_eq!(reads(Exit::Hlt), (false, false));
}

#[test]
fn a_fault_comes_once_and_at_its_exit() {
    let mut guest = Guest::new();
    guest.machine.schedule("reg:rbx:4@2".parse().unwrap(), |_| panic!("nobody sleeps"));
    let rbx = |guest: &mut Guest| guest.machine.vcpu().state.borrow().regs.rbx;
    guest.read(0x64);
    assert_eq!(rbx(&mut guest), 0);
    guest.read(0x64);
    assert_eq!(rbx(&mut guest), 16);
    let again = Ordinal(2);
    guest.machine.handle(again, Exit::Interrupted).unwrap();
    assert_eq!(rbx(&mut guest), 16);
}

#[test]
fn the_guest_runs_as_far_as_it_is_let() {
    let mut guest = Guest::new();
    guest.machine.vcpu().script =
        [Exit::Hlt, Exit::WindowOpen, Exit::Interrupted].map(|exit| (exit, Vec::new())).into();
    let mut run = |mode| {
        let exit = guest.machine.run(mode).unwrap();
        (exit, guest.take_did())
    };
    let ran = |want_window| vec![Did::Run { want_window }];
    assert_eq!(run(RunMode::Free), (Exit::Hlt, ran(false)));
    assert_eq!(run(RunMode::UntilInterruptible), (Exit::WindowOpen, ran(true)));
    assert_eq!(run(RunMode::Unrecorded), (Exit::Interrupted, ran(false)), "nothing waits");
    assert_eq!(run(RunMode::Not), (Exit::Interrupted, vec![Did::CompleteIo]));
}

#[test]
fn an_unrecorded_guest_stops_for_an_interrupt_that_waits() {
    let mut guest = Guest::new();
    super::with_an_interrupt(&mut guest);
    guest.take_did();
    guest.machine.vcpu().script = [(Exit::WindowOpen, Vec::new())].into();
    assert!(guest.machine.interrupt_waits());
    assert_eq!(guest.machine.run(RunMode::Unrecorded).unwrap(), Exit::WindowOpen);
    assert_eq!(guest.take_did(), [Did::Run { want_window: true }]);
}

#[test]
fn what_the_processor_cannot_do_is_told() {
    let mut guest = Guest::new();
    for call in ["run", "complete_io", "exit_sregs", "state", "code_at_rip", "sregs", "masks_nmis"]
    {
        guest.machine.vcpu().fails.set(Some(call));
        let machine = &mut guest.machine;
        machine.apply(Input::Nmi);
        let failures = [
            machine.run(RunMode::Free).err(),
            machine.run(RunMode::Not).err(),
            machine.handle(Ordinal(1), port_read(0x64)).err(),
            machine.measure(ftvmm_replication::MemoryCheckMode::None).err(),
            machine.handle(Ordinal(1), msr(EFER, None)).err(),
            machine.handle(Ordinal(1), Exit::Hlt).err(),
        ];
        let named = failures.iter().flatten().any(|error| error.to_string().contains(call));
        assert!(named, "{call}: {failures:?}");
        guest.machine.vcpu().fails.set(None);
        guest.machine.vcpu().script = [(Exit::Hlt, Vec::new())].into();
    }
}

#[test]
fn the_guest_starts_at_its_kernel_with_a_timer_that_runs() {
    let mut guest = Guest::new();
    let regs = guest.machine.vcpu().state.borrow().regs;
    assert_eq!((regs.rip, regs.rflags), (ENTRY, 2));
    let situation = guest.machine.situation(Ordinal(0), Exit::Interrupted).unwrap();
    assert!(situation.deadline_ns.is_some() && situation.booting && !situation.takes_frames);
    assert_eq!((situation.at, situation.last), (None, Ordinal(0)));
    // In user mode it has booted.
    guest.machine.vcpu().state.get_mut().sregs.cs.selector = 0x33;
    assert!(!guest.machine.situation(Ordinal(0), Exit::Interrupted).unwrap().booting);
}
