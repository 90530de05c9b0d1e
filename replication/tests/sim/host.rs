//! One host: the product's core, and in memory what lies around it.

use std::collections::VecDeque;

use ftvmm_replication::{
    DiskAnswer, Effect, Limits, PeerCore, Replayer, Role, SessionConfig, Slice, StatePart, Term,
};

use crate::disk::Disk;
use crate::fingerprint::fingerprint;
use crate::guest::Guest;
use crate::options::Options;
use crate::transfer::Sender;
use crate::world::{FAILURE_NS, MS, US};

/// Frames after which the guest waits for the other host.
pub const GATED_FRAMES_MAX: u64 = 12;

pub enum Parcel {
    Bytes(Vec<u8>),
    Closed,
    /// The connection broke; the other host may be alive.
    Broken,
}

/// Where the guest's thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// At an exit, or the point of a slice, which takes inputs.
    AtExit,
    /// At the same exit, which takes no more.
    Left,
    /// Between two exits.
    Running,
}

pub struct Host {
    /// How often it was replaced by a fresh one.
    pub life: u64,
    pub core: PeerCore,
    pub wire: Wire,
    pub pump: Pump,
    pub thread: GuestThread,
    pub disk: Disk,
    pub state: States,
    pub held: Held,
    pub seen: Seen,
    pub crashed: bool,
}

/// The connection to the other host.
#[derive(Default)]
pub struct Wire {
    pub connection: u64,
    /// How often the host at its other end was replaced.
    pub peer_life: u64,
    /// On their way to this host, in order.
    pub pipe: VecDeque<Parcel>,
    /// Arrived while the host stood still: its kernel has them, whatever becomes of the connection.
    pub socket: VecDeque<Parcel>,
}

/// What the core has decided.
#[derive(Default)]
pub struct Pump {
    /// Being done, in order.
    pub outbox: VecDeque<Effect>,
    pub performs: bool,
    pub performs_late: bool,
}

/// The guest and its thread.
pub struct GuestThread {
    pub guest: Guest,
    pub stage: Stage,
    pub begun: bool,
    /// The guest takes this host's inputs.
    pub is_live: bool,
    pub ended: bool,
    /// The operator wants the guest switched off.
    pub ending: bool,
    pub inputs_open: bool,
    /// Frames that came for the guest.
    pub inbox: VecDeque<Vec<u8>>,
    /// A request that ended in the log, while this host's disk is not done with it.
    pub awaited: Option<DiskAnswer>,
    pub replayer: Replayer,
    /// Parts of a slice that are not in the log yet.
    pub slices: VecDeque<Slice>,
    pub has_half_a_slice: bool,
}

/// Guests' states on their way.
#[derive(Default)]
pub struct States {
    /// To the other host or to a file.
    pub sender: Option<Sender>,
    pub restored_bytes: u64,
    /// What is left of the snapshot this host starts from.
    pub snapshot: VecDeque<StatePart>,
    /// The exit and the last request to the disk in the state that is on its way here.
    pub offered: Option<(u64, u64)>,
    /// The last exit in the past of the state this host was given.
    pub state_through: u64,
}

/// Until when something stands still.
#[derive(Default)]
pub struct Held {
    /// The whole host. Its clock runs on.
    pub paused_until_ns: u64,
    /// Its host does not let go of the guest's processor until then.
    pub stuck_until_ns: u64,
    /// The guest makes no exit until then.
    pub computes_since_ns: u64,
    pub computes_until_ns: u64,
    /// Deadline of the tick under way.
    pub tick_due_ns: Option<u64>,
}

/// What the checks at the end ask about.
#[derive(Default)]
pub struct Seen {
    pub received_through: u64,
    /// The term won by this host alone.
    pub own_term: Option<u64>,
    pub phase: &'static str,
    pub frames_after_faults: u64,
    pub answers_after_faults: u64,
}

impl Host {
    /// A host before its first connection, in the given role.
    pub fn new(role: Role, options: &Options, highest_term: Term) -> Self {
        let config = SessionConfig {
            release: options.release,
            on_divergence: options.on_divergence,
            on_link_down: options.on_link_down,
            believe: options.believe,
            heartbeat_ns: 5 * MS,
            failure_ns: FAILURE_NS,
            handshake_ns: 100 * MS,
            evidence_ns: 40 * MS,
            stall_ns: 150 * MS,
            limits: Limits {
                log_bytes_max: 2000,
                gated_frames_max: GATED_FRAMES_MAX,
                gated_bytes_max: 4000,
                ..Limits::default()
            },
            ..SessionConfig::new(
                role,
                "sim".try_into().expect("a name"),
                fingerprint(),
                highest_term,
                1_700_000_000,
            )
        };
        let mut core = PeerCore::new(config, 200 * US, true).expect("the configuration works");
        core.require_proof("memory".to_owned().into());
        Self {
            life: 0,
            core,
            wire: Wire::default(),
            pump: Pump::default(),
            thread: GuestThread {
                guest: Guest::new(0),
                stage: Stage::AtExit,
                begun: false,
                is_live: false,
                ended: false,
                ending: false,
                inputs_open: role == Role::Primary,
                inbox: VecDeque::new(),
                awaited: None,
                replayer: Replayer::new(),
                slices: VecDeque::new(),
                has_half_a_slice: false,
            },
            disk: Disk::default(),
            state: States::default(),
            held: Held::default(),
            seen: Seen::default(),
            crashed: false,
        }
    }

    /// A fresh host in the place of this one, which is gone, with the old disk.
    pub fn replaced(&mut self, options: &Options, highest_term: Term) {
        let mut fresh = Self::new(Role::Backup, options, highest_term);
        fresh.life = self.life + 1;
        fresh.disk = self.disk.left();
        // What its predecessor has executed is still on its way to the primary.
        std::mem::swap(&mut fresh.thread.guest, &mut self.thread.guest);
        fresh.seen.received_through = self.seen.received_through;
        fresh.state.state_through = self.state.state_through;
        *self = fresh;
    }

    /// Something is decided and not done.
    pub fn has_effects(&self) -> bool {
        !self.pump.outbox.is_empty() || self.core.has_effects()
    }

    pub fn has_stopped(&self) -> bool {
        self.core.stop().is_some()
    }

    /// It does nothing any more.
    pub fn is_gone(&self) -> bool {
        self.crashed || self.has_stopped()
    }
}
