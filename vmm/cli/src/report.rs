//! What a run reports at its end (`--report FILE.json`).

use std::collections::BTreeMap;

use ftvmm_devices::DiskCounters;
use ftvmm_machine::net_watch::NetworkReport;
use ftvmm_machine::situation::StopCause;
use serde::Serialize;

/// How much of a run a recording has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RunCompleteness {
    /// All of it, and how it ended.
    Complete,
    /// It ends between two groups and does not say how the run ended: its recorder was killed, or
    /// it is of a part of a run.
    Unfinished,
    /// It ends within a group, or its last group is damaged.
    Torn,
    /// The replay was not to run to its end.
    NotReached,
}

/// The report, one JSON object.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// `solo`, `primary`, `backup` or `replay`: the role the run began in.
    pub role: &'static str,
    /// Why the run ended; absent when it failed.
    pub end: Option<StopCause>,
    /// How often the guest reset the machine and was started again.
    pub resets: u64,
    /// Synchronous exits.
    pub exits: u64,
    /// Inputs applied.
    pub inputs: u64,
    /// Frames the guest sent.
    pub outputs: u64,
    /// Bytes of log written or read.
    pub log_bytes: u64,
    /// Why a recording has less than the guest did, if it could not be written.
    pub recording_error: Option<String>,
    /// Of a replay: how much of a run the recording has.
    pub recording: Option<RunCompleteness>,
    /// Slices sent.
    pub slices: u64,
    /// Divergences found.
    pub divergences: u64,
    /// Take-overs by this side.
    pub takeovers: u64,
    /// From the loss of the peer to the first live exit, if this side took over.
    pub takeover_seconds: Option<f64>,
    /// Backups that attached and got this side's state.
    pub attaches: u64,
    /// Longest time the guest stood still for one of them.
    pub attach_stopped_seconds: Option<f64>,
    /// Planned switches of roles in which this side took part.
    pub switches: u64,
    /// Frames whose digest the two sides compared.
    pub frames_compared: u64,
    /// Digest of registers, all memory and device state, in hexadecimal; absent when the run did
    /// not end at an exit.
    pub state_digest: Option<String>,
    /// Kernel RDTSC and RDTSCP instructions that were turned into port reads.
    pub rdtsc_sites: usize,
    /// Such instructions, and moves from and to CR4, in modules and other code that came later,
    /// trapped before it ran.
    pub rdtsc_new_sites: usize,
    /// Kernels the guest started itself (kexec), trapped before they ran on.
    pub other_kernels: u64,
    /// Such instructions, and moves from and to CR4, found while the guest ran: they may have been
    /// executed before.
    pub rdtsc_late_sites: u64,
    /// RDTSC and RDTSCP answered in user mode.
    pub rdtsc_user_reads: u64,
    /// #GPs that were none of those.
    pub gp_passed: u64,
    /// Host seconds from the guest's first instruction to its end.
    pub seconds: f64,
    /// What became of the frames for the guest and of its own.
    pub network: NetworkReport,
    /// What the guest asked of its disk.
    pub disk: DiskCounters,
    /// Guest faults the devices answered (malformed descriptors and the like).
    pub guest_faults: u64,
    /// Bytes of the guest's console output that were dropped, because they were not read in time.
    pub console_dropped_bytes: u64,
    /// Bytes of this run's log on standard error that were dropped, because they were not read in
    /// time.
    pub log_dropped_bytes: u64,
    /// MSRs that the CPU template does not name, in hexadecimal, and how often the guest tried
    /// each: all were #GP.
    pub unknown_msrs: BTreeMap<String, u64>,
}

/// Bytes as lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
