//! Queries of the machine to the board; they change nothing.

use super::Board;
use crate::fault::GuestFaults;
use crate::virtio::blk::DiskCounters;
use crate::virtio::net::{NetCounters, NetSources, VirtioNet};

impl Board {
    /// Guest time of the next interrupt of timer or clock, in nanoseconds since power-on.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        match (self.pit.next_edge_ns(), self.rtc.next_event_ns()) {
            (Some(tick_ns), Some(alarm_ns)) => Some(tick_ns.min(alarm_ns)),
            (tick_ns, alarm_ns) => tick_ns.or(alarm_ns),
        }
    }

    /// Guest time, in nanoseconds since power-on.
    pub fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Whether the interrupt controller asks the processor for an interrupt.
    pub fn interrupt_pending(&self) -> bool {
        self.pic.interrupt_pending()
    }

    /// Whether any device waits for its interrupt to be served: one is pending, or a more urgent
    /// one is being served.
    pub fn interrupt_waits(&self) -> bool {
        self.pic.request_waits()
    }

    /// Whether a received frame would reach the guest now: its driver is up and has taken every
    /// frame so far. While this is false the host does well to keep frames to itself.
    pub fn network_ready(&self) -> bool {
        self.virtio.net.as_ref().is_some_and(VirtioNet::is_ready)
    }

    /// Whether the guest has transmitted a frame. Before that no client can wait for it.
    pub fn has_transmitted(&self) -> bool {
        self.virtio.net.as_ref().is_some_and(|net| net.counters().tx_frames > 0)
    }

    /// Most random bytes an [`crate::Input::Entropy`] could give the guest now; 0 while it asks for
    /// none.
    pub fn entropy_wanted_bytes(&self) -> u64 {
        self.virtio.entropy.wanted_bytes()
    }

    /// Random bytes the guest has got so far.
    pub fn entropy_supplied_bytes(&self) -> u64 {
        self.virtio.entropy.supplied_bytes()
    }

    /// What the guest has done wrong towards its devices so far.
    pub fn guest_faults(&self) -> GuestFaults {
        self.virtio.faults()
    }

    /// What the guest has asked of its disk so far.
    pub fn disk_counters(&self) -> DiskCounters {
        self.virtio.disk.as_ref().map(|disk| *disk.counters()).unwrap_or_default()
    }

    /// Frames that passed the network card, and those that did not.
    pub fn net_counters(&self) -> NetCounters {
        self.virtio.net.as_ref().map(|net| *net.counters()).unwrap_or_default()
    }

    /// The addresses the guest has sent from; `None` without a network card.
    pub fn net_sources(&self) -> Option<&NetSources> {
        self.virtio.net.as_ref().map(VirtioNet::sources)
    }

    /// Whether timer ticks wait behind one the guest has not finished with. A timer that is
    /// programmed for each tick never owes one.
    pub fn owes_ticks(&self) -> bool {
        self.pit.owes_tick()
    }

    /// Timer ticks the guest will never see because it left [`crate::OWED_TICKS_MAX`] of them
    /// waiting.
    pub fn lost_ticks(&self) -> u64 {
        self.pit.lost_ticks()
    }

    /// Typed bytes the guest will never see because it left [`crate::BACKLOG_BYTES_MAX`] of them
    /// waiting.
    pub fn dropped_console_bytes(&self) -> u64 {
        self.console.dropped_bytes()
    }
}
