//! The output gate: which frames may leave the primary, and which the backup must keep.
//!
//! Why: a client may act on a frame the moment it leaves. If the host then dies, the survivor must
//! be in a state that explains the frame. So a frame leaves only when the backup has proved that it
//! reached (`compare`) or can reach (`ack`) the same state.
//! Invariants: frames leave in order, each once; under `compare` none leaves before the backup's
//! equal digest, under `ack` none before the log through its exit was received.

use std::collections::VecDeque;

use crate::digest::OutputDigest;
use crate::incident::OutputEvidence;
use crate::policy::ReleasePolicy;
use crate::record::{Ordinal, OutputOrdinal};

/// Digests the backup may be ahead by. It stands at most an exit past the log it has, and an exit
/// transmits at most a queue of frames; more is a peer that does not follow the protocol.
pub(crate) const EARLY_DIGESTS_MAX: usize = 4096;
/// Released outputs the backup keeps for an incident report.
const EVIDENCE_OUTPUTS: usize = 8;

/// A frame and where it was transmitted.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    pub(crate) at: Ordinal,
    pub(crate) digest: OutputDigest,
    pub(crate) frame: Vec<u8>,
}

impl Output {
    fn evidence(&self, output: OutputOrdinal) -> OutputEvidence {
        let Self { at, digest, frame } = self.clone();
        OutputEvidence { output, at, digest, frame }
    }
}

/// The result of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compared {
    /// Nothing to say against it, or not both sides known yet.
    Agreed,
    /// The two sides differ in this output.
    Differ(OutputOrdinal),
    /// The backup does not follow the protocol: digests skip, repeat or run far ahead.
    OutOfOrder,
}

/// The primary's half. See the module documentation.
#[derive(Clone, Debug)]
pub(crate) struct OutputGate {
    policy: ReleasePolicy,
    /// Outputs not yet both released and compared; the first is number `dropped_through + 1`.
    held: VecDeque<Output>,
    held_bytes: u64,
    dropped_through: u64,
    released_through: u64,
    matched_through: u64,
    acked_through: Ordinal,
    /// Digests of outputs the primary has not produced yet, following `matched_through`.
    early: VecDeque<(Ordinal, OutputDigest)>,
    open: bool,
    /// Outputs up to this one are in the past of the state the backup is being given.
    joined_through: u64,
}

impl OutputGate {
    pub(crate) fn new(policy: ReleasePolicy) -> Self {
        Self {
            policy,
            held: VecDeque::new(),
            held_bytes: 0,
            dropped_through: 0,
            released_through: 0,
            matched_through: 0,
            acked_through: Ordinal(0),
            early: VecDeque::new(),
            open: false,
            joined_through: 0,
        }
    }

    /// A gate that goes on after `outputs`, which are all out.
    pub(crate) fn starting_at(policy: ReleasePolicy, outputs: OutputOrdinal) -> Self {
        let OutputOrdinal(through) = outputs;
        Self {
            dropped_through: through,
            released_through: through,
            matched_through: through,
            ..Self::new(policy)
        }
    }

    /// Outputs that have left, which the backup need not keep.
    pub(crate) fn released_through(&self) -> OutputOrdinal {
        OutputOrdinal(self.released_through)
    }

    /// Outputs that have not left.
    pub(crate) fn unreleased(&self) -> impl Iterator<Item = &Output> {
        self.held.iter().skip((self.released_through - self.dropped_through) as usize)
    }

    /// Number of outputs both sides produced alike.
    pub(crate) fn matched_through(&self) -> u64 {
        self.matched_through
    }

    pub(crate) fn held_frames(&self) -> u64 {
        self.held.len() as u64
    }

    pub(crate) fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    pub(crate) fn produced_through(&self) -> OutputOrdinal {
        OutputOrdinal(self.dropped_through + self.held.len() as u64)
    }

    pub(crate) fn is_open(&self) -> bool {
        self.open
    }

    /// The guest transmitted the next frame.
    pub(crate) fn push(&mut self, at: Ordinal, digest: OutputDigest, frame: Vec<u8>) -> Compared {
        self.held_bytes += frame.len() as u64;
        self.held.push_back(Output { at, digest, frame });
        match self.early.pop_front() {
            Some((early_at, early)) => self.compare(self.produced_through().0, early_at, early),
            None => Compared::Agreed,
        }
    }

    /// The backup produced `output`.
    pub(crate) fn on_digest(
        &mut self,
        output: OutputOrdinal,
        at: Ordinal,
        digest: OutputDigest,
    ) -> Compared {
        let expected = self.matched_through + self.early.len() as u64 + 1;
        if output.0 != expected || self.early.len() >= EARLY_DIGESTS_MAX {
            return Compared::OutOfOrder;
        }
        if output <= self.produced_through() {
            return self.compare(output.0, at, digest);
        }
        self.early.push_back((at, digest));
        Compared::Agreed
    }

    fn compare(&mut self, number: u64, at: Ordinal, digest: OutputDigest) -> Compared {
        assert!(number == self.matched_through + 1, "outputs are compared in order");
        let own = &self.held[(number - self.dropped_through - 1) as usize];
        if (own.at, own.digest) != (at, digest) {
            // Nothing after this can be compared.
            self.early.clear();
            return Compared::Differ(OutputOrdinal(number));
        }
        self.matched_through = number;
        Compared::Agreed
    }

    /// The backup has the log through this exit.
    pub(crate) fn on_ack(&mut self, received_through: Ordinal) {
        self.acked_through = self.acked_through.max(received_through);
    }

    /// The backup's guest ended: the first output only one side produced, if there is one.
    pub(crate) fn first_unmatched(&self) -> Option<OutputOrdinal> {
        let one_sided = self.matched_through < self.produced_through().0 || !self.early.is_empty();
        one_sided.then_some(OutputOrdinal(self.matched_through + 1))
    }

    /// Hands out every frame that may leave now, in order.
    pub(crate) fn release(&mut self, mut transmit: impl FnMut(Vec<u8>)) {
        while self.may_release_next() {
            let output = &mut self.held[(self.released_through - self.dropped_through) as usize];
            self.released_through += 1;
            // Under `ack` the frame stays for the comparison that comes later.
            if self.open || self.released_through <= self.matched_through {
                self.held_bytes -= output.frame.len() as u64;
                transmit(core::mem::take(&mut output.frame));
            } else {
                transmit(output.frame.clone());
            }
        }
        self.drop_done();
    }

    /// Drops what has left and is compared.
    pub(crate) fn drop_done(&mut self) {
        let compared_through = if self.open { u64::MAX } else { self.matched_through };
        while self.dropped_through < self.released_through.min(compared_through) {
            let dropped = self.held.pop_front();
            self.held_bytes -= dropped.map_or(0, |output| output.frame.len() as u64);
            self.dropped_through += 1;
        }
    }

    /// Whether [`Self::release`] would hand out a frame.
    pub(crate) fn may_release_next(&self) -> bool {
        let next = (self.released_through - self.dropped_through) as usize;
        self.held.get(next).is_some_and(|output| {
            self.open
                || match self.policy {
                    ReleasePolicy::Compare => self.released_through < self.matched_through,
                    ReleasePolicy::Ack => output.at <= self.acked_through,
                }
        })
    }

    /// The primary is alone: from now on nothing is held.
    pub(crate) fn open(&mut self) {
        self.open = true;
        self.early.clear();
    }

    /// The backup is being given a state that all outputs so far are in the past of. From now on
    /// later ones are held; those that are held already leave when it has that state.
    pub(crate) fn close(&mut self) -> OutputOrdinal {
        self.open = false;
        self.early.clear();
        self.joined_through = self.produced_through().0;
        if self.held.is_empty() {
            self.matched_through = self.joined_through;
        }
        self.produced_through()
    }

    /// The backup has the state of [`Self::close`].
    pub(crate) fn on_joined(&mut self) {
        self.matched_through = self.matched_through.max(self.joined_through);
        let joined = self.joined_through.saturating_sub(self.dropped_through) as usize;
        let last = joined.checked_sub(1).and_then(|index| self.held.get(index));
        self.on_ack(last.map_or(Ordinal(0), |output| output.at));
    }

    /// What is known of `output`, if it is still here.
    pub(crate) fn evidence(&self, output: OutputOrdinal) -> Option<OutputEvidence> {
        let index = output.0.checked_sub(self.dropped_through + 1)?;
        self.held.get(index as usize).map(|held| held.evidence(output))
    }

    pub(crate) fn invariants(&self) {
        assert!(self.dropped_through <= self.released_through, "an unreleased frame was dropped");
        assert!(
            self.released_through <= self.produced_through().0,
            "an unproduced frame was released"
        );
        assert!(
            self.matched_through <= self.produced_through().0,
            "an unproduced frame was matched"
        );
        assert!(
            self.early.is_empty() || self.matched_through == self.produced_through().0,
            "early digests wait beside frames they belong to"
        );
        if self.policy == ReleasePolicy::Compare && !self.open {
            assert!(self.released_through <= self.matched_through, "released before the match");
        }
    }
}

/// The backup's half: frames it produced that the primary may not have released.
#[derive(Clone, Debug, Default)]
pub(crate) struct RetainedOutputs {
    kept: VecDeque<Output>,
    dropped_through: u64,
    released_through: u64,
    live: bool,
}

impl RetainedOutputs {
    /// Goes on after `outputs`, all of which have left but the last ones, `held`.
    pub(crate) fn starting_at(outputs: OutputOrdinal, held: Vec<Output>) -> Self {
        let through = outputs.0.saturating_sub(held.len() as u64);
        let kept = held.into();
        Self { kept, dropped_through: through, released_through: through, live: false }
    }

    pub(crate) fn produced_through(&self) -> OutputOrdinal {
        OutputOrdinal(self.dropped_through + self.kept.len() as u64)
    }

    /// The guest transmitted the next frame; its number.
    pub(crate) fn push(
        &mut self,
        at: Ordinal,
        digest: OutputDigest,
        frame: Vec<u8>,
    ) -> OutputOrdinal {
        self.kept.push_back(Output { at, digest, frame });
        let number = self.produced_through();
        self.trim();
        number
    }

    /// The primary reports which outputs have left.
    pub(crate) fn on_released(&mut self, released_through: OutputOrdinal) {
        self.released_through = self.released_through.max(released_through.0);
        self.trim();
    }

    /// Outputs that have left the primary, as it last reported.
    pub(crate) fn released_through(&self) -> OutputOrdinal {
        OutputOrdinal(self.released_through)
    }

    /// A few released ones stay, because a comparison may still ask for them.
    fn trim(&mut self) {
        while self.kept.len() > EVIDENCE_OUTPUTS && self.dropped_through < self.released_through {
            self.kept.pop_front();
            self.dropped_through += 1;
        }
    }

    pub(crate) fn is_live(&self) -> bool {
        self.live
    }

    /// Hands over what is not known to have left, and what came before: no more than there was,
    /// whatever the primary said.
    pub(crate) fn into_unreleased(mut self) -> (OutputOrdinal, Vec<Output>) {
        let through = OutputOrdinal(self.released_through).min(self.produced_through());
        let released = through.0.saturating_sub(self.dropped_through) as usize;
        (through, self.kept.drain(released..).collect())
    }

    /// Goes live: from now on [`Self::drain`] hands out every frame the primary has not released.
    pub(crate) fn go_live(&mut self) {
        self.live = true;
    }

    /// Hands out, once live, the frames not known to have left, in order.
    pub(crate) fn drain(&mut self, mut transmit: impl FnMut(Vec<u8>)) {
        if !self.live {
            return;
        }
        while let Some(output) = self.kept.pop_front() {
            self.dropped_through += 1;
            if self.dropped_through > self.released_through {
                self.released_through = self.dropped_through;
                transmit(output.frame);
            }
        }
    }

    /// What is known of `output`, if it is still here.
    pub(crate) fn evidence(&self, output: OutputOrdinal) -> Option<OutputEvidence> {
        let index = output.0.checked_sub(self.dropped_through + 1)?;
        self.kept.get(index as usize).map(|kept| kept.evidence(output))
    }

    pub(crate) fn invariants(&self) {
        assert!(self.dropped_through <= self.released_through, "an unreleased frame was dropped");
        assert!(!self.live || self.kept.is_empty(), "a live side keeps no frame back");
    }
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
