//! The tracker on a log the test writes: what it reports, what it clears, and that two trackers
//! agree.

use std::rc::Rc;

use ftvmm_replication::{MemoryCheckMode, PAGE_BYTES};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::tests::{FakeLog, guest_writes};

const PAGE: u64 = PAGE_BYTES as u64;
/// Two regions of 200 pages; the second begins at page 0x200.
const SECOND: u64 = 0x200 * PAGE;
const REGION_PAGES: usize = 200;

struct World {
    memory: Rc<Memory>,
    log: FakeLog,
    tracker: PageTracker,
}

impl World {
    fn new() -> Self {
        Self::loaded(|_| {})
    }

    /// Memory that `load` puts something into before the guest runs.
    fn loaded(load: impl FnOnce(&Memory)) -> Self {
        let bytes = REGION_PAGES * PAGE_BYTES;
        let ranges = [(GuestAddress(0), bytes), (GuestAddress(SECOND), bytes)];
        let memory = Rc::new(Memory::from_ranges(&ranges).unwrap());
        load(&memory);
        let log = FakeLog::default();
        let tracker = PageTracker::new(Box::new(log.clone()), memory.clone()).unwrap();
        Self { memory, log, tracker }
    }

    fn guest_writes(&self, address: u64, bytes: &[u8]) {
        guest_writes(&self.memory, &self.log, address, bytes);
    }

    fn program_writes(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn check(&mut self, mode: MemoryCheckMode) -> MemoryCheck {
        self.tracker.check(mode).unwrap().unwrap()
    }

    /// The pages that a check with a digest names.
    fn changed(&mut self) -> Vec<u64> {
        self.check(MemoryCheckMode::Digest).changed.iter().map(|page| page.page).collect()
    }

    /// What was cleared since the last call.
    fn cleared(&self) -> Vec<(u32, Vec<usize>)> {
        self.log.cleared.take()
    }
}

#[test]
fn what_the_guest_and_this_program_wrote_is_named_until_the_copy_is_renewed() {
    let mut world = World::new();
    assert_eq!(world.changed(), [0; 0]);
    world.guest_writes(PAGE, &[1]);
    world.program_writes(SECOND + 2 * PAGE, &[2]);
    for _ in 0..2 {
        assert_eq!(world.changed(), [1, 0x202], "a digest leaves everything as it was");
    }
    let digest = world.check(MemoryCheckMode::Digest).digest;
    let renewed = world.check(MemoryCheckMode::Renew);
    assert_eq!((renewed.digest, renewed.changed.len(), renewed.renews_copy), (digest, 2, true));
    let after = world.check(MemoryCheckMode::Digest);
    assert_eq!((after.digest, after.changed.len(), after.renews_copy), (digest, 0, false));
    assert!(world.tracker.check(MemoryCheckMode::None).unwrap().is_none());
}

#[test]
fn a_page_that_was_written_and_is_the_same_is_not_named() {
    let mut world = World::new();
    world.guest_writes(PAGE, &[0]);
    world.guest_writes(2 * PAGE, &[5]);
    world.guest_writes(2 * PAGE, &[0]);
    assert_eq!(world.check(MemoryCheckMode::Digest), World::new().check(MemoryCheckMode::Digest));
}

#[test]
fn what_was_loaded_is_in_the_copy_from_the_start() {
    let load = |memory: &Memory| memory.write_slice(&[1; 100], GuestAddress(PAGE - 50)).unwrap();
    let mut world = World::loaded(load);
    assert_eq!(world.changed(), [0; 0]);
    // The digest is that of a memory that came to the same content in another way.
    let mut other = World::new();
    other.guest_writes(PAGE - 50, &[1; 100]);
    let digest = other.check(MemoryCheckMode::Renew).digest;
    assert_eq!(world.check(MemoryCheckMode::Digest).digest, digest);
    assert_eq!(world.tracker.copy().begin_transfer(), 2);
}

#[test]
fn the_digest_knows_what_is_where() {
    let digest = |address, bytes: &[u8]| {
        let mut world = World::new();
        world.guest_writes(address, bytes);
        world.check(MemoryCheckMode::Digest).digest
    };
    let digests = [
        digest(0, &[0]),
        digest(0, &[1]),
        digest(8, &[1]),
        digest(PAGE, &[1]),
        digest(SECOND, &[1]),
    ];
    for (number, one) in digests.iter().enumerate() {
        assert!(!digests[..number].contains(one), "{digests:x?}");
    }
    let mut back = World::new();
    back.guest_writes(0, &[1]);
    back.check(MemoryCheckMode::Renew);
    back.guest_writes(0, &[0]);
    assert_eq!(back.check(MemoryCheckMode::Renew).digest, digests[0]);
}

#[test]
fn changes_of_one_memory_bring_another_to_the_same() {
    let (mut from, mut to) = (World::new(), World::new());
    from.guest_writes(0, b"first region");
    from.guest_writes(SECOND + 5, b"second region");
    let (parts, digest) = from.tracker.capture().unwrap();
    // Whatever the other did since the last copy is undone.
    to.guest_writes(4, b"wrong");
    to.program_writes(SECOND + PAGE, b"wrong");
    let loaded = to.tracker.load(parts.iter().map(Vec::as_slice)).unwrap();
    assert_eq!(loaded, digest);
    assert_eq!(to.check(MemoryCheckMode::Digest), from.check(MemoryCheckMode::Digest));
    assert_eq!(to.memory.read_obj::<u64>(GuestAddress(SECOND + PAGE)).unwrap(), 0);
    assert_eq!(&to.memory.read_obj::<[u8; 5]>(GuestAddress(0)).unwrap(), b"first");
}

#[test]
fn at_a_slice_a_guest_loses_its_tlb_and_at_a_check_it_does_not() {
    let mut world = World::new();
    world.guest_writes(PAGE, &[1]);
    world.guest_writes(2 * PAGE, &[1]);
    world.check(MemoryCheckMode::Renew);
    assert_eq!(world.cleared(), []);
    // Page 2 has not changed since, so it is given to the call that flushes.
    world.guest_writes(PAGE, &[2]);
    world.tracker.capture().unwrap();
    assert_eq!(world.cleared(), [(0, vec![2])]);
    assert!(world.log.has(0, 1) && !world.log.has(0, 2));
    world.tracker.load(std::iter::empty()).unwrap();
    assert_eq!(world.cleared(), [(0, vec![1])]);
    world.guest_writes(SECOND, &[1]);
    world.tracker.renew_copy().unwrap();
    assert_eq!(world.cleared(), [(1, vec![0])]);
    // Nothing is marked: there is nothing to clear, and nothing in the TLB.
    world.tracker.renew_copy().unwrap();
    assert_eq!(world.cleared(), []);
}

#[test]
fn pages_are_protected_when_many_have_not_changed_for_long() {
    let mut world = World::new();
    for page in 0..COLD_PAGES_MIN as u64 {
        world.guest_writes(page * PAGE, &[1]);
    }
    // The check that sees the change, then so many that see none.
    for check in 0..u64::from(UNCHANGED_SYNCS_MAX) {
        world.guest_writes(100 * PAGE, &check.to_le_bytes());
        world.check(MemoryCheckMode::Renew);
        assert_eq!(world.cleared(), [], "check {check}");
    }
    world.check(MemoryCheckMode::Renew);
    let cold: Vec<usize> = (0..COLD_PAGES_MIN).collect();
    assert_eq!(world.cleared(), [(0, cold)]);
    assert!(world.log.has(0, 100), "it changed not long ago");
    // The next write is seen again.
    world.guest_writes(3 * PAGE, &[2]);
    assert_eq!(world.changed(), [3]);
    // And has to wait as long again.
    for page in 0..COLD_PAGES_MIN as u64 {
        world.guest_writes(page * PAGE, &[1]);
    }
    world.check(MemoryCheckMode::Renew);
    assert_eq!(world.cleared(), []);
}

#[test]
fn a_few_cold_pages_are_not_worth_a_call() {
    let mut world = World::new();
    for page in 0..COLD_PAGES_MIN as u64 - 1 {
        world.guest_writes(page * PAGE, &[1]);
    }
    for _ in 0..=2 * u32::from(UNCHANGED_SYNCS_MAX) {
        world.check(MemoryCheckMode::Renew);
    }
    assert_eq!(world.cleared(), []);
}

#[test]
fn a_copy_that_is_renewed_is_sent_again() {
    let mut world = World::new();
    world.tracker.copy().begin_transfer();
    world.guest_writes(PAGE, &[1]);
    assert_eq!(world.tracker.copy().unsent_pages(), 0, "it is not in the copy yet");
    world.tracker.renew_copy().unwrap();
    let sent = world.tracker.copy().take_unsent(usize::MAX);
    assert_eq!(sent.len(), 1);
    assert_eq!((sent[0].0, sent[0].1[0]), (1, 1));
}

#[test]
fn a_page_outside_of_memory_is_refused() {
    let mut world = World::new();
    let page = [1; PAGE_BYTES];
    for number in [REGION_PAGES as u64, 0x1ff, 0x200 + REGION_PAGES as u64, u64::MAX] {
        let refused = world.tracker.put(number, &page);
        assert!(matches!(refused, Err(LoadError::NoSuchPage { page }) if page == number));
    }
    world.tracker.put(0x200 + REGION_PAGES as u64 - 1, &page).unwrap();
    assert_ne!(world.tracker.put_done().unwrap(), 0);
}

#[test]
fn memory_that_was_cleared_and_put_is_as_if_it_had_been_computed() {
    let (mut computed, mut put) = (World::new(), World::new());
    computed.guest_writes(SECOND, &[7; PAGE_BYTES]);
    let digest = computed.tracker.renew_copy().unwrap();
    put.guest_writes(0, &[1]);
    put.tracker.renew_copy().unwrap();
    put.guest_writes(PAGE, &[2]);
    put.tracker.copy().begin_transfer();
    put.tracker.copy().take_unsent(usize::MAX);
    put.tracker.clear();
    put.tracker.put(0x200, &[7; PAGE_BYTES]).unwrap();
    put.cleared();
    assert_eq!(put.tracker.put_done().unwrap(), digest);
    assert_eq!(put.cleared(), [(0, vec![1])], "the guest loses its TLB");
    assert_eq!(put.check(MemoryCheckMode::Digest), computed.check(MemoryCheckMode::Digest));
    assert_eq!(put.memory.read_obj::<u8>(GuestAddress(PAGE)).unwrap(), 0);
    let sent = put.tracker.copy().take_unsent(usize::MAX);
    assert_eq!(sent.iter().map(|(page, _)| *page).collect::<Vec<_>>(), [0, 0x200]);
}

#[test]
fn a_log_that_cannot_be_read_is_told() {
    let mut world = World::new();
    world.log.fails.set(true);
    assert!(world.tracker.check(MemoryCheckMode::Digest).is_err());
    assert!(world.tracker.check(MemoryCheckMode::Renew).is_err());
    assert!(world.tracker.capture().is_err());
    assert!(matches!(world.tracker.load(std::iter::empty()), Err(LoadError::Kvm(_))));
    assert!(world.tracker.put_done().is_err());
}

#[test]
fn a_large_slice_comes_in_parts() {
    let (mut recorder, mut replayer) = (World::new(), World::new());
    let mut rng = fastrand::Rng::with_seed(3);
    for page in 0..REGION_PAGES as u64 {
        for region in [0, SECOND] {
            let noise: Vec<u8> = std::iter::repeat_with(|| rng.u8(1..)).take(3900).collect();
            recorder.guest_writes(region + page * PAGE, &noise);
        }
    }
    let (parts, digest) = recorder.tracker.capture().unwrap();
    assert!(parts.len() > 1 && parts[0].len() < PART_BYTES + 2 * PAGE_BYTES, "{}", parts.len());
    assert_eq!(replayer.tracker.load(parts.iter().map(Vec::as_slice)).unwrap(), digest);
}
