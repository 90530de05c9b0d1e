//! When the guest is given an interrupt, and when it waits for one.

use ftvmm_devices::Input;
use ftvmm_replication::Ordinal;

use super::{halfway_through_a_hook, port_read, with_an_interrupt};
use crate::exit::Exit;
use crate::situation::{RunMode, StopCause};
use crate::tests::{Did, Guest};
use crate::virtual_machine::{Handled, VirtualMachine};

/// The timer's line is the first of the vectors.
const TIMER: u8 = 0x30;

fn delivered(guest: &mut Guest) -> Vec<Did> {
    guest.take_did();
    guest.machine.deliver_interrupt().unwrap();
    guest.take_did()
}

#[test]
fn an_interrupt_comes_when_the_processor_accepts_it_and_only_once() {
    let mut guest = Guest::new();
    with_an_interrupt(&mut guest);
    assert_eq!(delivered(&mut guest), [], "interrupts are off");
    guest.machine.vcpu().accepts_interrupt = true;
    assert_eq!(delivered(&mut guest), [Did::Inject(TIMER)]);
    assert_eq!(delivered(&mut guest), [], "it is being served");
}

#[test]
fn nothing_is_delivered_when_nothing_waits() {
    let mut guest = Guest::new();
    guest.machine.vcpu().accepts_interrupt = true;
    guest.machine.vcpu().accepts_nmi = true;
    assert_eq!(delivered(&mut guest), []);
}

#[test]
fn a_non_maskable_interrupt_goes_first() {
    let mut guest = Guest::new();
    with_an_interrupt(&mut guest);
    guest.machine.apply(Input::Nmi);
    guest.machine.vcpu().accepts_interrupt = true;
    guest.machine.vcpu().accepts_nmi = true;
    assert_eq!(delivered(&mut guest), [Did::InjectNmi]);
    assert_eq!(delivered(&mut guest), [Did::Inject(TIMER)], "the other is next");
}

#[test]
fn a_non_maskable_interrupt_waits_while_one_is_served() {
    let mut guest = Guest::new();
    guest.machine.apply(Input::Nmi);
    assert_eq!(delivered(&mut guest), []);
    assert!(guest.machine.board().nmi_pending());
    guest.machine.vcpu().accepts_nmi = true;
    assert_eq!(delivered(&mut guest), [Did::InjectNmi]);
    assert!(!guest.machine.board().nmi_pending());
}

#[test]
fn a_halted_guest_waits_unless_something_wakes_it() {
    let mut guest = Guest::new();
    guest.enable_interrupts(true);
    let halted =
        |guest: &mut Guest, exit| guest.machine.situation(Ordinal(1), exit).unwrap().halted;
    assert!(halted(&mut guest, Exit::Hlt));
    assert!(!halted(&mut guest, port_read(0x64)), "it does not halt there");
    guest.machine.apply(Input::Nmi);
    assert!(!halted(&mut guest, Exit::Hlt));
    guest.machine.vcpu().masks_nmis = true;
    assert!(halted(&mut guest, Exit::Hlt), "it halted while it serves one");
    with_an_interrupt(&mut guest);
    assert!(!halted(&mut guest, Exit::Hlt));
}

#[test]
fn a_guest_that_halts_with_interrupts_off_ends() {
    let mut guest = Guest::new();
    guest.enable_interrupts(true);
    assert_eq!(guest.exit(Exit::Hlt), Handled::GoesOn);
    guest.enable_interrupts(false);
    let situation = guest.machine.situation(guest.at(), Exit::Hlt).unwrap();
    assert!(!situation.halted && !situation.interrupts_enabled, "nobody has to wait for it");
    assert_eq!(guest.exit(Exit::Hlt), Handled::Ended(StopCause::GuestHalted));
    // A non-maskable interrupt would wake it, were it not serving one.
    guest.machine.apply(Input::Nmi);
    assert_eq!(guest.exit(Exit::Hlt), Handled::GoesOn);
    guest.machine.vcpu().masks_nmis = true;
    assert_eq!(guest.exit(Exit::Hlt), Handled::Ended(StopCause::GuestHalted));
}

#[test]
fn whether_an_interrupt_could_come_is_asked_between_exits_only() {
    let mut guest = Guest::new();
    guest.machine.vcpu().takes_interrupt = true;
    let mut takes = |exit| {
        let situation = guest.machine.situation(Ordinal(3), exit).unwrap();
        (situation.at, situation.takes_interrupt)
    };
    assert_eq!(takes(Exit::WindowOpen), (None, true));
    assert_eq!(takes(Exit::Interrupted), (None, true));
    assert_eq!(takes(Exit::Hlt), (Some(Ordinal(3)), false));
    guest.machine.vcpu().takes_interrupt = false;
    let situation = guest.machine.situation(Ordinal(3), Exit::Interrupted).unwrap();
    assert!(!situation.takes_interrupt);
}

#[test]
fn a_timer_that_is_behind_owes_its_ticks() {
    let mut guest = Guest::new();
    with_an_interrupt(&mut guest);
    let owes =
        |guest: &mut Guest| guest.machine.situation(Ordinal(1), Exit::Hlt).unwrap().owes_ticks;
    assert!(!owes(&mut guest));
    guest.machine.apply(Input::Time { now_ns: 10_000_000 });
    assert!(owes(&mut guest));
    assert_eq!(guest.machine.now_ns(), 10_000_000);
}

#[test]
fn no_interrupt_leads_elsewhere_between_the_instructions_of_a_hook() {
    let mut guest = Guest::new();
    with_an_interrupt(&mut guest);
    guest.machine.apply(Input::Nmi);
    guest.machine.vcpu().accepts_interrupt = true;
    guest.machine.vcpu().accepts_nmi = true;
    halfway_through_a_hook(&mut guest, true);
    assert_eq!(delivered(&mut guest), []);
    guest.machine.vcpu().script = vec![(Exit::Hlt, Vec::new()); 2].into();
    for mode in [RunMode::UntilInterruptible, RunMode::Unrecorded] {
        guest.machine.run(mode).unwrap();
        assert_eq!(guest.take_did(), [Did::Run { want_window: false }], "{mode:?}");
    }
    halfway_through_a_hook(&mut guest, false);
    assert_eq!(delivered(&mut guest), [Did::InjectNmi]);
    assert_eq!(delivered(&mut guest), [Did::Inject(TIMER)]);
}
