//! Any source, of a guest that is first put into the state of a snapshot.

use std::sync::Arc;

use ftvmm_replication::{Check, Ordinal, Slice, SnapshotMark, StatePart};

use super::InputError;
use crate::disk::Disk;
use crate::machine_state::MachineState;
use crate::run_loop::{InputSource, RunMode, Situation, Step};
use crate::shipment::put_on_disk;
use crate::snapshot::Parts;

/// See the module documentation.
pub struct Restored<S> {
    source: S,
    /// What is still to be put in place.
    parts: Option<Parts>,
    disk: Option<Arc<Disk>>,
}

impl<S: InputSource> Restored<S> {
    /// `source`, after `parts` if there are any; what they hold of the disk goes to `disk`, which a replay does without.
    pub fn new(source: S, parts: Option<Parts>, disk: Option<Arc<Disk>>) -> Self {
        Self { source, parts, disk }
    }

    /// The source under it, when the run has ended.
    pub fn into_source(self) -> S {
        self.source
    }
}

impl<S: InputSource> InputSource for Restored<S> {
    fn next(&mut self, situation: &Situation) -> Result<Step, InputError> {
        let read = |parts: &mut Parts| parts.next_part();
        let part = self.parts.as_mut().map(read).transpose();
        let Some(part) = part.map_err(|source| InputError::SnapshotRead { source })?.flatten()
        else {
            return self.source.next(situation);
        };
        if let Some(disk) = &self.disk {
            put_on_disk(disk, &part).map_err(|source| InputError::Disk { source })?;
        }
        Ok(Step::PutState(part))
    }

    fn measured(&mut self, at: Ordinal, check: Check) -> Result<(), InputError> {
        self.source.measured(at, check)
    }

    fn captured(&mut self, at: Ordinal, parts: Vec<Slice>) -> Result<(), InputError> {
        self.source.captured(at, parts)
    }

    fn state_taken(&mut self, state: MachineState) -> Result<(), InputError> {
        self.source.state_taken(state)
    }

    fn saved(&mut self, at: Ordinal, mark: SnapshotMark) -> Result<(), InputError> {
        self.source.saved(at, mark)
    }

    fn state_put(&mut self, part: &StatePart, stands: Option<(Ordinal, u64)>) {
        if stands.is_some() {
            self.parts = None;
        }
        self.source.state_put(part, stands);
    }

    fn run_mode(&mut self, at: Ordinal, interrupt_waits: bool) -> RunMode {
        match self.parts {
            Some(_) => RunMode::Not,
            None => self.source.run_mode(at, interrupt_waits),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::BufReader;

    use ftvmm_replication::{SnapshotReader, SnapshotWriter};

    use super::*;
    use crate::snapshot::tests::header;

    struct Asked {
        stands: Option<(Ordinal, u64)>,
    }

    impl InputSource for Asked {
        fn next(&mut self, _: &Situation) -> Result<Step, InputError> {
            assert!(self.stands.is_some(), "the guest is not in place yet");
            Ok(Step::Proceed)
        }

        fn state_put(&mut self, _: &StatePart, stands: Option<(Ordinal, u64)>) {
            self.stands = stands;
        }

        fn run_mode(&mut self, _: Ordinal, _: bool) -> RunMode {
            RunMode::Free
        }
    }

    #[test]
    fn the_guest_does_not_run_before_it_is_in_place() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let parts = [StatePart::Outline { total_bytes: 0 }, StatePart::Machine(vec![1])];
        let mut writer = SnapshotWriter::new(File::create(&path).unwrap(), &header()).unwrap();
        parts.iter().for_each(|part| writer.write_part(part).unwrap());
        let reader = SnapshotReader::new(BufReader::new(File::open(&path).unwrap())).unwrap();

        let mut inputs = Restored::new(Asked { stands: None }, Some(reader), None);
        let stands = [None, Some((Ordinal(9), 1000))];
        for (part, stands) in parts.iter().zip(stands) {
            assert_eq!(inputs.run_mode(Ordinal(0), false), RunMode::Not);
            let step = inputs.next(&Situation::default()).unwrap();
            assert!(matches!(step, Step::PutState(next) if next == *part));
            inputs.state_put(part, stands);
        }
        assert!(matches!(inputs.next(&Situation::default()), Ok(Step::Proceed)));
        assert_eq!(inputs.run_mode(Ordinal(9), false), RunMode::Free);
        assert_eq!(inputs.source.stands, Some((Ordinal(9), 1000)));
    }
}
