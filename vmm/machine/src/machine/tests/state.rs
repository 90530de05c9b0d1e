//! A whole machine is saved and put in place elsewhere.

use ftvmm_devices::{Input, Output};
use ftvmm_replication::state::pack;
use ftvmm_replication::{Ordinal, StatePart};

use super::with_an_interrupt;
use crate::exit::Exit;
use crate::machine_state::{MachineState, StateError};
use crate::page_tracker::LoadError;
use crate::tests::{Did, Guest};
use crate::virtual_machine::VirtualMachine;

const OUTLINE: StatePart = StatePart::Outline { total_bytes: 1 };

/// A guest in the middle of its life, halted.
fn busy() -> Guest {
    let mut guest = Guest::new();
    with_an_interrupt(&mut guest);
    guest.out(0x3f8, b'x');
    let at = guest.at();
    guest.machine.digest_output(at, &Output::Console(b"sent before".to_vec()));
    guest.writes(0x30_0000, b"contents");
    guest.machine.vcpu().state.get_mut().regs.rbx = 42;
    guest
}

/// Its memory and itself, as parts of a state.
fn parts(guest: &mut Guest, standing: Exit) -> Vec<StatePart> {
    let at = guest.at();
    let machine = guest.machine.save(at, standing).unwrap().unwrap();
    let copy = guest.machine.memory_copy().unwrap();
    assert!(copy.begin_transfer() > 0);
    let pages = copy.take_unsent(usize::MAX);
    let packed = pack(pages.iter().map(|(page, content)| (*page, content.as_slice())));
    vec![OUTLINE, StatePart::Pages(packed), StatePart::Machine(machine.encode())]
}

#[test]
fn another_machine_goes_on_from_a_saved_state() {
    for standing in [Exit::Hlt, Exit::Slice] {
        let (mut from, mut to) = (busy(), Guest::new());
        let parts = parts(&mut from, standing);
        to.writes(0x30_2000, b"what was");
        to.read(0x64);
        let mut stands = None;
        for part in &parts {
            assert_eq!(stands, None, "only the last part says where");
            stands = to.machine.restore(part).unwrap();
        }
        assert_eq!(stands, Some((from.at(), standing)));
        assert_eq!(to.take_did(), [Did::Restore]);
        assert_eq!(to.memory_bytes(0x30_0000), *b"contents");
        assert_eq!(to.memory_bytes(0x30_2000), [0; 8]);
        assert_eq!(
            from.machine.state_digest().unwrap(),
            to.machine.state_digest().unwrap(),
            "{standing:?}"
        );
        assert_eq!(from.machine.inputs(), to.machine.inputs());
        assert_eq!(from.machine.take_outputs(), to.machine.take_outputs());
        // What they do next is the same.
        for guest in [&mut from, &mut to] {
            guest.machine.vcpu().accepts_interrupt = true;
            guest.machine.apply(Input::Time { now_ns: 2_200_000 });
            guest.take_did();
            guest.machine.deliver_interrupt().unwrap();
            assert_eq!(guest.take_did(), [Did::Inject(0x30)]);
        }
    }
}

#[test]
fn a_state_is_taken_only_where_nothing_is_left_to_complete() {
    let mut guest = busy();
    let read = super::port_read(0x64);
    for exit in [read, Exit::Shutdown, Exit::Interrupted, Exit::WindowOpen] {
        assert!(guest.machine.save(Ordinal(1), exit).unwrap().is_none(), "{exit:?}");
    }
    assert!(guest.machine.save(Ordinal(1), Exit::Hlt).unwrap().is_some());
    assert!(Guest::without_log().machine.save(Ordinal(1), Exit::Hlt).unwrap().is_none());
}

#[test]
fn a_guest_without_a_log_takes_no_state() {
    let answer = Guest::without_log().machine.restore(&OUTLINE);
    assert!(matches!(answer, Err(StateError::NotTracked)));
}

#[test]
fn a_state_that_lost_a_page_is_refused_before_the_processor_is_set() {
    let (mut from, mut to) = (busy(), Guest::new());
    let parts = parts(&mut from, Exit::Hlt);
    to.machine.restore(&parts[0]).unwrap();
    let error = to.machine.restore(&parts[2]).unwrap_err();
    assert!(matches!(error, StateError::Digest { own: 0, theirs } if theirs != 0), "{error}");
    assert_eq!(to.take_did(), []);
    assert_eq!(to.machine.inputs(), 0);
}

#[test]
fn a_page_the_guest_does_not_have_is_named() {
    let mut guest = Guest::new();
    let page = [1; 4096];
    let packed = pack([(0x300, &page[..]), (0x400, &page), (0x401, &page)].into_iter());
    let error = guest.machine.restore(&StatePart::Pages(packed)).unwrap_err();
    let named = matches!(error, StateError::Memory(LoadError::NoSuchPage { page: 0x400 }));
    assert!(named, "{error}");
}

#[test]
fn damaged_parts_are_refused() {
    let mut guest = Guest::new();
    let pages = guest.machine.restore(&StatePart::Pages(vec![1, 2, 3]));
    assert!(matches!(pages, Err(StateError::Part(_))));
    let machine = guest.machine.restore(&StatePart::Machine(vec![1, 2, 3]));
    assert!(matches!(machine, Err(StateError::Damaged)));
    // The disk's blocks are another's business.
    assert_eq!(guest.machine.restore(&StatePart::Blocks(vec![1, 2, 3])).unwrap(), None);
}

#[test]
fn a_state_of_another_version_is_told_with_its_number() {
    let mut from = busy();
    let StatePart::Machine(mut bytes) = parts(&mut from, Exit::Hlt).remove(2) else { panic!() };
    bytes[0] += 1;
    let Err(error) = MachineState::decode(&bytes) else { panic!() };
    assert!(error.to_string().contains("version 5, this program reads 4"), "{error}");
}
