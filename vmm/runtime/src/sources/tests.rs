//! The order of the sources, and who hears of which answer.

use std::fs::File;
use std::io::{BufReader, Read};
use std::sync::Arc;
use std::time::Duration;

use ftvmm_host::clock::HostClock;
use ftvmm_host::resting_timer;
use ftvmm_host::user_file::open_shared;
use ftvmm_replication::{
    Event, GroupEncoder, LogReader, LogWriter, MemoryCheckMode, Record, SnapshotReader,
    SnapshotWriter,
};

use super::*;
use crate::input::{CheckPlan, GuestTimer, InputDelays, InputQueue};
use crate::peer::tests::backup_at;
use crate::testing::{Told, header};

const NO_CHECKS: CheckPlan = CheckPlan {
    every_exits: 0,
    memory_every_exits: 0,
    from: Ordinal(1),
    memory: MemoryCheckMode::Digest,
};

fn queue() -> Arc<InputQueue> {
    Arc::new(InputQueue::new(resting_timer().unwrap(), Duration::from_millis(1)))
}

fn live(queue: &Arc<InputQueue>) -> Source {
    let clock = HostClock::host_start();
    let timer = GuestTimer::new(resting_timer().unwrap());
    let delays = InputDelays::default();
    Source::Live(Box::new(LiveInputs::new(queue.clone(), clock, timer, delays)))
}

fn recording(horizon: u64, records: Vec<(u64, Event)>) -> Source {
    let mut encoder = GroupEncoder::new();
    for (at, event) in records {
        encoder.push(&Record { at: Ordinal(at), event });
    }
    let mut writer = LogWriter::new(Vec::new(), &header()).unwrap();
    writer.write_group(&encoder.finish(Ordinal(horizon))).unwrap();
    let log: Box<dyn Read> = Box::new(std::io::Cursor::new(writer.finish().unwrap()));
    let feed = FileFeed::new(LogReader::new(log).unwrap(), None, 0);
    Source::Recording(Box::new(Replay::new(feed)))
}

fn recorder(plan: CheckPlan) -> (Told, Option<Recorder>) {
    let told = Told::default();
    (told.clone(), Some(Recorder::new(None, Some(Box::new(told)), plan)))
}

/// A snapshot of a guest at exit 9.
fn snapshot() -> Option<Restore> {
    let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    let mut writer = SnapshotWriter::new(File::create(&path).unwrap(), &header()).unwrap();
    for part in [StatePart::Outline { total_bytes: 0 }, StatePart::Machine(vec![1])] {
        writer.write_part(&part).unwrap();
    }
    let reader =
        SnapshotReader::new(BufReader::new(open_shared("snapshot", &path).unwrap())).unwrap();
    Some(Restore::new(reader, None))
}

/// One of two hosts, whose session is over.
fn stopped_pair(queue: &Arc<InputQueue>) -> PairPort {
    let peer = backup_at(queue.clone(), None);
    peer.stop_now();
    PairPort::new(peer)
}

fn at(at: u64) -> RunSituation {
    RunSituation { at: Some(Ordinal(at)), last: Ordinal(at), ..RunSituation::default() }
}

fn time(now_ns: u64) -> Event {
    Event::Input(Input::Time { now_ns })
}

#[test]
fn the_guest_does_not_run_before_a_snapshot_is_in_place() {
    let queue = queue();
    queue.push_console(b"x");
    let (told, recorder) = recorder(NO_CHECKS);
    let mut inputs = Inputs::new(live(&queue)).recorded(recorder).restored(snapshot());
    let stands = [None, Some(Standpoint { at: Ordinal(9), guest_ns: 1 << 60 })];
    for stands in stands {
        assert_eq!(inputs.run_mode(Ordinal(0), false), RunMode::Not);
        let Ok(Step::RestoreState(part)) = inputs.next(&RunSituation::default()) else { panic!() };
        inputs.answer(Answer::Restored { part, stands }).unwrap();
    }
    assert!(told.take().is_empty(), "the log begins where the guest stands");
    let reads = RunSituation { reads_clock: true, ..at(9) };
    let Ok(Step::Apply(Input::Time { now_ns })) = inputs.next(&reads) else { panic!() };
    assert!(now_ns >= 1 << 60, "guest time goes on from where it was");
    assert!(matches!(inputs.next(&reads), Ok(Step::Apply(Input::ConsoleRx { .. }))));
    assert_eq!(told.take(), ["9 input", "9 input"]);
    assert_eq!(inputs.run_mode(Ordinal(9), false), RunMode::Free);
}

#[test]
fn a_pairs_roles_come_after_a_snapshot_and_before_the_source() {
    let queue = queue();
    let (told, recorder) = recorder(NO_CHECKS);
    let mut inputs = Inputs::new(live(&queue))
        .recorded(recorder)
        .paired(stopped_pair(&queue))
        .restored(snapshot());
    assert!(matches!(inputs.next(&at(1)), Ok(Step::RestoreState(_))));
    assert!(matches!(inputs.next(&at(1)), Ok(Step::RestoreState(_))));
    queue.push_console(b"x");
    let step = inputs.next(&at(1)).unwrap();
    assert!(matches!(step, Step::Stop(StopCause::Protocol)), "{step:?}");
    assert!(told.take().is_empty());
}

#[test]
fn a_replay_can_be_recorded_again_with_checks_of_its_own() {
    let plan = CheckPlan { every_exits: 2, memory_every_exits: 4, ..NO_CHECKS };
    let (told, recorder) = recorder(plan);
    let mut inputs = Inputs::new(recording(9, vec![(4, time(1))])).recorded(recorder);
    assert!(matches!(inputs.next(&at(4)), Ok(Step::Apply(Input::Time { now_ns: 1 }))));
    let step = inputs.next(&at(4)).unwrap();
    assert!(matches!(step, Step::Measure { memory: MemoryCheckMode::Digest }), "{step:?}");
    inputs.answer(Answer::Measured { at: Ordinal(4), check: Check::default() }).unwrap();
    assert!(matches!(inputs.next(&at(4)), Ok(Step::Proceed)));
    assert_eq!(told.take(), ["4 input", "4 check", "4 complete"]);
}

#[test]
fn a_check_that_differs_is_in_the_new_recording_too() {
    let check = Check { chain: 5, ..Check::default() };
    let (told, recorder) = recorder(NO_CHECKS);
    let log = recording(9, vec![(4, Event::Check(Box::new(check)))]);
    let mut inputs = Inputs::new(log).recorded(recorder);
    assert!(matches!(inputs.next(&at(4)), Ok(Step::Measure { .. })));
    let answer = Answer::Measured { at: Ordinal(4), check: Check::default() };
    assert!(matches!(inputs.answer(answer), Err(InputError::Divergence { at: 4, .. })));
    assert_eq!(told.take(), ["4 check"]);
}

#[test]
fn the_log_goes_out_before_a_halted_guest_waits() {
    let queue = queue();
    queue.push_console(b"x");
    let (told, recorder) = recorder(NO_CHECKS);
    let mut inputs = Inputs::new(live(&queue)).recorded(recorder);
    let halted = RunSituation { halted: true, ..at(3) };
    assert!(matches!(inputs.next(&halted), Ok(Step::Apply(Input::ConsoleRx { .. }))));
    assert_eq!(told.take(), ["idle", "3 input"]);
}

#[test]
fn a_replay_ends_where_its_recording_does() {
    let mut inputs = Inputs::new(recording(4, vec![]));
    assert!(matches!(inputs.next(&at(4)), Ok(Step::Proceed)));
    assert!(matches!(inputs.next(&at(5)), Ok(Step::Stop(StopCause::EndOfLog))));
    assert!(inputs.replayed().unwrap().feed().torn().is_none());
}
