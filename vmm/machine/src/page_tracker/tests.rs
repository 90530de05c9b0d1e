//! Trackers of plain memory, whose write log is kept by the test.

use std::cell::RefCell;

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MmapRegion};

use super::*;

const PAGE: u64 = PAGE_BYTES as u64;
/// Two regions; the second begins at page 1000.
const PAGES: [usize; 2] = [300, 3];
const SECOND: u64 = 1000;

/// Pages of each slot the guest wrote, and what was cleared, by slot and page.
#[derive(Default)]
struct FakeLog {
    written: RefCell<[Vec<u64>; 2]>,
    cleared: RefCell<Vec<(u32, usize)>>,
}

impl DirtyLog for Rc<FakeLog> {
    fn read(&self, slot: u32, memory_bytes: usize) -> Result<Vec<u64>, CpuError> {
        let mut bits = self.written.borrow()[slot as usize].clone();
        bits.resize((memory_bytes / PAGE_BYTES).div_ceil(64), 0);
        Ok(bits)
    }

    fn clear(&self, slot: u32, pages: u32, bits: &[u64]) -> Result<(), CpuError> {
        assert_eq!(pages as usize, PAGES[slot as usize]);
        for page in set_bits(bits) {
            self.cleared.borrow_mut().push((slot, page));
            self.written.borrow_mut()[slot as usize][page / 64] &= !(1 << (page % 64));
        }
        Ok(())
    }
}

/// A guest without a processor.
struct Guest {
    memory: Rc<Memory>,
    log: Rc<FakeLog>,
    tracker: PageTracker,
}

impl Guest {
    /// A guest whose kernel was loaded to page 2.
    fn loaded() -> Self {
        let [low, high] = PAGES.map(|pages| pages * PAGE_BYTES);
        let ranges = [(GuestAddress(0), low), (GuestAddress(SECOND * PAGE), high)];
        let memory = Rc::new(Memory::from_ranges(&ranges).unwrap());
        memory.write_slice(b"kernel", GuestAddress(2 * PAGE)).unwrap();
        let log = Rc::<FakeLog>::default();
        let tracker = PageTracker::new(Box::new(log.clone()), memory.clone()).unwrap();
        Self { memory, log, tracker }
    }

    /// The host writes for the guest, as a device does.
    fn host_writes(&self, page: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(page * PAGE + 100)).unwrap();
    }

    /// The guest's processor writes, of which only KVM's log knows.
    fn writes(&self, page: u64, bytes: &[u8]) {
        let (slot, index) = if page < SECOND { (0, page) } else { (1, page - SECOND) };
        let region: &GuestRegionMmap<AtomicBitmap> = self.memory.iter().nth(slot).unwrap();
        let region: &MmapRegion<AtomicBitmap> = region;
        let hosts = region.bitmap();
        let before = hosts.get_and_reset();
        self.host_writes(page, bytes);
        hosts.get_and_reset();
        for marked in set_bits(&before) {
            hosts.mark_dirty(marked * PAGE_BYTES, 1);
        }
        let written = &mut self.log.written.borrow_mut()[slot];
        written.resize(PAGES[slot].div_ceil(64), 0);
        written[index as usize / 64] |= 1 << (index % 64);
    }

    fn content(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for (start, pages) in [0, SECOND].into_iter().zip(PAGES) {
            let mut content = vec![0; pages * PAGE_BYTES];
            self.memory.read_slice(&mut content, GuestAddress(start * PAGE)).unwrap();
            all.extend(content);
        }
        all
    }

    /// Digest of memory and the pages that differ from the copy.
    fn check(&mut self, mode: MemoryCheckMode) -> (u64, Vec<u64>) {
        let check = self.tracker.check(mode).unwrap().unwrap();
        assert_eq!(check.renews_copy, mode == MemoryCheckMode::Renew);
        (check.digest, check.changed.iter().map(|change| change.page).collect())
    }
}

#[test]
fn a_digest_is_of_memory_alone_however_it_came_there() {
    let mut one = Guest::loaded();
    let (at_start, changed) = one.check(MemoryCheckMode::Digest);
    assert!(changed.is_empty(), "what was loaded is in the copy: {changed:?}");
    one.writes(5, b"abc");
    one.host_writes(SECOND + 1, b"xyz");
    one.check(MemoryCheckMode::Renew);
    let mut other = Guest::loaded();
    other.host_writes(5, b"abc");
    other.writes(SECOND + 1, b"xyz");
    assert_eq!(one.check(MemoryCheckMode::Digest).0, other.check(MemoryCheckMode::Digest).0);
    for guest in [&mut one, &mut other] {
        guest.writes(5, &[0; 3]);
        guest.writes(SECOND + 1, &[0; 3]);
        assert_eq!(guest.check(MemoryCheckMode::Digest).0, at_start);
    }
    assert!(one.tracker.check(MemoryCheckMode::None).unwrap().is_none());
}

#[test]
fn a_check_names_every_changed_page_until_the_copy_is_renewed() {
    let mut guest = Guest::loaded();
    guest.writes(3, b"by the guest");
    guest.host_writes(SECOND, b"by a device");
    // Written, and the same as before.
    guest.writes(4, &[0; 4]);
    let seen = guest.check(MemoryCheckMode::Digest);
    assert_eq!(seen.1, [3, SECOND]);
    assert_eq!(guest.check(MemoryCheckMode::Digest), seen, "checking changes nothing");
    assert_eq!(guest.check(MemoryCheckMode::Renew), seen);
    assert_eq!(guest.check(MemoryCheckMode::Renew), (seen.0, vec![]));
}

#[test]
fn a_slice_makes_another_guests_memory_the_same_and_undoes_what_it_did_itself() {
    let (mut recorder, mut replayer) = (Guest::loaded(), Guest::loaded());
    recorder.writes(3, b"mine");
    recorder.host_writes(SECOND + 2, b"a frame");
    replayer.writes(8, b"too early");
    replayer.host_writes(3, b"other");
    let (parts, digest) = recorder.tracker.capture().unwrap();
    let loaded = replayer.tracker.load(parts.iter().map(Vec::as_slice)).unwrap();
    assert_eq!(loaded, digest);
    assert!(recorder.content() == replayer.content());
    // Both copies are of this memory now: the next slice has only what comes after.
    recorder.writes(3, b"more");
    let (parts, digest) = recorder.tracker.capture().unwrap();
    assert_eq!(replayer.tracker.load(parts.iter().map(Vec::as_slice)).unwrap(), digest);
    assert!(recorder.content() == replayer.content());
}

#[test]
fn a_large_slice_comes_in_parts() {
    let mut recorder = Guest::loaded();
    let mut replayer = Guest::loaded();
    let mut rng = fastrand::Rng::with_seed(3);
    for page in 0..PAGES[0] as u64 {
        let noise: Vec<u8> = std::iter::repeat_with(|| rng.u8(1..)).take(3900).collect();
        recorder.writes(page, &noise);
    }
    let (parts, digest) = recorder.tracker.capture().unwrap();
    assert!(parts.len() > 1 && parts[0].len() < PART_BYTES + 2 * PAGE_BYTES, "{}", parts.len());
    assert_eq!(replayer.tracker.load(parts.iter().map(Vec::as_slice)).unwrap(), digest);
    assert!(recorder.content() == replayer.content());
}

#[test]
fn a_slice_of_a_larger_guest_is_refused() {
    let mut guest = Guest::loaded();
    let (mut deltas, content) = (PageDeltas::default(), vec![1; PAGE_BYTES]);
    for missing in [PAGES[0] as u64, SECOND - 1, SECOND + PAGES[1] as u64] {
        let whole = 0..PAGE_BYTES;
        deltas.push(missing, &content, std::slice::from_ref(&whole));
        let part = deltas.finish();
        match guest.tracker.load(std::iter::once(part.as_slice())) {
            Err(LoadError::NoSuchPage { page }) => assert_eq!(page, missing),
            other => panic!("{:?}", other.map_err(|error| error.to_string())),
        }
    }
}

#[test]
fn pages_are_protected_again_when_many_have_not_changed_for_long() {
    let mut guest = Guest::loaded();
    let count = COLD_PAGES_MIN as u64;
    for page in 10..10 + count {
        guest.writes(page, b"x");
    }
    // The first check finds them changed.
    for sync in 0..=UNCHANGED_SYNCS_MAX {
        assert!(guest.log.cleared.borrow().is_empty(), "sync {sync}");
        guest.writes(9, &[sync + 1]);
        guest.check(MemoryCheckMode::Renew);
    }
    let cleared: Vec<_> = guest.log.cleared.take();
    let wanted: Vec<_> = (10..10 + count as usize).map(|page| (0, page)).collect();
    assert_eq!(cleared, wanted, "page 9 is hot");
    // A write makes it known again.
    guest.writes(12, b"y");
    assert_eq!(guest.check(MemoryCheckMode::Renew).1, [12]);
}

#[test]
fn a_slice_takes_the_tlb_of_the_guest_by_clearing_the_coldest_page() {
    let mut guest = Guest::loaded();
    for page in [20, 21] {
        guest.writes(page, b"x");
    }
    guest.check(MemoryCheckMode::Renew);
    guest.writes(20, b"y");
    guest.check(MemoryCheckMode::Renew);
    assert!(guest.log.cleared.borrow().is_empty());
    guest.tracker.capture().unwrap();
    assert_eq!(guest.log.cleared.take(), [(0, 21)]);
    guest.tracker.renew_copy().unwrap();
    assert_eq!(guest.log.cleared.take(), [(0, 20)]);
}

#[test]
fn a_state_that_is_put_in_place_has_the_digest_of_its_source() {
    let mut source = Guest::loaded();
    source.writes(3, b"state");
    source.host_writes(SECOND + 2, b"more of it");
    let digest = source.tracker.renew_copy().unwrap();
    source.tracker.copy().begin_transfer();
    let pages = source.tracker.copy().take_unsent(usize::MAX);

    let mut target = Guest::loaded();
    target.writes(7, b"of its own");
    target.tracker.clear();
    assert!(target.content().iter().all(|byte| *byte == 0));
    for (page, content) in &pages {
        target.tracker.put(*page, content).unwrap();
    }
    assert_eq!(target.tracker.put_done().unwrap(), digest);
    assert!(target.content() == source.content());
    assert_eq!(target.check(MemoryCheckMode::Renew), (digest, vec![]));
    let error = target.tracker.put(SECOND - 1, &ZERO_PAGE).unwrap_err();
    assert!(matches!(error, LoadError::NoSuchPage { page } if page == SECOND - 1), "{error}");
}
