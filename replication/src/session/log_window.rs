//! The log between the two executions: groups the backup has not executed yet, and a few before.
//!
//! Why: the bytes not yet executed are what flow control limits, and when the two diverge the last
//! records at the backup's place are what explains it. The groups stay encoded; they are decoded
//! only for an incident.

use std::collections::VecDeque;

use crate::bounded::clip;
use crate::group::{GroupHead, decode_group};
use crate::incident::{LINE_BYTES_MAX, RECORDS_QUOTED};
use crate::record::Ordinal;

#[derive(Clone, Debug)]
struct Entry {
    head: GroupHead,
    bytes: Vec<u8>,
}

/// See the module documentation.
#[derive(Clone, Debug, Default)]
pub(super) struct LogWindow {
    groups: VecDeque<Entry>,
    /// How many groups at the front have been executed.
    executed_groups: usize,
    executed_through: Ordinal,
    /// Horizon of the last group.
    logged_through: Ordinal,
    executed_records: u64,
    unexecuted_bytes: u64,
}

impl LogWindow {
    /// A window for a backup that has left exit `through`.
    pub(super) fn starting_at(through: Ordinal) -> Self {
        Self { executed_through: through, logged_through: through, ..Self::default() }
    }

    /// How far the log is complete: the primary has sent it, the backup has received it.
    pub(super) fn logged_through(&self) -> Ordinal {
        self.logged_through
    }

    pub(super) fn executed_through(&self) -> Ordinal {
        self.executed_through
    }

    pub(super) fn unexecuted_bytes(&self) -> u64 {
        self.unexecuted_bytes
    }

    /// Exits the backup is behind what it was sent.
    pub(super) fn unexecuted_exits(&self) -> u64 {
        self.logged_through.0.saturating_sub(self.executed_through.0)
    }

    pub(super) fn push(&mut self, head: GroupHead, bytes: Vec<u8>) {
        self.unexecuted_bytes += bytes.len() as u64;
        self.logged_through = self.logged_through.max(head.horizon);
        self.groups.push_back(Entry { head, bytes });
        self.advance();
    }

    /// The backup has left `through`; bytes of the groups it thereby finished.
    pub(super) fn on_executed(&mut self, through: Ordinal) -> u64 {
        self.executed_through = self.executed_through.max(through);
        self.advance()
    }

    fn advance(&mut self) -> u64 {
        let before_bytes = self.unexecuted_bytes;
        while let Some(entry) = self.groups.get(self.executed_groups)
            && entry.head.horizon <= self.executed_through
        {
            self.unexecuted_bytes -= entry.bytes.len() as u64;
            self.executed_records += entry.head.record_count;
            self.executed_groups += 1;
        }
        while self.executed_groups > 0
            && let Some(front) = self.groups.front()
            && self.executed_records - front.head.record_count >= RECORDS_QUOTED as u64
        {
            self.executed_records -= front.head.record_count;
            self.executed_groups -= 1;
            self.groups.pop_front();
        }
        before_bytes - self.unexecuted_bytes
    }

    /// The last records at or before exit `at`, one line each.
    pub(super) fn last_records(&self, at: Ordinal) -> Vec<String> {
        let mut lines = VecDeque::with_capacity(RECORDS_QUOTED + 1);
        let groups = self.groups.iter().filter_map(|entry| decode_group(&entry.bytes).ok());
        for record in groups.flat_map(|group| group.records).filter(|record| record.at <= at) {
            lines.push_back(clip(record.to_string(), LINE_BYTES_MAX));
            if lines.len() > RECORDS_QUOTED {
                lines.pop_front();
            }
        }
        lines.into()
    }

    pub(super) fn invariants(&self) {
        assert!(self.executed_groups <= self.groups.len(), "executed more groups than there are");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::GroupEncoder;
    use crate::record::{Event, Record};
    use ftvmm_devices::Input;

    fn push(window: &mut LogWindow, encoder: &mut GroupEncoder, at: u64) -> u64 {
        let event = Event::Input(Input::Time { now_ns: at });
        encoder.push(&Record { at: Ordinal(at), event });
        let bytes = encoder.finish(Ordinal(at));
        let length = bytes.len() as u64;
        window.push(crate::group::peek_group(&bytes).unwrap(), bytes);
        length
    }

    #[test]
    fn executed_groups_no_longer_count_but_the_last_records_stay() {
        let (mut window, mut encoder) = (LogWindow::default(), GroupEncoder::new());
        let sizes: Vec<u64> = (1..=100).map(|at| push(&mut window, &mut encoder, at)).collect();
        assert_eq!(window.unexecuted_bytes(), sizes.iter().sum::<u64>());
        assert_eq!(window.on_executed(Ordinal(60)), sizes[..60].iter().sum::<u64>());
        assert_eq!(window.unexecuted_bytes(), sizes[60..].iter().sum::<u64>());
        assert_eq!(window.on_executed(Ordinal(59)), 0);
        assert_eq!(window.groups.len(), 32 + 40);
        let lines = window.last_records(Ordinal(60));
        assert_eq!(lines.len(), 32);
        assert_eq!(lines[0], "29 time 0.000000029 s");
        assert_eq!(lines[31], "60 time 0.000000060 s");
        window.invariants();
    }

    #[test]
    fn a_group_that_only_moves_the_horizon_back_to_the_executed_exit_counts_nothing() {
        let mut window = LogWindow::default();
        window.on_executed(Ordinal(9));
        let bytes = GroupEncoder::new().finish(Ordinal(9));
        window.push(crate::group::peek_group(&bytes).unwrap(), bytes);
        assert_eq!(window.unexecuted_bytes(), 0);
    }
}
