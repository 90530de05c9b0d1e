//! Slices: the state of a guest that makes no exits goes to another one.

use ftvmm_replication::{MemoryCheckMode, Slice};

use crate::exit::Exit;
use crate::machine_state::SliceState;
use crate::page_tracker::LoadError;
use crate::tests::{Did, Guest, copied};
use crate::virtual_machine::VirtualMachine;

/// Stops the guest in a computation and writes that down.
fn captured(guest: &mut Guest) -> Vec<Slice> {
    guest.writes(0x30_0008, b"computed");
    guest.machine.vcpu().state.get_mut().regs.rbx = 42;
    guest.machine.capture().unwrap()
}

#[test]
fn a_slice_puts_another_guest_into_the_same_state() {
    let (mut recorder, mut replay) = (Guest::new(), Guest::new());
    let parts = captured(&mut recorder);
    assert_eq!(parts.len(), 1);
    assert!(parts[0].is_last());
    assert_eq!(recorder.take_did(), [Did::Save]);
    // What the replay computed on its own way there is undone.
    replay.writes(0x30_2000, b"another way");
    replay.machine.load(&parts).unwrap();
    assert_eq!(replay.take_did(), [Did::Restore]);
    assert_eq!(replay.memory_bytes(0x30_0008), *b"computed");
    assert_eq!(replay.memory_bytes(0x30_2000), [0; 8]);
    assert_eq!(replay.machine.vcpu().state.borrow().regs.rbx, 42);
    assert_eq!((recorder.machine.slices(), replay.machine.slices()), (1, 1));
    let checks = [&mut recorder, &mut replay]
        .map(|guest| guest.machine.measure(MemoryCheckMode::Renew).unwrap());
    assert_eq!(checks[0], checks[1]);
    assert_eq!(recorder.machine.state_digest().unwrap(), replay.machine.state_digest().unwrap());
}

#[test]
fn a_big_slice_is_several_parts_and_the_last_has_the_processor() {
    let (mut recorder, mut replay) = (Guest::new(), Guest::new());
    recorder.writes(0x28_0000, &vec![7; 0x18_0000]);
    let parts = recorder.machine.capture().unwrap();
    assert!(parts.len() > 1, "{}", parts.len());
    let with_processor = parts.iter().filter(|part| part.cpu.is_some()).count();
    assert!(with_processor == 1 && parts[parts.len() - 1].is_last());
    replay.machine.load(&parts).unwrap();
    assert_eq!(replay.memory_bytes(0x3f_fff8), [7; 8]);
}

#[test]
fn a_slice_without_a_processor_is_refused_before_anything_is_done() {
    let (mut recorder, mut replay) = (Guest::new(), Guest::new());
    let mut parts = captured(&mut recorder);
    let cpu = parts[0].cpu.take();
    assert!(matches!(replay.machine.load(&parts), Err(LoadError::Processor)));
    assert!(matches!(replay.machine.load(&[]), Err(LoadError::Processor)));
    parts[0].cpu = cpu.map(|bytes| bytes[1..].to_vec());
    assert!(matches!(replay.machine.load(&parts), Err(LoadError::Processor)));
    assert_eq!((replay.take_did(), replay.machine.slices()), (vec![], 0));
    assert_eq!(replay.memory_bytes(0x30_0008), [0; 8]);
}

#[test]
fn memory_that_was_different_before_a_slice_is_told() {
    let (mut recorder, mut replay) = (Guest::new(), Guest::new());
    // The two agree on what they have, and it is not the same.
    replay.writes(0x30_2000, b"diverged");
    replay.machine.measure(MemoryCheckMode::Renew).unwrap();
    let parts = captured(&mut recorder);
    let error = replay.machine.load(&parts).unwrap_err();
    assert!(matches!(error, LoadError::Digest { own, theirs } if own != theirs), "{error}");
}

#[test]
fn a_slice_with_pages_the_guest_does_not_have_is_refused() {
    let (mut recorder, mut replay) = (Guest::new(), Guest::new());
    let mut parts = captured(&mut recorder);
    // Page 0x400 is the first behind 4 MiB; one run of no word.
    parts[0].pages = vec![0x80, 0x08, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    let error = replay.machine.load(&parts).unwrap_err();
    assert!(matches!(error, LoadError::NoSuchPage { page: 0x400 }), "{error}");
    parts[0].pages = vec![1];
    assert!(matches!(replay.machine.load(&parts), Err(LoadError::Pages(_))));
}

#[test]
fn a_guest_without_a_log_has_no_slices() {
    let mut guest = Guest::without_log();
    assert_eq!(guest.machine.capture().unwrap(), []);
    assert_eq!(guest.machine.slices(), 0);
    assert!(guest.machine.memory_copy().is_none());
    assert!(guest.machine.measure(MemoryCheckMode::Digest).unwrap().memory.is_none());
    // It can be given the processor of one.
    let vcpu = copied(&guest.machine.vcpu().state.borrow());
    let cpu = Some(SliceState { vcpu, memory_digest: 1 }.encode());
    guest.machine.load(&[Slice { pages: Vec::new(), cpu }]).unwrap();
    assert_eq!(guest.machine.slices(), 1);
}

#[test]
fn a_processor_that_cannot_be_saved_or_set_is_told() {
    let mut guest = Guest::new();
    guest.machine.vcpu().fails.set(Some("save"));
    assert!(guest.machine.capture().is_err());
    assert!(guest.machine.save(guest.at(), Exit::Hlt).is_err());
    guest.machine.vcpu().fails.set(None);
    let parts = captured(&mut guest);
    guest.machine.vcpu().fails.set(Some("restore"));
    assert!(matches!(guest.machine.load(&parts), Err(LoadError::Kvm(_))));
    guest.log.fails.set(true);
    assert!(guest.machine.measure(MemoryCheckMode::Digest).is_err());
    assert!(guest.machine.measure(MemoryCheckMode::None).is_ok(), "memory is left alone");
}

#[test]
fn a_check_names_what_the_processor_is_about_to_do() {
    let mut guest = Guest::new();
    guest.machine.vcpu().code = vec![0x0f, 0x0b];
    let check = guest.machine.measure(MemoryCheckMode::Digest).unwrap();
    assert_eq!(check.cpu.code, [0x0f, 0x0b]);
    assert_eq!(check.cpu.registers[16], crate::tests::ENTRY, "RIP");
    let memory = check.memory.unwrap();
    assert!(!memory.renews_copy && memory.changed.is_empty());
    guest.machine.vcpu().state.get_mut().debug.dr7 = 1;
    let other = guest.machine.measure(MemoryCheckMode::None).unwrap();
    assert!(other.cpu.digest != check.cpu.digest && other.memory.is_none());
}
