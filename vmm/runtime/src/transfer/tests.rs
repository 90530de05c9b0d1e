//! A whole transfer, from the sender's thread and the vCPU's to a destination, a file and back.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use ftvmm_devices::{DiskOp, DiskRequest};
use ftvmm_host::disk::{CompletionPolicy, DiskFile};
use ftvmm_host::folder::Folder;
use ftvmm_host::resting_timer;
use ftvmm_machine::page_tracker::testing::{copy, renew};
use ftvmm_machine::situation::RunSituation;
use ftvmm_replication::state::{BLOCK_BYTES, unpack_pages};
use ftvmm_replication::{Check, MemoryCheck, Ordinal, PAGE_BYTES, StatePart};

use super::*;
use crate::snapshot::Snapshot;
use crate::step::Step;
use crate::testing::{Fake, NoDisplay, header};

/// The exit at which the guest is halted.
const AT: Ordinal = Ordinal(7);
/// The last block of the disk is a short one.
const DISK_BYTES: usize = 3 * BLOCK_BYTES + 512;
/// What the guest writes to page 1 and to its disk while its state is sent.
const LATE: u8 = 9;

/// A guest with six pages of memory and a disk full of ones, and what its thread is woken by.
struct Source {
    transfer: Arc<Transfer>,
    progress: ProgressCell,
    disk: Arc<Disk>,
    folder: tempfile::TempDir,
    /// The folder for snapshots.
    held: Folder,
    woken: Receiver<()>,
}

fn source() -> Source {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk");
    std::fs::File::create(&image).unwrap().write_all(&[1; DISK_BYTES]).unwrap();
    let disk = Disk::start(DiskFile::open(&image).unwrap(), CompletionPolicy::Immediate).unwrap();
    let queue = InputQueue::new(resting_timer().unwrap(), Duration::from_millis(1));
    let clock = HostClock::host_start();
    let transfer =
        Transfer::new(Arc::new(copy()), Some(disk.clone()), Arc::new(queue), clock, header());
    let (wake, woken) = channel();
    let wake = Mutex::new(wake);
    // The vCPU's thread may have given all it is asked for.
    transfer.wakes_with(move || {
        let _ = sync::lock(&wake).send(());
    });
    let progress = ProgressCell::new(clock, Box::new(NoDisplay));
    let held = Folder::open(folder.path()).unwrap();
    Source { transfer: Arc::new(transfer), progress, disk, folder, held, woken }
}

impl Source {
    /// The vCPU's thread: halted at [`AT`], it changes a page and a block before the first sync,
    /// and gives its state. What is put into its log then.
    fn guest(&mut self) -> JoinHandle<Option<SnapshotMark>> {
        let (transfer, disk) = (self.transfer.clone(), self.disk.clone());
        let woken = std::mem::replace(&mut self.woken, channel().1);
        std::thread::spawn(move || {
            let mut port = TransferPort::new(transfer.clone());
            let situation = RunSituation { at: Some(AT), halted: true, ..RunSituation::default() };
            let mut changes =
                Some(DiskRequest { id: 3, op: DiskOp::Write { sector: 0, data: vec![LATE; 512] } });
            for () in woken {
                while let Some(step) = port.wanted(&situation) {
                    match step {
                        Step::Measure { .. } => {
                            if let Some(request) = changes.take() {
                                renew(&transfer.copy, LATE);
                                disk.submit(request);
                            }
                            port.measured(AT, &renewing());
                        }
                        Step::SaveState => return port.saved(Fake::state(AT)).unwrap(),
                        step => panic!("{step:?}"),
                    }
                }
            }
            panic!("the guest was not stopped");
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// A check of memory that renewed the copy.
fn renewing() -> Check {
    let memory = MemoryCheck { digest: 0, changed: vec![], renews_copy: true };
    Check { memory: Some(memory), ..Check::default() }
}

/// What the guest's disk holds in the end.
fn written_disk() -> Vec<u8> {
    [vec![LATE; 512], vec![1; DISK_BYTES - 512]].concat()
}

/// What the guest's memory holds in the end, by page.
fn written_pages() -> BTreeMap<u64, Vec<u8>> {
    [(1, LATE), (101, 7)].map(|(page, byte)| (page, vec![byte; PAGE_BYTES])).into()
}

/// Keeps what it is given; takes so many parts.
struct Kept {
    parts: Mutex<Vec<StatePart>>,
    parts_max: usize,
    last: Mutex<Option<FinalState>>,
}

impl Kept {
    fn new(parts_max: usize) -> Arc<Self> {
        Arc::new(Self { parts: Mutex::default(), parts_max, last: Mutex::default() })
    }
}

impl Destination for Kept {
    fn part(&self, part: StatePart) -> bool {
        let mut parts = sync::lock(&self.parts);
        parts.push(part);
        parts.len() <= self.parts_max
    }

    fn finish(&self, last: FinalState) -> Option<SnapshotMark> {
        *sync::lock(&self.last) = Some(last);
        Some(SnapshotMark { path: "/kept".into(), memory_digest: 5 })
    }
}

/// The pages in `parts`; a later one replaces an earlier one.
fn pages<'a>(parts: impl IntoIterator<Item = &'a StatePart>) -> BTreeMap<u64, Vec<u8>> {
    let mut pages = BTreeMap::new();
    for part in parts {
        if let StatePart::Pages(packed) = part {
            unpack_pages(packed, |page, content| drop(pages.insert(page, content.to_vec())))
                .unwrap();
        }
    }
    pages
}

#[test]
fn what_the_guest_changes_while_its_state_is_sent_arrives_as_it_is_at_the_stop() {
    let mut source = source();
    let guest = source.guest();
    let kept = Kept::new(usize::MAX);
    let summary = send_state(&source.transfer, kept.clone(), &source.progress).unwrap();
    let mark = guest.join().unwrap().unwrap();
    assert_eq!((mark.path.as_str(), mark.memory_digest), ("/kept", 5));
    assert_eq!(summary.at, AT);

    let last = kept.last.lock().unwrap().take().unwrap();
    assert_eq!((last.machine.at, last.disk_through), (AT, 3));
    let mut parts = std::mem::take(&mut *kept.parts.lock().unwrap());
    let total_bytes = (2 * PAGE_BYTES + DISK_BYTES) as u64;
    assert_eq!(parts[0], StatePart::Outline { total_bytes });
    // The answer the guest has not had goes with the machine.
    assert_eq!(last.machine.disk_answers.iter().map(|a| a.id).collect::<Vec<_>>(), [3]);
    parts.extend(final_parts(&last));
    parts.push(StatePart::Machine(last.machine.encode()));
    assert_eq!(pages(&parts), written_pages());

    let copy = source.path("copy");
    let file = DiskFile::create(&copy, DISK_BYTES as u64).unwrap();
    let disk = Disk::start(file, CompletionPolicy::Immediate).unwrap();
    parts.iter().for_each(|part| put_on_disk(&disk, part).unwrap());
    assert!(std::fs::read(&copy).unwrap() == written_disk());
    assert_eq!(disk.take(3).map(|answer| answer.id), Some(3), "the guest gets its answer here");
}

#[test]
fn a_destination_that_wants_no_more_ends_the_transfer_and_the_guest_is_not_stopped() {
    for parts_max in 0..3 {
        let source = source();
        let kept = Kept::new(parts_max);
        assert!(send_state(&source.transfer, kept.clone(), &source.progress).is_none());
        assert_eq!(kept.parts.lock().unwrap().len(), parts_max + 1);
        assert!(!source.transfer.wants_stop());
        renew(&source.transfer.copy, LATE);
        assert_eq!(source.transfer.copy.unsent_pages(), 0, "nothing is tracked any more");
    }
}

#[test]
fn a_guest_that_nobody_wants_gives_nothing() {
    let source = source();
    let mut port = TransferPort::new(source.transfer.clone());
    let situation = RunSituation { at: Some(AT), halted: true, ..RunSituation::default() };
    assert!(port.wanted(&situation).is_none());
    assert!(port.saved(Fake::state(AT)).unwrap().is_none());
}

#[test]
fn a_snapshot_is_restored_as_the_guest_was() {
    let mut source = source();
    let guest = source.guest();
    let path = source.path("snapshot");
    let saved = save(&source.transfer, &source.progress, &source.held, &path).unwrap();
    let mark = guest.join().unwrap().unwrap();
    assert_eq!((saved.at, saved.bytes), (AT, std::fs::metadata(&path).unwrap().len()));
    assert_eq!(mark.path, path.to_string_lossy());
    assert!(!source.path("snapshot.partial").exists());

    let snapshot = Snapshot::open(&path).unwrap();
    assert_eq!((snapshot.path(), snapshot.start().at), (path.as_path(), AT));
    assert_eq!(*snapshot.header(), header());
    snapshot.expect(AT, &mark).unwrap();
    let other = SnapshotMark { memory_digest: 1, ..mark.clone() };
    for (at, mark) in [(Ordinal(8), &mark), (AT, &other)] {
        let error = snapshot.expect(at, mark).unwrap_err().to_string();
        assert!(error.contains("is of exit 7, memory 0000000000000000;"), "{error}");
    }

    let copy = source.path("copy");
    let file = DiskFile::create(&copy, DISK_BYTES as u64).unwrap();
    let disk = Disk::start(file, CompletionPolicy::Immediate).unwrap();
    let mut restore = Restore::new(snapshot.into_parts(), Some(disk));
    let mut parts = Vec::new();
    while let Some(step) = restore.next_step().unwrap() {
        let Step::RestoreState(part) = step else { panic!("{step:?}") };
        parts.push(part);
    }
    assert_eq!(pages(&parts), written_pages());
    assert!(std::fs::read(&copy).unwrap() == written_disk());
    let last = parts.last().unwrap();
    assert!(matches!(last, StatePart::Machine(_)), "{last:?}");
}

#[test]
fn a_snapshot_replaces_no_file_and_waits_for_no_guest_that_has_ended() {
    let source = source();
    let path = source.path("disk");
    let error = save(&source.transfer, &source.progress, &source.held, &path).unwrap_err();
    assert!(matches!(error, SaveError::Exists { .. }), "{error}");
    let saving = sync::lock(&source.transfer.saving);
    let busy =
        save(&source.transfer, &source.progress, &source.held, &source.path("new")).unwrap_err();
    assert!(matches!(busy, SaveError::Busy), "{busy}");
    drop(saving);
    source.transfer.end();
    let error =
        save(&source.transfer, &source.progress, &source.held, &source.path("new")).unwrap_err();
    assert!(matches!(error, SaveError::NotStopped), "{error}");
    assert!(!source.path("new").exists() && !source.path("new.partial").exists());
    assert_eq!(std::fs::read(&path).unwrap(), [1; DISK_BYTES]);
}

#[test]
fn a_guest_that_ends_while_its_state_is_sent_leaves_no_snapshot() {
    let mut source = source();
    let woken = std::mem::replace(&mut source.woken, channel().1);
    let transfer = source.transfer.clone();
    let guest = std::thread::spawn(move || {
        woken.recv().unwrap();
        transfer.rendezvous.end();
    });
    let path = source.path("snapshot");
    let error = save(&source.transfer, &source.progress, &source.held, &path).unwrap_err();
    guest.join().unwrap();
    assert!(matches!(error, SaveError::NotStopped), "{error}");
    assert!(!path.exists() && !source.path("snapshot.partial").exists());
}

#[test]
fn a_snapshot_lies_in_the_folder_that_is_held_wherever_that_is_now_and_nowhere_else() {
    let mut source = source();
    let [before, after] = ["before", "after"].map(|name| source.path(name));
    std::fs::create_dir(&before).unwrap();
    source.held = Folder::open(&before).unwrap();
    let ask = |source: &Source, path: &Path| {
        save(&source.transfer, &source.progress, &source.held, path).map_err(|e| e.to_string())
    };
    for elsewhere in ["snapshot", "/snapshot", "before/../snapshot"] {
        let path = source.path(elsewhere);
        let error = ask(&source, &path).unwrap_err();
        assert!(
            error.contains(&format!("is not in the folder for snapshots, '{}'", before.display()))
        );
        assert!(error.contains("--snapshot-dir") && !error.contains('\n'), "{error}");
        assert!(!path.exists());
    }
    let error = ask(&source, &before.join(OsStr::from_bytes(&[b'x'; 250]))).unwrap_err();
    assert!(error.contains("no file name"), "with .partial it is too long: {error}");

    std::fs::rename(&before, &after).unwrap();
    let guest = source.guest();
    ask(&source, &before.join("snapshot")).unwrap();
    guest.join().unwrap().unwrap();
    assert_eq!(Snapshot::open(&after.join("snapshot")).unwrap().start().at, AT);
    assert_eq!(std::fs::read_dir(&after).unwrap().count(), 1);
    assert!(!before.exists());
    // A folder that has taken its name is another one.
    std::fs::create_dir(&before).unwrap();
    let error = ask(&source, &before.join("second")).unwrap_err();
    assert!(error.contains("is not in the folder"), "{error}");
    let error = ask(&source, &after.join("snapshot")).unwrap_err();
    assert!(error.contains("is there already"), "{error}");
}
