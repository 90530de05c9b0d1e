//! One host: the product's session, its guest and its disk.

use std::collections::VecDeque;

use ftvmm_replication::witness::claim::Purpose;
use ftvmm_replication::{Role, Session, SessionConfig, Term};

use crate::fingerprint::fingerprint;
use crate::guest::{Disk, Guest};

/// A millisecond in nanoseconds.
pub const MS: u64 = 1_000_000;
/// Silence after which a host is lost. The lease is a quarter of it.
pub const FAILURE_NS: u64 = 400 * MS;

/// Where the guest's inputs come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// There is no guest here.
    None,
    /// From this host; no backup follows.
    Alone,
    /// From this host, and to the backup.
    Recording,
    /// From the other host.
    Following,
    /// What is left of the log; then from this host.
    CatchingUp,
}

/// A claim on its way to the witness, or its answer on the way back.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    pub term: Term,
    pub ran: Term,
    pub purpose: Purpose,
    pub answer: Option<bool>,
}

#[derive(Clone)]
pub struct Host {
    pub session: Session,
    /// How often it was started again.
    pub life: u8,
    pub mode: Mode,
    /// Kept from the life before until another takes its place, for the checks.
    pub guest: Guest,
    pub disk: Disk,
    /// Inputs of the log that are not executed, with their exits.
    pub pending: VecDeque<(u64, u8)>,
    pub horizon: u64,
    /// The guest's state is to be sent.
    pub sends: bool,
    pub claim: Option<Asked>,
    pub connected: bool,
    /// The operator said that this host is to start whatever runs.
    pub overrides: bool,
    /// Crashed or stopped.
    pub gone: bool,
}

impl Host {
    pub fn new(role: Role, highest: Term) -> Self {
        let build = "model".try_into().expect("a name");
        let config = SessionConfig {
            heartbeat_ns: FAILURE_NS / 2,
            failure_ns: FAILURE_NS,
            handshake_ns: FAILURE_NS,
            evidence_ns: FAILURE_NS,
            stall_ns: 20 * FAILURE_NS,
            ..SessionConfig::new(role, build, fingerprint(), highest, 0)
        };
        Self {
            session: Session::new(config).expect("the configuration works"),
            life: 0,
            mode: Mode::None,
            guest: Guest::default(),
            disk: Disk::default(),
            pending: VecDeque::new(),
            horizon: 0,
            sends: false,
            claim: None,
            connected: false,
            overrides: false,
            gone: false,
        }
    }

    /// Started again on the same machine: the disk is as it was.
    pub fn again(&mut self, role: Role, highest: Term) {
        let fresh = Self::new(role, highest);
        *self = Self {
            life: self.life + 1,
            guest: core::mem::take(&mut self.guest),
            disk: self.disk,
            ..fresh
        };
    }

    /// Takes inputs of its own.
    pub fn is_live(&self) -> bool {
        !self.gone && matches!(self.mode, Mode::Alone | Mode::Recording)
    }
}
