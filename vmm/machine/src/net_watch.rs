//! What threads other than the vCPU thread can read of the guest's network: its addresses, and
//! counters of its frames.

use std::sync::atomic::{AtomicU64, Ordering};

use ftvmm_devices::{NetCounters, NetSources};
use serde::{Deserialize, Serialize};

use crate::sync::{Mutex, MutexGuard, lock};

/// The guest's frames so far, and those that were dropped, wherever it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkReport {
    /// Frames the guest transmitted.
    pub tx_frames: u64,
    /// Frames the guest received.
    pub rx_frames: u64,
    /// Addresses (MAC and VLAN) the guest has sent from that would be announced.
    pub sources: u64,
    /// Times the guest has said that it announced itself when it was asked to.
    pub announcements: u64,
    /// Frames to transmit whose header makes no sense.
    pub tx_dropped_malformed: u64,
    /// Frames this host's tap did not take: it is down, or full.
    pub tx_dropped_by_tap: u64,
    /// Received frames dropped because the guest's driver was not up.
    pub rx_dropped_not_ready: u64,
    /// Received frames dropped because the guest left too many waiting in its card.
    pub rx_dropped_no_buffer: u64,
    /// Received frames longer than the MTU, or with a header the guest cannot take.
    pub rx_dropped_refused: u64,
    /// Received frames dropped because the guest left too many waiting in this program.
    pub rx_dropped_queue_full: u64,
    /// Frames that came to this host while the other was active; not lost, the other has
    /// its own.
    pub rx_dropped_following: u64,
}

/// Updated by the vCPU thread, and by every thread that drops a frame.
#[derive(Debug, Default)]
pub struct NetWatch {
    seen: Mutex<Seen>,
    tx_dropped_by_tap: AtomicU64,
    rx_dropped_queue_full: AtomicU64,
    rx_dropped_following: AtomicU64,
}

#[derive(Debug, Default)]
struct Seen {
    counters: NetCounters,
    sources: NetSources,
}

impl NetWatch {
    /// What the guest's card says now.
    pub fn publish(&self, counters: &NetCounters, sources: &NetSources) {
        let mut seen = self.lock();
        seen.counters = *counters;
        seen.sources.clone_from(sources);
    }

    /// The addresses the guest has sent from, when its card was looked at last.
    pub fn sources(&self) -> NetSources {
        self.lock().sources.clone()
    }

    /// This host's tap did not take a frame.
    pub fn tap_dropped(&self) {
        self.tx_dropped_by_tap.fetch_add(1, Ordering::Relaxed);
    }

    /// A frame gave way to a newer one before the guest took it.
    pub fn queue_dropped(&self) {
        self.rx_dropped_queue_full.fetch_add(1, Ordering::Relaxed);
    }

    /// A frame came here although the other host is active.
    pub fn follower_dropped(&self) {
        self.rx_dropped_following.fetch_add(1, Ordering::Relaxed);
    }

    /// All numbers.
    pub fn report(&self) -> NetworkReport {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let seen = self.lock();
        let NetCounters {
            tx_frames,
            rx_frames,
            rx_dropped_not_ready,
            rx_dropped_backlog_full,
            rx_refused,
            tx_malformed,
            announcements,
        } = seen.counters;
        NetworkReport {
            tx_frames,
            rx_frames,
            sources: seen.sources.iter().count() as u64,
            announcements,
            tx_dropped_malformed: tx_malformed,
            tx_dropped_by_tap: of(&self.tx_dropped_by_tap),
            rx_dropped_not_ready,
            rx_dropped_no_buffer: rx_dropped_backlog_full,
            rx_dropped_refused: rx_refused,
            rx_dropped_queue_full: of(&self.rx_dropped_queue_full),
            rx_dropped_following: of(&self.rx_dropped_following),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        lock(&self.seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_drop_is_counted_for_its_reason() {
        let watch = NetWatch::default();
        watch.tap_dropped();
        (0..2).for_each(|_| watch.queue_dropped());
        (0..3).for_each(|_| watch.follower_dropped());
        let wanted = NetworkReport {
            tx_dropped_by_tap: 1,
            rx_dropped_queue_full: 2,
            rx_dropped_following: 3,
            ..Default::default()
        };
        assert_eq!(watch.report(), wanted);
    }

    #[test]
    fn the_report_is_what_the_card_said_last() {
        let watch = NetWatch::default();
        watch.publish(&NetCounters { tx_frames: 90, ..Default::default() }, &NetSources::default());
        let counters = NetCounters {
            tx_frames: 1,
            rx_frames: 2,
            rx_dropped_not_ready: 3,
            rx_dropped_backlog_full: 4,
            rx_refused: 5,
            tx_malformed: 6,
            announcements: 7,
        };
        watch.publish(&counters, &NetSources::default());
        let wanted = NetworkReport {
            tx_frames: 1,
            rx_frames: 2,
            rx_dropped_not_ready: 3,
            rx_dropped_no_buffer: 4,
            rx_dropped_refused: 5,
            tx_dropped_malformed: 6,
            announcements: 7,
            ..Default::default()
        };
        assert_eq!(watch.report(), wanted);
        assert_eq!(watch.sources().iter().count(), 0);
    }
}
