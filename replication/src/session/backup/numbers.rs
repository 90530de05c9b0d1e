//! What a primary's numbers are checked against before they are used.
//!
//! A primary whose numbers cannot be breaks the protocol: it is lost, and the witness decides who
//! goes on. docs/protocol.md has the table.

use super::{Backup, Phase};
use crate::gate::{EARLY_DIGESTS_MAX, Output};
use crate::group::{GroupHead, peek_group};
use crate::message::Message;
use crate::policy::{Limits, ReleasePolicy};
use crate::record::{Ordinal, OutputOrdinal, Term};
use crate::state::StatePart;
use ftvmm_devices::FRAME_BYTES_MAX;

/// How far a primary's term may be above the one that this host's witness knew when this host
/// started. A primary claims a term for each backup that it offered one and lost, which takes it
/// up to five seconds; a backup that waits misses a thousand in an hour of nothing else. It is
/// started again then, and asks the witness again.
const TERMS_AHEAD_MAX: u64 = 1024;
/// More exits than a guest makes while the end of its log is unsent (5 ms; decision 0010).
const GROUP_EXITS_MAX: u64 = 1 << 17;
/// Most frames an exit transmits: the length of a virtqueue.
const EXIT_FRAMES_MAX: u64 = 256;

impl Backup {
    /// What a message of the primary claims that cannot be.
    pub(super) fn breach(&self, limits: &Limits, message: &Message) -> Option<String> {
        if let Some(term) = message.term().filter(|term| *term > self.term) {
            return Some(format!("{} of unknown term {term}", message.name()));
        }
        match (&self.phase, message) {
            (_, Message::Welcome { term, .. } | Message::Attach { term, .. }) => {
                self.term_breach(*term)
            }
            (
                Phase::Following | Phase::AwaitingVerdict { .. },
                Message::Log { released_through, .. } | Message::Heartbeat { released_through, .. },
            ) => self.released_breach(limits, *released_through),
            (
                Phase::Following | Phase::AwaitingVerdict { .. },
                Message::Yield { through, released_through, .. },
            ) => {
                let logged = self.window.logged_through();
                let what = || format!("primary yields at exit {through}, its log ends at {logged}");
                (*through > logged)
                    .then(what)
                    .or_else(|| self.released_breach(limits, *released_through))
            }
            (Phase::Joining { .. }, Message::State { part: StatePart::Machine(_), .. }) => {
                Some("the machine comes before the end of the state".into())
            }
            (Phase::Joining { held, .. }, Message::Held { at, frame, .. }) => {
                held_breach(limits, held, *at, frame)
            }
            (Phase::Joining { held, .. }, Message::StateEnd { outputs_through, at, .. }) => {
                let last = held.last().map_or(Ordinal(0), |output| output.at);
                let fits =
                    *at > Ordinal(0) && last <= *at && held.len() as u64 <= outputs_through.0;
                let count = held.len();
                (!fits).then(|| {
                    format!(
                        "a state of exit {at} with {outputs_through} outputs holds {count} \
                         up to exit {last}"
                    )
                })
            }
            _ => None,
        }
    }

    /// The first term is one that follows from what this host's witness knew; a connection keeps
    /// its term.
    fn term_breach(&self, term: Term) -> Option<String> {
        let ahead = match self.phase {
            Phase::AwaitingWelcome => TERMS_AHEAD_MAX,
            _ => 0,
        };
        let known = self.term;
        (term.0.saturating_sub(known.0) > ahead).then(|| {
            format!("term {term} does not follow from term {known}; is the witness the same?")
        })
    }

    /// Under `compare` an output leaves after this side has reported it; under `ack` the primary
    /// keeps what it released and this side has not reported, and waits when that is much. It may
    /// go on once to stop for its state.
    fn released_breach(&self, limits: &Limits, released: OutputOrdinal) -> Option<String> {
        let unreported_max = match self.release {
            ReleasePolicy::Compare => 0,
            ReleasePolicy::Ack => {
                limits.gated_frames_max.saturating_mul(2).saturating_add(EARLY_DIGESTS_MAX as u64)
            }
        };
        let (produced, last) = (self.outputs.produced_through(), self.outputs.released_through());
        let fits = released >= last && released.0.saturating_sub(produced.0) <= unreported_max;
        (!fits).then(|| {
            format!("primary released output {released}, after {last}; {produced} are known here")
        })
    }

    /// The head of a group that continues the log.
    pub(super) fn checked_head(&self, limits: &Limits, group: &[u8]) -> Result<GroupHead, String> {
        let head = peek_group(group).map_err(|error| error.to_string())?;
        let (horizon, logged) = (head.horizon, self.window.logged_through());
        let executed = self.window.executed_through();
        let ahead_max = limits.lag_exits_max.saturating_add(GROUP_EXITS_MAX);
        if horizon < logged {
            return Err(format!("log falls back from {logged} to {horizon}"));
        }
        // Whoever executes such a log would not look at anything else for as long.
        if horizon.0.saturating_sub(executed.0) > ahead_max {
            return Err(format!("log runs ahead to exit {horizon}, this host has left {executed}"));
        }
        Ok(head)
    }
}

/// Held frames come in order, and a gate holds only so many: what makes the guest wait, twice
/// because it goes on once to stop for its state.
fn held_breach(limits: &Limits, held: &[Output], at: Ordinal, frame: &[u8]) -> Option<String> {
    let last = held.last().map_or(Ordinal(0), |output| output.at);
    let frames_max = limits.gated_frames_max.saturating_add(EXIT_FRAMES_MAX).saturating_mul(2);
    let exit_bytes = EXIT_FRAMES_MAX * FRAME_BYTES_MAX as u64;
    let bytes_max = limits.gated_bytes_max.saturating_add(exit_bytes).saturating_mul(2);
    let bytes: u64 = held.iter().map(|output| output.frame.len() as u64).sum();
    if at < last {
        return Some(format!("held frame of exit {at} after one of exit {last}"));
    }
    if frame.len() > FRAME_BYTES_MAX {
        return Some(format!("held frame of {} bytes is longer than any", frame.len()));
    }
    (held.len() as u64 >= frames_max || bytes >= bytes_max).then(|| {
        format!("{} held frames with {bytes} bytes are more than a gate holds", held.len() + 1)
    })
}
