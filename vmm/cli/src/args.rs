//! The command line (decision 0024).

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use super::channel_arg::ChannelArgs;
pub use super::choices::{
    Believe, OnDiskError, OnDivergence, OnLinkDown, PanicPolicy, RecordError, Release, ResetPolicy,
    RoleArg, Tsc,
};
use super::contain_args::ContainArgs;
use super::disk_arg::DiskArg;
use super::net_arg::NetArg;
use super::witness_arg::{WitnessArg, WitnessOptions};

/// A deterministic record-replay VMM on stock KVM: runs a guest alone, records and replays it, or
/// runs it on two hosts in lockstep so that one may die.
#[derive(Debug, Parser)]
#[command(
    name = "ftvmm",
    version = ftvmm_runtime::build::NAME,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub struct Cli {
    /// What to do instead of running a guest.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to run a guest.
    #[command(flatten)]
    pub run: RunArgs,
}

/// Everything but running a guest.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a recording again, instruction by instruction
    Replay(Box<ReplayArgs>),
    /// Look into recordings
    #[command(subcommand)]
    Log(LogCommand),
    /// Test this machine's KVM and print what works
    Doctor(DoctorArgs),
    /// Make a key file for the channel between two hosts: copy it to both
    Keygen(KeygenArgs),
    /// Print the state of a running ftvmm
    Status(StatusArgs),
    /// Print where the time of a running ftvmm has gone; it needs --profile
    Profile(ControlArgs),
    /// Have a running ftvmm accept a backup
    Attach(AttachArgs),
    /// Have a running ftvmm let its backup go
    Detach(ControlArgs),
    /// Have a running ftvmm and its backup change roles
    Switch(ControlArgs),
    /// Have a running ftvmm write its guest's state to a file; the guest goes on
    Snapshot(SnapshotArgs),
    /// Press the guest's power button; a guest that does not listen, or takes too long, ends at its
    /// next exit
    Stop(ControlArgs),
    /// Send the guest of a running ftvmm a non-maskable interrupt, for a crash dump
    Nmi(ControlArgs),
}

/// `ftvmm …`: run a guest.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Kernel: an x86-64 bzImage or ELF vmlinux
    #[arg(long, value_name = "FILE", required_unless_present = "restore")]
    pub kernel: Option<PathBuf>,
    /// Go on from a snapshot, with its guest: memory, command line and the rest are as they were
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["mem", "cmdline", "tsc", "on_reset", "on_panic", "connect"],
    )]
    pub restore: Option<PathBuf>,
    /// Initramfs
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line; what the machine itself needs is added
    #[arg(long, value_name = "STRING", default_value = "console=ttyS0")]
    pub cmdline: String,
    /// Guest memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    pub mem: u32,
    /// CPU the guest sees: minimal, sse4, avx, or a template file [default: minimal]
    #[arg(long, value_name = "NAME|FILE")]
    pub cpu_template: Option<PathBuf>,
    /// Network card on an existing tap:
    /// tap=NAME[,mac=aa:bb:cc:dd:ee:ff][,mtu=BYTES][,uplink=NAME]; the MTU is the tap's;
    /// the uplink is the interface that leads to the clients, which is watched with the tap
    #[allow(rustdoc::broken_intra_doc_links, reason = "clap prints this text as it is")]
    #[arg(long, value_name = "tap=NAME[,mac=M][,mtu=N][,uplink=NAME]")]
    pub net: Option<NetArg>,
    /// Disk: a raw image file; each host has its own copy, with the same content at the start.
    /// path=FILE[,label=FILE][,force=incomplete|outdated|guest]; label is where it is noted what
    /// the disk is, FILE.ftvmm by itself; force uses a disk that speaks against it
    #[allow(rustdoc::broken_intra_doc_links, reason = "clap prints this text as it is")]
    #[arg(long, value_name = "path=FILE[,label=F][,force=WHY]")]
    pub disk: Option<DiskArg>,
    /// What a failure of this host's disk leads to while another host runs the guest too
    #[arg(long, value_enum, default_value_t = OnDiskError::Report, requires = "disk")]
    pub disk_error: OnDiskError,
    /// What user mode's RDTSC and RDTSCP do
    #[arg(long, value_enum, default_value_t = Tsc::Trap)]
    pub tsc: Tsc,
    /// When the guest resets the machine: it goes back to power-on in the same run, or the run
    /// ends
    #[arg(long, value_enum, default_value_t = ResetPolicy::Restart)]
    pub on_reset: ResetPolicy,
    /// When the guest's kernel panics: the run ends with status 1, the machine goes back to
    /// power-on, or nothing
    #[arg(long, value_enum, default_value_t = PanicPolicy::End)]
    pub on_panic: PanicPolicy,
    /// Seconds that a guest which listens to its power button has to switch itself off after an
    /// order to stop; 0 for none
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 10,
        value_parser = clap::value_parser!(u64).range(..=86_400),
    )]
    pub stop_grace: u64,
    /// Role of this host at the start
    #[arg(long, value_enum, default_value_t = RoleArg::Solo)]
    pub role: RoleArg,
    /// Address where a backup may connect: to a primary, or to a backup that has taken over (its
    /// default: the primary's port at its own address)
    #[arg(
        long,
        value_name = "ADDR",
        required_if_eq_any([("role", "primary"), ("role", "auto")])
    )]
    pub listen: Option<SocketAddr>,
    /// Address of the primary
    #[arg(long, value_name = "ADDR", required_if_eq("role", "backup"))]
    pub connect: Option<SocketAddr>,
    /// Address of the other host, which listens there (auto)
    #[arg(long, value_name = "ADDR", required_if_eq("role", "auto"))]
    pub peer: Option<SocketAddr>,
    /// How the two hosts know each other.
    #[command(flatten)]
    pub channel: ChannelArgs,
    /// Start the guest without waiting for a backup, which may attach later (primary)
    #[arg(long, conflicts_with = "connect")]
    pub start_alone: bool,
    /// Start another guest in the place of the one the witness knows, which can go on nowhere
    /// after that (primary)
    #[arg(long)]
    pub force_new_guest: bool,
    /// Witness, which decides which host may be active: a file's path or a cluster's members.
    #[arg(
        long,
        value_name = "WITNESS",
        help = "Witness, which decides which host may be active: file:PATH on storage both hosts \
                share, or etcd:URL[,URL...][/PREFIX], an etcd cluster's members and the guest's \
                place in it",
        required_if_eq_any([("role", "primary"), ("role", "backup"), ("role", "auto")])
    )]
    pub witness: Option<WitnessArg>,
    /// How this host and etcd find out who the other is.
    #[command(flatten)]
    pub witness_options: WitnessOptions,
    /// When a frame may leave: after the backup sent the same, or after it has the log
    #[arg(long, value_enum, default_value_t = Release::Compare)]
    pub release: Release,
    /// What to do when the two differ: the primary goes on alone, both stop, or the state of the
    /// one that is believed replaces the other's
    #[arg(long, value_enum, default_value_t = OnDivergence::Failover)]
    pub on_divergence: OnDivergence,
    /// Whose state --on-divergence resync keeps
    #[arg(long, value_enum, default_value_t = Believe::Primary)]
    pub believe: Believe,
    /// What to do when the tap or the uplink of this host is down and the other's is not, while
    /// this host is active
    #[arg(long, value_enum, default_value_t = OnLinkDown::Switch)]
    pub on_link_down: OnLinkDown,
    /// Silence after which the peer counts as dead, in milliseconds
    #[arg(
        long,
        value_name = "MS",
        default_value_t = 500,
        value_parser = clap::value_parser!(u64).range(10..),
    )]
    pub failure_timeout_ms: u64,
    /// Longest time the log is held back before the backup gets it, in microseconds
    #[arg(
        long,
        value_name = "US",
        default_value_t = 200,
        value_parser = clap::value_parser!(u64).range(1..),
    )]
    pub horizon_us: u64,
    /// Longest time in milliseconds that an input waits for an exit of a computing guest
    /// [default: 5; for timer ticks up to 100 while slices are expensive or the guest boots]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub max_input_delay: Option<u64>,
    /// Exits between two checks of exits and registers in the log; 0 for none
    #[arg(long, value_name = "EXITS", default_value_t = 1024)]
    pub check_every: u64,
    /// Exits between two checks of all memory in the log; 0 for none
    #[arg(long, value_name = "EXITS", default_value_t = 1024)]
    pub check_memory_every: u64,
    /// Write a recording, into a new file; the guest then needs twice its memory
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// What happens when the recording cannot be written any more
    #[arg(long, value_enum, default_value_t = RecordError::Continue, requires = "record")]
    pub record_error: RecordError,
    /// What is written at the end.
    #[command(flatten)]
    pub written: WrittenArgs,
    /// Serve HTTP and JSON on this Unix socket: status, attach, detach, switch, snapshot, nmi,
    /// stop
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// What the run may still do.
    #[command(flatten)]
    pub contain: ContainArgs,
    /// Folder for incident reports
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub incident_dir: PathBuf,
    /// For tests: flip one bit of this guest at an exit, mem:ADDR:BIT@EXIT or reg:NAME:BIT@EXIT,
    /// or hold its processor there, hang:MS@EXIT
    #[arg(long, value_name = "FAULT", hide = true)]
    pub inject_fault: Option<ftvmm_machine::fault::Fault>,
}

/// What a run or a replay writes when it ends.
#[derive(Clone, Debug, Default, Args)]
pub struct WrittenArgs {
    /// Write a report of the run at its end
    #[arg(long, value_name = "FILE.json")]
    pub report: Option<PathBuf>,
    /// Count where the run's time goes, by thread and phase, and write that at its end
    #[arg(long, value_name = "FILE.json")]
    pub profile: Option<PathBuf>,
    /// Replace the files of --record, --report and --profile if they are there
    #[arg(long)]
    pub overwrite: bool,
}

/// `ftvmm replay`.
#[derive(Clone, Debug, Args)]
pub struct ReplayArgs {
    /// The recording
    pub file: PathBuf,
    /// Stop before this exit is answered
    #[arg(long, value_name = "EXIT")]
    pub until: Option<u64>,
    /// Begin at the last snapshot that was taken at or before this exit
    #[arg(long, value_name = "EXIT")]
    pub from: Option<u64>,
    /// The snapshot to begin with, if it is elsewhere now
    #[arg(long, value_name = "FILE")]
    pub snapshot: Option<PathBuf>,
    /// The recorded kernel, if it is elsewhere now
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The recorded initramfs, if it is elsewhere now
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// The recorded CPU template, if it was a file
    #[arg(long, value_name = "FILE")]
    pub cpu_template: Option<PathBuf>,
    /// Write a recording of the replay: the same inputs, and checks of what this guest did
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// Exits between two checks of exits and registers, besides the recorded ones; 0 for none
    #[arg(long, value_name = "EXITS", default_value_t = 0, requires = "record")]
    pub check_every: u64,
    /// Exits between two checks of all memory, besides the recorded ones; 0 for none
    #[arg(long, value_name = "EXITS", default_value_t = 0, requires = "record")]
    pub check_memory_every: u64,
    /// The first exit that may have such a check
    #[arg(long, value_name = "EXIT", default_value_t = 1, requires = "record")]
    pub check_from: u64,
    /// What is written at the end.
    #[command(flatten)]
    pub written: WrittenArgs,
    /// For tests: as without `replay`
    #[arg(long, value_name = "FAULT", hide = true)]
    pub inject_fault: Option<ftvmm_machine::fault::Fault>,
}

/// `ftvmm log …`.
#[derive(Debug, Subcommand)]
pub enum LogCommand {
    /// Sum up recordings
    Stat {
        /// The recordings
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Print every record
    Dump {
        /// The recording
        file: PathBuf,
    },
    /// Find the first exit at which two recordings differ: inputs, registers, instruction, pages
    Diff {
        /// One recording
        left: PathBuf,
        /// The other
        right: PathBuf,
        /// Name the functions of this kernel: an ELF file with symbols
        #[arg(long, value_name = "FILE")]
        vmlinux: Option<PathBuf>,
    },
}

/// `ftvmm doctor`.
#[derive(Clone, Copy, Debug, Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `ftvmm keygen`.
#[derive(Clone, Debug, Args)]
pub struct KeygenArgs {
    /// The new file, which only its owner may read
    pub file: PathBuf,
}

/// Which running ftvmm is meant.
#[derive(Clone, Debug, Args)]
pub struct ControlArgs {
    /// Its control socket
    #[arg(long, value_name = "PATH")]
    pub control: PathBuf,
}

/// `ftvmm status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// Which one.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Print JSON, one object a line
    #[arg(long)]
    pub json: bool,
    /// Ask again every so many milliseconds, until the run ends
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..))]
    pub every: Option<u64>,
}

/// `ftvmm attach`.
#[derive(Clone, Debug, Args)]
pub struct AttachArgs {
    /// Which one.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Address where it waits for the backup
    #[arg(long, value_name = "ADDR")]
    pub listen: SocketAddr,
}

/// `ftvmm snapshot`.
#[derive(Clone, Debug, Args)]
pub struct SnapshotArgs {
    /// The file
    pub file: PathBuf,
    /// Which one.
    #[command(flatten)]
    pub control: ControlArgs,
}

#[cfg(test)]
pub(super) mod tests;
