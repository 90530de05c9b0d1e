//! Where a replay begins: with the recording, or at a snapshot that was taken while it was made.

use std::io::Read;

use ftvmm_replication::{Event, FileHeader, LogError, LogReader, Ordinal, SnapshotMark, Start};
use ftvmm_runtime::snapshot::Snapshot;

use super::CommandError;
use super::args::ReplayArgs;
use super::recording::{damaged, open_log};

/// Where a replay begins.
pub struct ReplayStart {
    /// The snapshot, unless it is power-on.
    pub snapshot: Option<Snapshot>,
    /// So many of the recording's records are part of it.
    pub skip: u64,
}

/// A snapshot of which a recording knows.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    at: Ordinal,
    mark: SnapshotMark,
    /// Records before it, itself among them.
    skip: u64,
}

impl ReplayStart {
    /// What the arguments say of the recording with this header.
    ///
    /// # Errors
    /// When there is no such snapshot, or it cannot be used.
    pub fn of(args: &ReplayArgs, header: &FileHeader) -> Result<Self, CommandError> {
        let refused = |why| CommandError::Recording { path: args.file.clone(), why };
        let start = header.start.clone().map(|Start { at, snapshot }| Known {
            at,
            mark: snapshot,
            skip: 0,
        });
        let wanted = match args.from {
            None => start,
            Some(from) => {
                let mut reader = open_log(&args.file)?;
                let known = start.into_iter().map(Ok).chain(known(&mut reader));
                let known: Vec<_> = known.collect::<Result<_, _>>().map_err(damaged(&args.file))?;
                Some(last_before(known, Ordinal(from)).map_err(refused)?)
            }
        };
        let Some(Known { at, mark, skip }) = wanted else {
            return match args.snapshot {
                None => Ok(Self { snapshot: None, skip: 0 }),
                Some(_) => Err(refused(
                    "begins at power-on; to begin at a snapshot, say --from EXIT too".into(),
                )),
            };
        };
        if let Some(until) = args.until.filter(|until| *until < at.0) {
            return Err(refused(format!("--until {until} is before the snapshot of exit {at}")));
        }
        let snapshot = Snapshot::open(args.snapshot.as_deref().unwrap_or(mark.path.as_ref()))?;
        snapshot.expect(at, &mark)?;
        Ok(Self { snapshot: Some(snapshot), skip })
    }
}

/// Every snapshot that was taken while the recording was made.
fn known<R: Read>(reader: &mut LogReader<R>) -> impl Iterator<Item = Result<Known, LogError>> {
    let mut skip = 0;
    let groups = std::iter::from_fn(move || reader.next_group().transpose());
    groups.flat_map(move |group| {
        let records = match group {
            Ok(group) => group.records,
            Err(error) => return vec![Err(error)],
        };
        let known = records.into_iter().filter_map(|record| {
            skip += 1;
            match record.event {
                Event::Snapshot(mark) => Some(Ok(Known { at: record.at, mark, skip })),
                _ => None,
            }
        });
        known.collect()
    })
}

/// The last of them at or before an exit; an error says which there are.
fn last_before(known: Vec<Known>, from: Ordinal) -> Result<Known, String> {
    let all: Vec<_> = known.iter().map(|k| format!("{} ({})", k.at, k.mark.path)).collect();
    known.into_iter().rfind(|known| known.at <= from).ok_or_else(|| match all.as_slice() {
        [] => "no snapshot was taken while it was made".into(),
        all => format!("no snapshot at or before exit {from}; there are: {}", all.join(", ")),
    })
}

#[cfg(test)]
mod tests {
    use ftvmm_devices::Input;
    use ftvmm_replication::{GroupEncoder, LogWriter, Record};
    use ftvmm_runtime::testing::header;

    use super::*;

    fn mark(path: &str) -> SnapshotMark {
        SnapshotMark { path: path.into(), memory_digest: 1 }
    }

    /// Two snapshots among inputs, in two groups.
    fn log() -> Vec<u8> {
        let mut writer = LogWriter::new(Vec::new(), &header()).unwrap();
        let mut encoder = GroupEncoder::new();
        let at = |at, event| Record { at: Ordinal(at), event };
        let time = |now_ns| Event::Input(Input::Time { now_ns });
        encoder.push(&at(5, time(1000)));
        encoder.push(&at(5, Event::Snapshot(mark("/a"))));
        encoder.push(&at(5, time(2000)));
        writer.write_group(&encoder.finish(Ordinal(5))).unwrap();
        encoder.push(&at(9, Event::Snapshot(mark("/b"))));
        writer.write_group(&encoder.finish(Ordinal(9))).unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn the_last_snapshot_before_an_exit_is_found_with_its_place() {
        let log = log();
        let all = || known(&mut LogReader::new(&log[..]).unwrap()).map(Result::unwrap).collect();
        let first = Known { at: Ordinal(5), mark: mark("/a"), skip: 2 };
        let second = Known { at: Ordinal(9), mark: mark("/b"), skip: 4 };
        for (from, wanted) in [(5, &first), (8, &first), (9, &second), (100, &second)] {
            assert_eq!(last_before(all(), Ordinal(from)).as_ref(), Ok(wanted), "from {from}");
        }
        let none = last_before(all(), Ordinal(4)).unwrap_err();
        assert_eq!(none, "no snapshot at or before exit 4; there are: 5 (/a), 9 (/b)");
        let none = last_before(vec![], Ordinal(4)).unwrap_err();
        assert_eq!(none, "no snapshot was taken while it was made");
    }
}
