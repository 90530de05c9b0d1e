//! What a session is configured with, and the reasons for which it refuses or stops.

use core::fmt;
use core::net::SocketAddr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::build_id::BuildId;
use crate::fingerprint::{Difference, Fingerprint};
use crate::record::Term;
use crate::wire_error::WireError;
use crate::witness::Place;

/// Which of the two a host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Runs the guest with live inputs, and is active.
    Primary,
    /// Executes the primary's log and takes over when it dies.
    Backup,
}

impl Role {
    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Backup => "backup",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// When an output may leave the primary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReleasePolicy {
    /// When the backup has produced the same output.
    #[default]
    Compare,
    /// When the backup has received the log through the exit that produced it.
    Ack,
}

/// What a divergence leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DivergencePolicy {
    /// The primary is believed and goes on alone; the backup stops.
    #[default]
    Failover,
    /// Both stop.
    Halt,
    /// The state of the side that is believed replaces the other's, and the two go on. Frames are
    /// held meanwhile.
    Resync,
}

/// What a broken way to the guest's clients leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LinkPolicy {
    /// The hosts change roles when the other's is whole.
    #[default]
    Switch,
    /// Nothing.
    Ignore,
}

/// A backup that catches up says so every [`REPORT_EXITS`], so that a primary that waits for half
/// of the lag goes on.
const LAG_EXITS_LEAST: u64 = 4 * REPORT_EXITS;
/// Exits the backup executes before it says so without having been asked.
pub(super) const REPORT_EXITS: u64 = 256;

/// From when on the guest has to wait for the backup. The limit falls at half of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Log bytes the backup has not executed yet. Bounds memory on both sides and the time a
    /// take-over needs to catch up.
    pub log_bytes_max: u64,
    /// Exits the backup is behind. A frame waits until the backup has caught up, so this bounds
    /// what the lockstep adds to a client's round trip.
    pub lag_exits_max: u64,
    /// Frames in the output gate.
    pub gated_frames_max: u64,
    /// Bytes of those frames.
    pub gated_bytes_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            log_bytes_max: 8 << 20,
            lag_exits_max: 4096,
            gated_frames_max: 4096,
            gated_bytes_max: 8 << 20,
        }
    }
}

/// Everything a [`crate::Session`] has to know beforehand.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// The role.
    pub role: Role,
    /// This program.
    pub build: BuildId,
    /// What the machine depends on.
    pub fingerprint: Fingerprint,
    /// The channel lets nobody in but the other host. Without that, what a connection says of
    /// itself ends no primary that waits.
    pub peer_is_proved: bool,
    /// Highest term the witness knew at start.
    pub highest_term: Term,
    /// What the guest's RTC says at power-on, in seconds since 1970 (the primary's counts).
    pub rtc_epoch_s: u64,
    /// When outputs are released (the primary's counts).
    pub release: ReleasePolicy,
    /// What a divergence leads to (the primary's counts).
    pub on_divergence: DivergencePolicy,
    /// Whose execution a resync believes (the primary's counts).
    pub believe: Role,
    /// What a broken way from this host to the clients leads to while it is active.
    pub on_link_down: LinkPolicy,
    /// A side that has been silent for this long says that it is alive.
    pub heartbeat_ns: u64,
    /// A peer that has been silent for this long is lost.
    pub failure_ns: u64,
    /// A backup that lives but gets nowhere for this long, although it has something to execute or
    /// to compare, is lost too: a client would wait for it for ever.
    pub stall_ns: u64,
    /// How long a newly connected peer may take for each step of the handshake.
    pub handshake_ns: u64,
    /// How long a side waits for the peer's evidence of a divergence.
    pub evidence_ns: u64,
    /// From when on the guest has to wait.
    pub limits: Limits,
}

impl SessionConfig {
    /// A configuration with the default timings and policies.
    #[must_use]
    pub fn new(
        role: Role,
        build: BuildId,
        fingerprint: Fingerprint,
        highest_term: Term,
        rtc_epoch_s: u64,
    ) -> Self {
        Self {
            role,
            build,
            fingerprint,
            peer_is_proved: true,
            highest_term,
            rtc_epoch_s,
            release: ReleasePolicy::default(),
            on_divergence: DivergencePolicy::default(),
            believe: Role::Primary,
            on_link_down: LinkPolicy::default(),
            heartbeat_ns: 50_000_000,
            failure_ns: 500_000_000,
            stall_ns: 10_000_000_000,
            handshake_ns: 5_000_000_000,
            evidence_ns: 1_000_000_000,
            limits: Limits::default(),
        }
    }

    /// Time a backup is given to take over from a primary that hung up.
    pub(super) fn hand_over_ns(&self) -> u64 {
        2 * self.failure_ns
    }

    /// The lease this host grants as a backup, and the longest it uses as a primary. A backup takes
    /// a silent primary for lost much later, so that only a broken connection has it wait.
    pub(crate) fn lease_ns(&self) -> u64 {
        self.failure_ns / 4
    }

    /// Silence after which a side gives up while a state is under way.
    pub(super) fn attach_ns(&self) -> u64 {
        2 * self.handshake_ns.max(self.failure_ns)
    }

    /// Checks the values against each other.
    pub(super) fn check(&self) -> Result<(), SessionConfigError> {
        let Self { heartbeat_ns, failure_ns, .. } = *self;
        if heartbeat_ns == 0 || heartbeat_ns > failure_ns / 2 {
            return Err(SessionConfigError::Heartbeat { heartbeat_ns, failure_ns });
        }
        let Limits { log_bytes_max, lag_exits_max, gated_frames_max, gated_bytes_max } =
            self.limits;
        let least = log_bytes_max.min(gated_frames_max).min(gated_bytes_max);
        if least < 2 || lag_exits_max < LAG_EXITS_LEAST {
            return Err(SessionConfigError::Limits { limits: self.limits });
        }
        Ok(())
    }
}

/// A configuration that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SessionConfigError {
    /// One lost or late heartbeat would count as a dead peer.
    #[error("heartbeat of {heartbeat_ns} ns is not within 1..=half the failure limit {failure_ns}")]
    Heartbeat {
        /// [`SessionConfig::heartbeat_ns`].
        heartbeat_ns: u64,
        /// [`SessionConfig::failure_ns`].
        failure_ns: u64,
    },
    /// The guest would have to wait for ever.
    #[error("a limit is below 2, or the lag below {LAG_EXITS_LEAST}: {limits:?}")]
    Limits {
        /// [`SessionConfig::limits`].
        limits: Limits,
    },
}

/// Why two sides cannot run together, from the point of view of the sender.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum Refusal {
    /// The programs differ, and might compute different things from the same inputs.
    #[error(
        "the other host runs build {theirs}, this one build {ours}; run the same build on both"
    )]
    Build {
        /// The sender's program.
        ours: BuildId,
        /// The other one's.
        theirs: BuildId,
    },
    /// The machines differ.
    #[error("{0}")]
    Fingerprint(Difference),
    /// Both are primary, or both backup.
    #[error("both sides are {role}")]
    SameRole {
        /// The role of both.
        role: Role,
    },
    /// The primary's term is not above what the backup's witness has seen: the two do not share a
    /// witness, or the primary is a leftover.
    #[error("term {offered} is stale: term {known} is known")]
    StaleTerm {
        /// The primary's term.
        offered: Term,
        /// The highest the backup's witness knows.
        known: Term,
    },
    /// The host is taking over and has no time for a joining backup; a moment later it has.
    #[error("the host is just taking over in term {term}; connect again")]
    AlreadyRunning {
        /// The term in which it runs.
        term: Term,
    },
    /// The stream is not ours, or of another version.
    #[error("{0}")]
    Wire(WireError),
    /// One host has written a number into its witness that the other does not find in its own.
    #[error(
        "the two hosts do not see the same witness: this one uses {ours}, the other one {theirs}; \
         is a shared folder not mounted on one of them?"
    )]
    OtherWitness {
        /// The sender's.
        ours: Place,
        /// The other one's.
        theirs: Place,
    },
    /// The host has a backup, or is attaching one, and takes no other beside it.
    #[error("the guest there has a backup already, at {}, for {for_s} s", address_of(*.backup))]
    HasBackup {
        /// Where it is connected from.
        backup: Option<SocketAddr>,
        /// Since it has connected, in seconds.
        for_s: u64,
    },
    /// The host is a backup itself, and can be no other's primary.
    #[error("the host there is a backup itself, of {}, for {for_s} s", address_of(*.primary))]
    IsBackup {
        /// Where its primary is.
        primary: Option<SocketAddr>,
        /// Since it is connected, in seconds.
        for_s: u64,
    },
}

/// An address for a sentence.
fn address_of(address: Option<SocketAddr>) -> String {
    address.map_or_else(|| "an unknown address".into(), |address| address.to_string())
}

impl Refusal {
    /// Whether it may be over a moment later, without anybody having changed the configuration:
    /// a backup that hears it asks again.
    #[must_use]
    pub fn passes(&self) -> bool {
        matches!(self, Self::AlreadyRunning { .. } | Self::HasBackup { .. } | Self::IsBackup { .. })
    }

    /// The same refusal seen from the other side.
    #[must_use]
    pub fn swapped(self) -> Self {
        match self {
            Self::Build { ours, theirs } => Self::Build { ours: theirs, theirs: ours },
            Self::Fingerprint(difference) => Self::Fingerprint(difference.swapped()),
            Self::OtherWitness { ours, theirs } => {
                Self::OtherWitness { ours: theirs, theirs: ours }
            }
            other => other,
        }
    }
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StopReason {
    /// The guest ended, everything it sent is out.
    #[error("the guest ended")]
    Clean,
    /// A host was asked to stop.
    #[error("a host was asked to stop")]
    HostRequest,
    /// The two cannot run together.
    #[error("bad configuration: {0}")]
    BadConfiguration(Refusal),
    /// The two executed different things and this side is not to go on.
    #[error("primary and backup diverged")]
    Divergence,
    /// The primary was lost, or its state could not be put in place, before this backup had it.
    #[error("the state transfer from the primary was interrupted")]
    Incomplete,
    /// This host's disk failed; the other host goes on.
    #[error("the disk of this host failed: {description}")]
    DiskFailed {
        /// The request and what the host said.
        description: String,
    },
    /// The primary's state came whole, but cannot be put in place; the primary goes on.
    #[error("the primary's state cannot be put in place: {description}")]
    StateUnusable {
        /// What failed.
        description: String,
    },
    /// Another host won the term.
    #[error("another host won term {term}")]
    LostWitness {
        /// The term.
        term: Term,
    },
}
