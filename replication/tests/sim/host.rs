//! One host: its session, and what lies around it.

use std::collections::VecDeque;

use ftvmm_replication::wire::Decoder;
use ftvmm_replication::{
    Fingerprint, GroupEncoder, Limits, OnPanic, OnReset, PROTOCOL_VERSION, ReplayCursor, Role,
    Session, SessionConfig, StopReason, Term, TscMode,
};

use crate::guest::Guest;
use crate::world::{FAILURE_NS, MS, Options};

pub enum Parcel {
    Bytes(Vec<u8>),
    Closed,
}

pub struct Host {
    /// How often it was replaced by a fresh one.
    pub life: u64,
    pub session: Session,
    pub connection: u64,
    pub decoder: Decoder,
    /// On their way to this host, in order.
    pub pipe: VecDeque<Parcel>,
    pub guest: Guest,
    pub encoder: GroupEncoder,
    /// `Some` while the guest follows a log.
    pub cursor: Option<ReplayCursor>,
    pub begun: bool,
    pub ended: bool,
    /// The guest left the log's path.
    pub faulted: bool,
    pub congested: bool,
    pub crashed: bool,
    pub paused_until_ns: u64,
    /// Its host does not let go of the guest's processor until then.
    pub stuck_until_ns: u64,
    /// Deadline of the tick under way.
    pub tick_due_ns: Option<u64>,
    pub received_through: u64,
    /// The term won by this host alone.
    pub own_term: Option<u64>,
    pub stopped: Option<StopReason>,
    pub frames_after_faults: u64,
    /// Parts of the state that are to be sent before the machine.
    pub shipping: Option<u64>,
    /// A state is on its way here.
    pub joining: bool,
    pub taken_bytes: u64,
    /// What was taken is not reported yet.
    pub untold: bool,
    /// The operator wants the roles to change.
    pub switch_wanted: bool,
    /// Frames for the guest that will come to its old place.
    pub strays: u64,
    /// Frames that came to the guest's old place.
    pub received: VecDeque<Vec<u8>>,
}

impl Host {
    /// A host before its first connection, in the given role.
    pub fn new(role: Role, options: &Options, highest_term: Term) -> Self {
        let fingerprint = Fingerprint {
            protocol_version: PROTOCOL_VERSION,
            kernel_sha256: [1; 32],
            initramfs_sha256: None,
            disk_bytes: None,
            disk_sha256: None,
            cmdline: "console=ttyS0".into(),
            cpu_template: "sim".into(),
            cpu_template_sha256: [2; 32],
            tsc: TscMode::Trap,
            memory_mib: 1,
            net_mac: None,
            net_mtu: None,
            on_reset: OnReset::default(),
            on_panic: OnPanic::default(),
        };
        let config = SessionConfig {
            release: options.release,
            on_divergence: options.on_divergence,
            on_link_down: options.on_link_down,
            believe: options.believe,
            heartbeat_ns: 5 * MS,
            failure_ns: FAILURE_NS,
            handshake_ns: 100 * MS,
            evidence_ns: 40 * MS,
            limits: Limits {
                log_bytes_max: 2000,
                gated_frames_max: 12,
                gated_bytes_max: 4000,
                ..Limits::default()
            },
            ..SessionConfig::new(
                role,
                "sim".try_into().expect("a name"),
                fingerprint,
                highest_term,
                1_700_000_000,
            )
        };
        Self {
            life: 0,
            session: Session::new(config).expect("the configuration works"),
            connection: 0,
            decoder: Decoder::new(),
            pipe: VecDeque::new(),
            guest: Guest::new(0),
            encoder: GroupEncoder::new(),
            cursor: (role == Role::Backup).then(ReplayCursor::new),
            begun: false,
            ended: false,
            faulted: false,
            congested: false,
            crashed: false,
            paused_until_ns: 0,
            stuck_until_ns: 0,
            tick_due_ns: None,
            received_through: 0,
            own_term: None,
            stopped: None,
            frames_after_faults: 0,
            shipping: None,
            joining: false,
            taken_bytes: 0,
            untold: false,
            switch_wanted: false,
            strays: 0,
            received: VecDeque::new(),
        }
    }

    /// A fresh host in the place of this one, which is gone.
    pub fn replaced(&mut self, options: &Options, highest_term: Term) {
        let mut fresh = Self::new(Role::Backup, options, highest_term);
        fresh.life = self.life + 1;
        // What its predecessor has executed is still on its way to the primary.
        std::mem::swap(&mut fresh.guest, &mut self.guest);
        fresh.received_through = self.received_through;
        *self = fresh;
    }

    /// It does nothing any more.
    pub fn is_gone(&self) -> bool {
        self.crashed || self.stopped.is_some()
    }
}
