//! What becomes of a guest that ends its own execution.

use ftvmm_devices::{Input, Output, PVPANIC_PORT};
use ftvmm_replication::{EndReason, OnPanic, OnReset, Ordinal};

use crate::exit::{Direction, Exit};
use crate::situation::StopCause;
use crate::tests::{Did, ENTRY, Guest};
use crate::virtual_machine::{Handled, RestartError, VirtualMachine};

const PRINTED_PANIC: &[u8] = b"Kernel panic - not syncing: oops\n";

fn reset(guest: &mut Guest) -> Handled {
    guest.out(0xcf9, 6)
}

fn printed_panic(guest: &mut Guest) {
    for byte in PRINTED_PANIC {
        guest.out(0x3f8, *byte);
    }
}

#[test]
fn a_reset_ends_the_run_or_restarts_the_machine() {
    let mut guest = Guest::with(OnReset::End, OnPanic::End);
    assert_eq!(reset(&mut guest), Handled::Ended(StopCause::GuestReset));
    let mut guest = Guest::with(OnReset::Restart, OnPanic::End);
    assert_eq!(reset(&mut guest), Handled::Restarts);
}

#[test]
fn a_triple_fault_is_a_reset_with_a_name_of_its_own() {
    let mut guest = Guest::with(OnReset::End, OnPanic::End);
    assert_eq!(guest.exit(Exit::Shutdown), Handled::Ended(StopCause::GuestTripleFault));
    let mut guest = Guest::with(OnReset::Restart, OnPanic::End);
    assert_eq!(guest.exit(Exit::Shutdown), Handled::Restarts);
    printed_panic(&mut guest);
    assert_eq!(guest.exit(Exit::Shutdown), Handled::Ended(StopCause::GuestPanic));
}

#[test]
fn a_guest_that_switches_itself_off_ends_whatever_the_policy() {
    for on_reset in [OnReset::End, OnReset::Restart] {
        let mut guest = Guest::with(on_reset, OnPanic::Restart);
        // SLP_EN with the sleep type of S5, in the upper byte of PM1a_CNT.
        let exit = Exit::Pio { port: 0x604, direction: Direction::Write, size_bytes: 2, count: 1 };
        let answer = guest.exit_with(exit, &(5u16 << 10 | 1 << 13).to_le_bytes());
        assert_eq!(answer, Handled::Ended(StopCause::GuestPowerOff));
    }
}

#[test]
fn a_panic_the_device_is_told_of_follows_the_policy() {
    for (on_panic, answer) in [
        (OnPanic::End, Handled::Ended(StopCause::GuestPanic)),
        (OnPanic::Restart, Handled::Restarts),
        (OnPanic::Ignore, Handled::GoesOn),
    ] {
        let mut guest = Guest::with(OnReset::End, on_panic);
        assert_eq!(guest.out(PVPANIC_PORT, 1), answer);
    }
}

#[test]
fn a_panic_that_was_printed_counts_when_a_reset_follows() {
    for (on_panic, answer) in [
        (OnPanic::End, Handled::Ended(StopCause::GuestPanic)),
        (OnPanic::Restart, Handled::Restarts),
        (OnPanic::Ignore, Handled::Ended(StopCause::GuestReset)),
    ] {
        let mut guest = Guest::with(OnReset::End, on_panic);
        printed_panic(&mut guest);
        assert_eq!(guest.read(0x64), 1, "a program may print the same");
        assert_eq!(reset(&mut guest), answer);
    }
}

#[test]
fn a_machine_that_is_started_again_stands_where_it_stood_at_first() {
    let mut guest = Guest::with(OnReset::Restart, OnPanic::Restart);
    let first = guest.machine.state_digest().unwrap();
    let at_first = |guest: &mut Guest| {
        let regs = guest.machine.vcpu().state.borrow().regs;
        (regs.rip, regs.rbx, guest.memory_bytes(ENTRY), guest.memory_bytes(0x1000))
    };
    let wanted = at_first(&mut guest);
    guest.machine.apply(Input::Time { now_ns: 5_000_000_000 });
    guest.writes(ENTRY, &[1, 2]);
    guest.writes(0x1000, &[3, 4]);
    guest.machine.vcpu().state.get_mut().regs.rbx = 1;
    printed_panic(&mut guest);
    reset(&mut guest);
    super::halfway_through_a_hook(&mut guest, true);
    let chain = guest.machine.situation(guest.at(), Exit::Interrupted).unwrap().chain;
    guest.take_did();
    guest.machine.restart(guest.at()).unwrap();
    assert_eq!(guest.take_did(), [Did::PowerOn]);
    assert_eq!(at_first(&mut guest), wanted);
    assert_eq!(guest.machine.board().resets(), 1);
    assert_eq!(guest.machine.now_ns(), 5_000_000_000, "guest time goes on");
    let situation = guest.machine.situation(guest.at(), Exit::Interrupted).unwrap();
    assert_ne!(situation.chain, chain, "the exit chain has the reset");
    assert!(situation.deadline_ns.is_some(), "the firmware started the timer");
    assert!(!guest.machine.board().panic_was_printed(), "the panic is forgotten");
    assert!(!guest.machine.tsc().holds_interrupts(), "and so is where it stood");
    assert_ne!(guest.machine.state_digest().unwrap(), first, "what was sent is not");
    // It may end again, at once and a second later.
    for now_ns in [5_000_000_001, 6_000_000_000] {
        guest.machine.apply(Input::Time { now_ns });
        assert_eq!(reset(&mut guest), Handled::Restarts);
        guest.machine.restart(guest.at()).unwrap();
    }
    assert_eq!(guest.machine.board().resets(), 3);
}

#[test]
fn a_processor_that_cannot_be_reset_is_told() {
    let mut guest = Guest::with(OnReset::Restart, OnPanic::End);
    guest.machine.vcpu().fails.set(Some("power_on_again"));
    let error = guest.machine.restart(Ordinal(1)).unwrap_err();
    assert!(matches!(error, RestartError::Kvm(_)));
    assert!(error.to_string().contains("power_on_again"), "{error}");
    guest.machine.vcpu().fails.set(Some("set_sregs"));
    let error = guest.machine.restart(Ordinal(1)).unwrap_err();
    assert!(error.to_string().starts_with("after the guest's reset: "), "{error}");
}

#[test]
fn the_end_has_the_digest_of_the_whole_guest() {
    let ended = |change: &dyn Fn(&mut Guest)| {
        let mut guest = Guest::new();
        change(&mut guest);
        guest.machine.end(EndReason::HostRequest).unwrap()
    };
    let usual = ended(&|_| {});
    assert_eq!(usual.reason, EndReason::HostRequest);
    assert_eq!(usual, ended(&|_| {}));
    let printed = Output::Console(vec![1]);
    let changes: [&dyn Fn(&mut Guest); 6] = [
        &|guest| guest.machine.vcpu().state.get_mut().msrs[3] = 1,
        &|guest| guest.writes(0x30_0000, &[1]),
        &|guest| super::halfway_through_a_hook(guest, false),
        &|guest| assert_eq!(guest.machine.digest_output(Ordinal(0), &printed), None),
        &|guest| guest.machine.apply(Input::Nmi),
        &|guest| assert_eq!(guest.read(0x64), 1),
    ];
    for (number, change) in changes.iter().enumerate() {
        assert_ne!(ended(change).state_digest, usual.state_digest, "{number}");
    }
    let mut guest = Guest::new();
    guest.machine.vcpu().fails.set(Some("state"));
    assert!(guest.machine.end(EndReason::Reset).is_err());
}
