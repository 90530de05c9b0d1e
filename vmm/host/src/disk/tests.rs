//! The worker against a model, and what a copy of a disk in use relies on.

use std::sync::mpsc;

use ftvmm_devices::ZeroRange;

use super::*;

const SIZE_BYTES: u64 = 40 * BLOCK_BYTES + 512;

fn disk(policy: CompletionPolicy) -> (Arc<Disk>, tempfile::NamedTempFile) {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(SIZE_BYTES).unwrap();
    (Disk::start(DiskFile::open(image.path()).unwrap(), policy).unwrap(), image)
}

fn write(id: u64, sector: u64, tag: u8, sectors: usize) -> DiskRequest {
    DiskRequest { id, op: DiskOp::Write { sector, data: vec![tag; sectors * 512] } }
}

fn random_request(rng: &mut fastrand::Rng, id: u64) -> DiskRequest {
    let sector = rng.u64(..SIZE_BYTES / 512);
    let left = SIZE_BYTES / 512 - sector;
    let sectors = rng.u64(1..=left.min(300));
    match rng.u8(..8) {
        0..4 => write(id, sector, rng.u8(..), sectors as usize),
        4..6 => {
            let length_bytes = sectors as u32 * 512;
            DiskRequest { id, op: DiskOp::Read { sector, length_bytes } }
        }
        6 => {
            let sector_count = sectors as u32;
            let ranges = vec![ZeroRange { sector, sector_count, unmap: rng.bool() }];
            DiskRequest { id, op: DiskOp::Zero { ranges } }
        }
        _ => DiskRequest { id, op: DiskOp::Flush },
    }
}

/// What the request reads from `model`, which it changes.
fn modelled(model: &mut [u8], op: &DiskOp) -> Vec<u8> {
    if let DiskOp::Read { sector, length_bytes } = op {
        return model[*sector as usize * 512..][..*length_bytes as usize].to_vec();
    }
    for bytes in written(op) {
        let part = &mut model[bytes.start as usize..bytes.end as usize];
        match op {
            DiskOp::Write { data, .. } => part.copy_from_slice(data),
            _ => part.fill(0),
        }
    }
    Vec::new()
}

#[test]
fn requests_are_carried_out_in_order() {
    let mut rng = fastrand::Rng::with_seed(7);
    for _ in 0..20 {
        let (disk, _image) = disk(CompletionPolicy::Immediate);
        let mut model = vec![0; SIZE_BYTES as usize];
        let mut expected = Vec::new();
        for id in 1..=100 {
            let request = random_request(&mut rng, id);
            expected.push((id, modelled(&mut model, &request.op)));
            disk.submit(request);
        }
        let data = |completion: &Completion| match &completion.outcome {
            DiskOutcome::Done { data } => (completion.id, data.clone()),
            DiskOutcome::Failed => panic!("{completion:?}"),
        };
        assert_eq!(disk.drain().iter().map(data).collect::<Vec<_>>(), expected);
        let taken = std::iter::from_fn(|| disk.take_completed()).map(|completion| completion.id);
        assert!(taken.eq(1..=100));
        let blocks = (0..block_count(SIZE_BYTES)).map(|index| disk.read_block(index).unwrap());
        assert!(blocks.flatten().eq(model));
    }
}

#[test]
fn a_copy_made_while_the_guest_writes_is_equal_in_the_end() {
    let mut rng = fastrand::Rng::with_seed(11);
    let (from, _from_image) = disk(CompletionPolicy::Immediate);
    let (to, _to_image) = disk(CompletionPolicy::Immediate);
    from.submit(write(1, 0, 1, 500));
    from.note_changes(true);
    for id in 2..1000 {
        from.submit(random_request(&mut rng, id));
    }
    let copy = |blocks: Vec<u64>| {
        for index in blocks {
            to.write_block(index, &from.read_block(index).unwrap()).unwrap();
        }
    };
    copy((0..block_count(SIZE_BYTES)).collect());
    copy(from.take_changed());
    from.drain();
    copy(from.take_changed());
    to.sync().unwrap();
    from.note_changes(false);
    assert!(from.take_changed().is_empty());
    for index in 0..block_count(SIZE_BYTES) {
        assert_eq!(from.read_block(index).unwrap(), to.read_block(index).unwrap(), "{index}");
    }
    assert!(to.write_block(0, &[0; 512]).is_err());
    assert!(to.write_block(block_count(SIZE_BYTES), &[0; 512]).is_err());
}

#[test]
fn an_answer_waits_for_leave_to_be_told() {
    let (disk, _image) = disk(CompletionPolicy::Gated);
    let (sender, completions) = mpsc::channel();
    disk.on_completion(move |completion| sender.send(completion.id).unwrap());
    for id in 1..=3 {
        disk.submit(write(id, 0, 1, 1));
        assert_eq!(completions.recv().unwrap(), id);
    }
    assert_eq!(disk.take_completed(), None);
    disk.complete(2);
    disk.complete(9);
    assert_eq!(disk.take_completed().unwrap().id, 2);
    assert_eq!(disk.take_completed(), None);
    assert_eq!(disk.take(3).unwrap().id, 3, "a follower needs no leave");
    assert_eq!(disk.take(3), None);

    let undelivered = disk.drain();
    assert_eq!(undelivered.iter().map(|completion| completion.id).collect::<Vec<_>>(), [1]);
    let (other, _image) = self::disk(CompletionPolicy::Gated);
    other.resume_with(undelivered.clone());
    assert!(other.has_request(1) && !other.has_request(2) && disk.has_request(3));
    assert_eq!(other.take_completed().as_ref(), undelivered.first());
}

#[test]
fn a_failure_names_the_request_and_its_sector() {
    let (disk, image) = disk(CompletionPolicy::Immediate);
    image.as_file().set_len(512).unwrap();
    disk.submit(DiskRequest { id: 4, op: DiskOp::Read { sector: 7, length_bytes: 512 } });
    let [completion] = &disk.drain()[..] else { panic!() };
    assert_eq!(completion.outcome, DiskOutcome::Failed);
    assert!(completion.failure().unwrap().starts_with("request 4 at sector 7: "));
}
