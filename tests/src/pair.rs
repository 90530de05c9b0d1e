//! A guest in lockstep on the two hosts of a lab.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use serde::Deserialize;

use ftvmm_guest_images::GuestKernel;

use crate::guest_run::GuestLab;
pub use crate::guest_run::{GUEST_ADDRESS, GUEST_ADDRESS6, READY, TAP};

use crate::lab::{Host, Lab, LabError, LabProcess, at};

/// Where the primary waits for its backup.
pub const PORT: u16 = 7700;

/// Files every guest of a lab boots from, as a host sees them.
#[derive(Clone, Debug)]
pub struct GuestFiles {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
}

impl GuestFiles {
    /// Those of a lab that has them.
    pub fn of(site: &GuestLab, kernel: GuestKernel) -> Self {
        let [kernel, initramfs] = site.boot_files(kernel).map(PathBuf::from);
        Self { kernel, initramfs }
    }

    /// Carries kernel and initramfs into the lab.
    ///
    /// # Errors
    /// When a file cannot be copied.
    pub fn install(lab: &Lab, kernel: &Path, initramfs: &Path) -> Result<Self, LabError> {
        let folder = lab.share().join("guest");
        fs::create_dir_all(&folder).map_err(at(&folder))?;
        for (from, name) in [(kernel, "kernel"), (initramfs, "initramfs")] {
            fs::copy(from, folder.join(name)).map_err(at(from))?;
        }
        let seen = lab.host(0).share().join("guest");
        Ok(Self { kernel: seen.join("kernel"), initramfs: seen.join("initramfs") })
    }
}

/// How the two halves of a pair speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelWay {
    /// Over TLS, with the key of the pair.
    Proved,
    /// In clear, said so on the command line.
    InClear,
    /// As older builds do, which know nothing else.
    Unsaid,
}

impl ChannelWay {
    /// How that is said on the command line, with this key.
    pub(crate) fn words(self, key: String) -> Vec<String> {
        match self {
            Self::Proved => vec!["--channel-key".into(), key],
            Self::InClear => vec!["--insecure-channel".into()],
            Self::Unsaid => Vec::new(),
        }
    }
}

/// How a guest is run.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Guest memory.
    pub memory_mib: u32,
    /// Further kernel parameters.
    pub cmdline: String,
    /// The guest's MAC address, if not the one `ftvmm` chooses.
    pub mac: Option<String>,
    /// The tap on each host.
    pub tap: &'static str,
    /// How the two halves of a pair speak.
    pub channel: ChannelWay,
    /// Further arguments for every `ftvmm`.
    pub arguments: Vec<String>,
    /// Words before `ftvmm`'s own: what runs it.
    pub under: Vec<String>,
    /// Further arguments for the backup's.
    pub backup_arguments: Vec<String>,
    /// File name of the `ftvmm` in the shared directory's `bin`, where another one is to run.
    pub program: &'static str,
    /// The run ends when the guest resets or SIGTERM comes, at once. Older builds did so without
    /// being told.
    pub ends_at_once: bool,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            memory_mib: 128,
            cmdline: String::new(),
            mac: None,
            tap: TAP,
            channel: ChannelWay::Proved,
            arguments: Vec::new(),
            under: Vec::new(),
            backup_arguments: Vec::new(),
            program: "ftvmm",
            ends_at_once: true,
        }
    }
}

/// What `ftvmm --report` writes, as far as the tests look at it.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Report {
    /// Synchronous exits.
    pub exits: u64,
    /// Inputs applied.
    pub inputs: u64,
    /// Frames the guest sent.
    pub outputs: u64,
    /// Bytes of log.
    pub log_bytes: u64,
    /// Slices captured or loaded.
    pub slices: u64,
    /// Resets of the machine, since the guest was first switched on.
    #[serde(default)]
    pub resets: u64,
    /// Divergences found.
    pub divergences: u64,
    /// Take-overs.
    pub takeovers: u64,
    /// From the loss of the peer to the first live exit.
    pub takeover_seconds: Option<f64>,
    /// Frames whose digest was compared.
    pub frames_compared: u64,
    /// Bytes the guest printed that nobody read.
    #[serde(default)]
    pub console_dropped_bytes: u64,
    /// Digest of the whole guest.
    pub state_digest: Option<String>,
    /// What became of the guest's frames.
    #[serde(default)]
    pub network: Network,
    /// Seconds from power-on to the end.
    pub seconds: f64,
}

/// What became of the frames for the guest and of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Network {
    /// Frames the guest transmitted.
    pub tx_frames: u64,
    /// Frames the guest received.
    pub rx_frames: u64,
    /// Addresses it sent from.
    pub sources: u64,
    /// Times it announced itself when it was asked to.
    pub announcements: u64,
    /// Frames it sent that this host's tap did not take.
    pub tx_dropped_by_tap: u64,
    /// Frames that came while the other host was active.
    pub rx_dropped_following: u64,
}

/// Reads a report a host wrote into the shared directory.
///
/// # Errors
/// When it is not there or is none.
pub fn read_report(lab: &Lab, name: &str) -> Result<Report, LabError> {
    let path = lab.share().join(name);
    let text = fs::read_to_string(&path).map_err(at(&path))?;
    serde_json::from_str(&text).map_err(|e| at(&path)(e.into()))
}

pub(crate) fn arguments(host: &Host, files: &GuestFiles, options: &RunOptions) -> Vec<String> {
    let path = |p: &Path| p.display().to_string();
    let cmdline = format!("console=ttyS0 quiet ftguest.ip={GUEST_ADDRESS}/24 {}", options.cmdline);
    let mac = options.mac.as_ref().map(|mac| format!(",mac={mac}")).unwrap_or_default();
    let mut argv = options.under.clone();
    argv.extend([
        path(&host.share().join("bin").join(options.program)),
        "--kernel".into(),
        path(&files.kernel),
        "--initrd".into(),
        path(&files.initramfs),
        "--cmdline".into(),
        cmdline,
        "--mem".into(),
        options.memory_mib.to_string(),
        "--net".into(),
        format!("tap={}{mac}", options.tap),
    ]);
    let says_itself = options.arguments.iter().any(|argument| argument == "--on-reset");
    if options.ends_at_once && !says_itself {
        argv.extend(["--on-reset", "end", "--stop-grace", "0"].map(str::to_owned));
    }
    argv.extend(options.arguments.iter().cloned());
    argv
}

pub(crate) fn ensure_tap(host: &Host, tap: &str) -> Result<(), LabError> {
    let present = host.run(&["test", "-e", &format!("/sys/class/net/{tap}")])?;
    if present.ended.success() { Ok(()) } else { host.tap(tap) }
}

/// Starts an unprotected guest on host `index`; its report goes to `NAME` in the shared directory.
///
/// # Errors
/// What the host answered.
pub fn start_solo(
    lab: &Lab,
    index: usize,
    files: &GuestFiles,
    options: &RunOptions,
    report: &str,
) -> Result<LabProcess, LabError> {
    let host = lab.host(index);
    ensure_tap(host, options.tap)?;
    let mut argv = arguments(host, files, options);
    argv.extend(["--report".into(), host.share().join(report).display().to_string()]);
    host.spawn(&argv)
}

/// Names of what the two halves of a pair share, before they run.
#[derive(Clone, Debug)]
pub struct PairNames {
    /// Key file of the channel in the shared directory.
    pub key: String,
    /// The witness in the shared directory; the file of term N has the suffix `.N`.
    pub witness: String,
    /// Folder of incident reports in the shared directory.
    pub incidents: String,
    /// The primary's report in the shared directory.
    pub primary_report: String,
    /// The backup's.
    pub backup_report: String,
}

impl PairNames {
    /// Names that no pair of this program has had.
    ///
    /// # Errors
    /// When the folder for incidents cannot be made.
    pub fn new(lab: &Lab) -> Result<Self, LabError> {
        static RUNS: AtomicU32 = AtomicU32::new(0);
        let run = RUNS.fetch_add(1, Ordering::Relaxed);
        let incidents = format!("incidents-{run}");
        let folder = lab.share().join(&incidents);
        fs::create_dir_all(&folder).map_err(at(&folder))?;
        let key = format!("channel-{}-{run}.key", std::process::id());
        make_key(lab, &key)?;
        Ok(Self {
            key,
            witness: format!("witness-{run}"),
            incidents,
            primary_report: format!("primary-{run}.json"),
            backup_report: format!("backup-{run}.json"),
        })
    }

    /// Starts the primary on host 0.
    ///
    /// # Errors
    /// What the host answered.
    pub fn start_primary(
        &self,
        lab: &Lab,
        files: &GuestFiles,
        options: &RunOptions,
    ) -> Result<LabProcess, LabError> {
        let role = ["primary", "--listen"];
        self.launch(
            lab,
            lab.host(0),
            role,
            &self.primary_report,
            arguments(lab.host(0), files, options),
            options.channel,
        )
    }

    /// Starts the backup on host 1.
    ///
    /// # Errors
    /// What the host answered.
    pub fn start_backup(
        &self,
        lab: &Lab,
        files: &GuestFiles,
        options: &RunOptions,
    ) -> Result<LabProcess, LabError> {
        let role = ["backup", "--connect"];
        let mut argv = arguments(lab.host(1), files, options);
        argv.extend(options.backup_arguments.iter().cloned());
        self.launch(lab, lab.host(1), role, &self.backup_report, argv, options.channel)
    }

    fn launch(
        &self,
        lab: &Lab,
        host: &Host,
        [role, way]: [&str; 2],
        report: &str,
        mut argv: Vec<String>,
        channel: ChannelWay,
    ) -> Result<LabProcess, LabError> {
        ensure_tap(host, TAP)?;
        let share = |name: &str| host.share().join(name).display().to_string();
        argv.extend([
            "--role".into(),
            role.into(),
            way.into(),
            format!("{}:{PORT}", lab.host(0).link_address()),
            "--witness".into(),
            format!("file:{}", share(&self.witness)),
            "--report".into(),
            share(report),
            "--incident-dir".into(),
            share(&self.incidents),
        ]);
        argv.extend(channel.words(share(&self.key)));
        host.spawn(&argv)
    }
}

/// Makes a key with `ftvmm keygen` on host 0, which every host of the lab reads in the shared
/// directory.
///
/// # Errors
/// What the host answered.
fn make_key(lab: &Lab, name: &str) -> Result<(), LabError> {
    let host = lab.host(0);
    let share = |name: &str| host.share().join(name).display().to_string();
    let made = host.run(&[share("bin/ftvmm"), "keygen".into(), share(name)])?;
    match made.ended.success() {
        true => Ok(()),
        false => {
            Err(at(name)(std::io::Error::other(String::from_utf8_lossy(&made.stderr).into_owned())))
        }
    }
}

/// A primary on one host and its backup on the other.
pub struct Pair {
    /// The `ftvmm` that started as the primary.
    pub primary: LabProcess,
    /// The `ftvmm` that started as the backup.
    pub backup: LabProcess,
    /// Name of the primary's report in the shared directory.
    pub primary_report: String,
    /// Name of the backup's.
    pub backup_report: String,
    /// The witness in the shared directory; the file of term N has the suffix `.N`.
    pub witness: String,
    /// Folder of incident reports in the shared directory.
    pub incidents: String,
}

impl Pair {
    /// Starts a pair, the primary on host 0.
    ///
    /// # Errors
    /// What the hosts answered.
    pub fn start(lab: &Lab, files: &GuestFiles, options: &RunOptions) -> Result<Self, LabError> {
        let names = PairNames::new(lab)?;
        let primary = names.start_primary(lab, files, options)?;
        let backup = names.start_backup(lab, files, options)?;
        let PairNames { witness, incidents, primary_report, backup_report, .. } = names;
        Ok(Self { primary, backup, primary_report, backup_report, witness, incidents })
    }
}
