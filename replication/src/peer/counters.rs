//! What a host of a pair counts.

/// Numbers for status and report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerCounters {
    /// Frames the guest sent.
    pub outputs: u64,
    /// Bytes of finished log groups sent or received.
    pub log_bytes: u64,
    /// Digests of outputs sent or received.
    pub digests: u64,
    /// Divergences found.
    pub divergences: u64,
    /// Take-overs by this host after the loss of the other.
    pub takeovers: u64,
    /// From the loss of the peer to the first live exit, in nanoseconds.
    pub takeover_ns: Option<u64>,
    /// Backups that got this host's state.
    pub attaches: u64,
    /// Longest time the guest stood still for one of them, in nanoseconds.
    pub attach_stopped_ns: Option<u64>,
    /// Switches of roles, to and fro.
    pub switches: u64,
    /// When the peer was lost, on the caller's clock.
    lost_ns: Option<u64>,
}

impl PeerCounters {
    /// The peer is taken for lost.
    pub(super) fn lost_peer(&mut self, now_ns: u64) {
        self.lost_ns.get_or_insert(now_ns);
    }

    /// There is a peer again.
    pub(super) fn found_peer(&mut self) {
        self.lost_ns = None;
    }

    /// The guest makes its first live exit.
    pub(super) fn took_over(&mut self, now_ns: u64) {
        self.takeover_ns = self.lost_ns.map(|lost_ns| now_ns.saturating_sub(lost_ns));
    }
}
