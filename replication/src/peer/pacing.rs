//! When the unsent end of a guest's log goes to the backup.
//!
//! The backup cannot leave an exit before it knows that nothing else happened there, so each exit
//! is news for it; a message for each would cost more than the exit. While the guest makes exits
//! its own thread sends, every [`LogPacer::pause_ns`]. A timer looks now and then whether something
//! was left for long, as when the guest goes computing, and sends only then.

use ftvmm_devices::Input;

use crate::group::GroupEncoder;
use crate::record::{Event, Ordinal, Record};

/// Sending uses at most 1/`SEND_SHARE` of the guest's time, except where [`LONGEST_NS`] forces it.
const SEND_SHARE: u64 = 10;
/// Bounds of what the end of a burst of exits may stay unsent, in nanoseconds.
const SHORTEST_NS: u64 = 2_000_000;
const LONGEST_NS: u64 = 5_000_000;
/// A pause ends before the timer looks.
const PAUSE_NS_MAX: u64 = LONGEST_NS / 4 * 3;
/// A backup that has so much to execute needs no further horizon soon.
const BUSY_EXITS: u64 = 512;
/// Messages over which the cost of one is smoothed.
const COST_MESSAGES: u64 = 8;

/// What to do about the log now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Send what there is.
    Send,
    /// Call [`LogPacer::look`] in so many nanoseconds.
    LookIn {
        /// From now.
        ns: u64,
    },
    /// Nothing.
    Wait,
}

/// The log since the last message, and when it is sent.
#[derive(Debug)]
pub struct LogPacer {
    group: GroupEncoder,
    /// The last exit the guest has left, and the last the backup has been told of.
    horizon: Ordinal,
    sent_horizon: Ordinal,
    /// There is something the backup has not been told.
    unsent: bool,
    /// When the guest left the first exit of which the backup does not know.
    unsent_since_ns: Option<u64>,
    /// An input from outside is unsent: a client may be waiting for the guest's answer.
    client_waits: bool,
    sent_ns: u64,
    /// [`Self::look`] is to be called.
    looks: bool,
    /// The shortest pause between two messages.
    horizon_ns: u64,
    /// What sending a group costs this host, smoothed.
    cost_ns: u64,
}

impl LogPacer {
    /// A log that begins at power-on. A horizon is held back for `horizon_ns` while the guest makes
    /// exits, and longer where sending is expensive.
    #[must_use]
    pub fn new(horizon_ns: u64) -> Self {
        Self {
            group: GroupEncoder::new(),
            horizon: Ordinal(0),
            sent_horizon: Ordinal(0),
            unsent: false,
            unsent_since_ns: None,
            client_waits: false,
            sent_ns: 0,
            looks: false,
            horizon_ns,
            cost_ns: 0,
        }
    }

    /// The last exit the guest has left.
    #[must_use]
    pub fn horizon(&self) -> Ordinal {
        self.horizon
    }

    /// Whether there are records to send.
    #[must_use]
    pub fn has_records(&self) -> bool {
        self.group.record_count() > 0
    }

    /// Begins anew after exit `through`.
    pub(super) fn start(&mut self, through: Ordinal) {
        self.group = GroupEncoder::new();
        (self.horizon, self.sent_horizon) = (through, through);
        self.unsent = false;
        self.unsent_since_ns = None;
        self.client_waits = false;
    }

    /// Adds a record. The backup has a disk of its own, so the log need not carry what was read.
    pub fn append(&mut self, record: &Record) -> Pace {
        self.group.push(&record.without_disk_data());
        self.unsent = true;
        self.client_waits |=
            matches!(record.event, Event::Input(Input::NetRx { .. } | Input::ConsoleRx { .. }));
        // A big slice fills several groups while the guest stands still.
        match self.group.is_full() {
            true => Pace::Send,
            false => Pace::Wait,
        }
    }

    /// The guest leaves exit `at`, with the backup so many exits behind.
    pub fn exit_complete(&mut self, at: Ordinal, now_ns: u64, lag_exits: u64) -> Pace {
        self.horizon = at;
        self.unsent = true;
        let unsent_since_ns = *self.unsent_since_ns.get_or_insert(now_ns);
        let is_due = if lag_exits >= BUSY_EXITS {
            at.0 >= self.sent_horizon.0 + BUSY_EXITS / 2
        } else {
            // What a client waits for need not wait for more.
            let since_ns = if self.client_waits { self.sent_ns } else { unsent_since_ns };
            now_ns >= since_ns + self.pause_ns()
        };
        if is_due {
            Pace::Send
        } else if !core::mem::replace(&mut self.looks, true) {
            Pace::LookIn { ns: self.longest_ns() }
        } else {
            Pace::Wait
        }
    }

    /// The timer of [`Pace::LookIn`] is over. The guest's thread may have sent what it was set for,
    /// and gone on.
    pub fn look(&mut self, now_ns: u64) -> Pace {
        self.looks = false;
        let Some(since_ns) = self.unsent_since_ns else { return Pace::Wait };
        match (since_ns + self.longest_ns()).saturating_sub(now_ns) {
            0 => Pace::Send,
            ns => {
                self.looks = true;
                Pace::LookIn { ns }
            }
        }
    }

    /// Everything since the last message, if there is anything.
    pub(super) fn take_group(&mut self, now_ns: u64) -> Option<Vec<u8>> {
        if !core::mem::take(&mut self.unsent) {
            return None;
        }
        self.unsent_since_ns = None;
        self.client_waits = false;
        self.sent_ns = now_ns;
        self.sent_horizon = self.horizon;
        Some(self.group.finish(self.horizon))
    }

    /// The last group has left: what it cost, from its end on, is smoothed.
    pub fn note_sent(&mut self, now_ns: u64) {
        let cost_ns = now_ns.saturating_sub(self.sent_ns);
        let others_ns = self.cost_ns.saturating_mul(COST_MESSAGES - 1);
        self.cost_ns = others_ns.saturating_add(cost_ns) / COST_MESSAGES;
    }

    /// Pause between two messages.
    fn pause_ns(&self) -> u64 {
        self.horizon_ns.max(self.cost_ns.saturating_mul(SEND_SHARE)).min(PAUSE_NS_MAX)
    }

    /// How long the end of a burst of exits may stay unsent: longer than the guest's own thread
    /// leaves it while the guest makes exits.
    fn longest_ns(&self) -> u64 {
        (2 * self.pause_ns()).clamp(SHORTEST_NS, LONGEST_NS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: u64 = 1_000;
    const MS: u64 = 1_000_000;
    const HORIZON_NS: u64 = 200 * US;

    fn pacer(cost_ns: u64) -> LogPacer {
        LogPacer { cost_ns, ..LogPacer::new(HORIZON_NS) }
    }

    fn frame(at: u64) -> Record {
        let input = Input::NetRx { frame: vec![0; 60] };
        Record { at: Ordinal(at), event: Event::Input(input) }
    }

    #[test]
    fn a_pause_follows_the_cost_of_a_message_within_bounds_and_ends_before_the_timer() {
        // Cost of a message, pause, timer; in microseconds.
        let table = [
            (0, 200, 2_000),
            (20, 200, 2_000),
            (50, 500, 2_000),
            (150, 1_500, 3_000),
            (1_000, 3_750, 5_000),
            (u64::MAX / US, 3_750, 5_000),
        ];
        for (cost_us, pause_us, longest_us) in table {
            let pacer = pacer(cost_us * US);
            assert_eq!(pacer.pause_ns(), pause_us * US, "{cost_us}");
            assert_eq!(pacer.longest_ns(), longest_us * US, "{cost_us}");
        }
        let patient = LogPacer::new(u64::MAX);
        assert!(patient.pause_ns() < patient.longest_ns());
    }

    #[test]
    fn exits_are_sent_when_the_first_of_them_has_waited_a_pause() {
        let mut pacer = pacer(0);
        assert_eq!(pacer.exit_complete(Ordinal(1), MS, 0), Pace::LookIn { ns: 2 * MS });
        assert_eq!(pacer.exit_complete(Ordinal(2), MS + HORIZON_NS - 1, 0), Pace::Wait);
        assert_eq!(pacer.exit_complete(Ordinal(3), MS + HORIZON_NS, 0), Pace::Send);
        assert!(pacer.take_group(MS + HORIZON_NS).is_some());
        assert!(pacer.take_group(MS + HORIZON_NS).is_none(), "there is no news");
        assert_eq!(pacer.exit_complete(Ordinal(4), MS + HORIZON_NS, 0), Pace::Wait);
    }

    #[test]
    fn what_a_client_waits_for_goes_as_soon_as_the_last_message_is_a_pause_ago() {
        let mut pacer = pacer(0);
        pacer.append(&frame(1));
        assert_eq!(pacer.exit_complete(Ordinal(1), MS, 0), Pace::Send);
        assert!(pacer.take_group(MS).is_some());
        pacer.append(&frame(2));
        assert_ne!(pacer.exit_complete(Ordinal(2), MS + HORIZON_NS - 1, 0), Pace::Send);
        assert_eq!(pacer.exit_complete(Ordinal(3), MS + HORIZON_NS, 0), Pace::Send);
    }

    #[test]
    fn a_busy_backup_is_told_of_exits_by_the_hundred() {
        let mut pacer = pacer(0);
        let half = BUSY_EXITS / 2;
        assert_ne!(pacer.exit_complete(Ordinal(half - 1), 9 * MS, BUSY_EXITS), Pace::Send);
        assert_eq!(pacer.exit_complete(Ordinal(half), 9 * MS, BUSY_EXITS), Pace::Send);
    }

    #[test]
    fn the_timer_sends_only_what_has_waited_its_time() {
        let mut pacer = pacer(200 * US);
        assert_eq!(pacer.exit_complete(Ordinal(1), 4 * MS, 0), Pace::LookIn { ns: 4 * MS });
        assert!(pacer.take_group(5 * MS).is_some(), "as an output does");
        assert_eq!(pacer.exit_complete(Ordinal(2), 6 * MS, 0), Pace::Wait);
        assert_eq!(pacer.look(8 * MS), Pace::LookIn { ns: 2 * MS });
        assert_eq!(pacer.look(10 * MS), Pace::Send);
    }

    #[test]
    fn the_timer_leaves_alone_what_no_exit_was_left_for() {
        let mut pacer = pacer(0);
        assert_eq!(pacer.exit_complete(Ordinal(1), MS, 0), Pace::LookIn { ns: 2 * MS });
        assert!(pacer.take_group(2 * MS).is_some());
        pacer.append(&frame(2));
        assert_eq!(pacer.look(3 * MS), Pace::Wait);
        assert_eq!(pacer.exit_complete(Ordinal(2), 3 * MS, 0), Pace::Send);
    }

    #[test]
    fn the_cost_of_a_message_is_smoothed_from_its_end_to_when_it_has_left() {
        let mut pacer = pacer(0);
        for n in 1..=100 {
            pacer.exit_complete(Ordinal(n), n * MS, 0);
            assert!(pacer.take_group(n * MS).is_some());
            pacer.note_sent(n * MS + 80 * US);
        }
        assert!((79 * US..=80 * US).contains(&pacer.cost_ns), "{}", pacer.cost_ns);
    }

    #[test]
    fn a_big_slice_goes_in_several_groups() {
        let mut pacer = pacer(0);
        let frame = vec![7; 64 << 10];
        let big = Record { at: Ordinal(1), event: Event::Input(Input::NetRx { frame }) };
        let sends = (0..64).filter(|_| match pacer.append(&big) {
            Pace::Send => pacer.take_group(MS).is_some(),
            _ => false,
        });
        assert!((3..=5).contains(&sends.count()));
    }
}
