//! `ftvmm` and its guest in a lab: what every end-to-end test starts from.
//!
//! A [`GuestLab`] is a lab whose shared folder holds the program and the guest images. A
//! [`GuestRun`] is one `ftvmm` process on a host with its console at hand. Recordings and reports
//! lie in the shared folder, so that they outlive the host.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use ftvmm_guest_images::{Guest, GuestKernel};
use serde::Deserialize;

use crate::Program;
use crate::lab::{Backend, Ended, Lab, LabConfig, LabError, LabProcess, choose_backend};

/// Names the folder of a finished guest and so spares the look into the cache.
pub const GUEST_FOLDER: &str = "FTVMM_GUEST";
/// Address of the guest in the clients' network.
pub const GUEST_ADDRESS: &str = "10.78.0.10";
/// Its IPv6 address there, for a guest that is given one.
pub const GUEST_ADDRESS6: &str = "fd78::10";
/// The tap that [`GuestLab::start`] makes on every host.
pub const TAP: &str = "ftvm0";
/// Another, for a second guest on a host; it is made where it is used.
pub const SECOND_TAP: &str = "ftvm1";
/// What the guest's init prints when its servers listen.
pub const READY: &str = "FTGUEST READY";
/// The prompt of the guest's shell.
pub const PROMPT: &str = "ftguest# ";

/// Why a guest could not be run.
#[derive(Debug, thiserror::Error)]
pub enum GuestRunError {
    /// The lab failed.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file concerned.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// `cargo xtask guest` failed; it said why on standard error.
    #[error("`cargo xtask guest` made no guest images")]
    NoGuest,
    /// The run ended while something was still expected on its console.
    #[error("ftvmm ended ({ended:?}) without {wanted:?} on its console\n{tail}")]
    EndedEarly {
        /// How it ended.
        ended: Option<Ended>,
        /// What was waited for.
        wanted: String,
        /// The last it said.
        tail: String,
    },
    /// No snapshot was made; what `ftvmm` said.
    #[error("no snapshot: {0}")]
    NotSaved(String),
    /// An image could not be made.
    #[error(transparent)]
    Image(#[from] ftvmm_guest_images::GuestBuildError),
    /// There is no report, or none that can be read.
    #[error("{}: {reason}", path.display())]
    BadReport {
        /// Where it should be.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> GuestRunError {
    let path = path.to_owned();
    move |source| GuestRunError::Io { path, source }
}

/// What `--report` writes (`vmm/cli/src/report.rs`), as far as tests compare it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Report {
    /// `solo`, `primary`, `backup` or `replay`.
    pub role: String,
    /// Why the run ended.
    pub end: Option<String>,
    /// How often the guest was started again.
    pub resets: u64,
    /// Synchronous exits.
    pub exits: u64,
    /// Inputs applied.
    pub inputs: u64,
    /// Frames the guest sent.
    pub outputs: u64,
    /// Bytes of log written or read.
    pub log_bytes: u64,
    /// Stops that were forced on a computing guest and logged with its state.
    pub slices: u64,
    /// Digest of the whole guest.
    pub state_digest: Option<String>,
    /// MSRs that no template names, and how often the guest tried each.
    pub unknown_msrs: BTreeMap<String, u64>,
    /// RDTSC and RDTSCP answered in user mode.
    pub rdtsc_user_reads: u64,
    /// Kernel instructions trapped in code that came later, before it ran.
    pub rdtsc_new_sites: u64,
    /// Kernels the guest started itself.
    pub other_kernels: u64,
    /// Kernel instructions that were trapped while the guest ran.
    pub rdtsc_late_sites: u64,
    /// #GPs handed on to the guest.
    pub gp_passed: u64,
}

/// The `ftvmm` program beside the running test.
///
/// # Errors
/// [`LabError::NotBuilt`] names the command that builds it.
pub fn ftvmm_program() -> Result<PathBuf, LabError> {
    let own = std::env::current_exe().unwrap_or_default();
    // A test lies in `deps` below the directory of the programs.
    let places = || own.ancestors().skip(1).take(2).map(|p| p.join("ftvmm"));
    places().find(|path| path.is_file()).ok_or_else(|| LabError::NotBuilt {
        path: places().last().unwrap_or_default(),
        command: "cargo build --release --package ftvmm",
    })
}

/// The guest images, made by `cargo xtask guest` where the cache lacks them.
///
/// # Errors
/// [`GuestRunError::NoGuest`].
pub fn guest_images() -> Result<Guest, GuestRunError> {
    static FOUND: Mutex<Option<Guest>> = Mutex::new(None);
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(guest) = &*found {
        return Ok(guest.clone());
    }
    let folder = match std::env::var_os(GUEST_FOLDER) {
        Some(folder) => PathBuf::from(folder),
        None => ask_xtask()?,
    };
    Ok(found.insert(Guest::in_folder(&folder)).clone())
}

fn ask_xtask() -> Result<PathBuf, GuestRunError> {
    let said = Program::Cargo
        .command()
        .map_err(LabError::from)?
        .args(["xtask", "guest"])
        .stderr(Stdio::inherit())
        .output()
        .map_err(at(Path::new("cargo")))?;
    let printed = String::from_utf8_lossy(&said.stdout);
    let folder = printed.lines().next_back().filter(|_| said.status.success());
    folder.map(PathBuf::from).ok_or(GuestRunError::NoGuest)
}

/// A lab whose hosts can run the guest.
pub struct GuestLab {
    /// The lab itself.
    pub lab: Lab,
    /// The images as the outer machine sees them.
    pub guest: Guest,
}

impl GuestLab {
    /// Starts a lab in an emptied `folder` and puts program, images and taps into place.
    ///
    /// # Errors
    /// What the lab or the file system said.
    pub fn start(folder: &Path, hosts: usize) -> Result<Self, GuestRunError> {
        let (backend, _) = choose_backend(&ftvmm_program()?)?;
        Self::with(LabConfig { hosts, ..LabConfig::new(backend, folder)? })
    }

    /// As [`Self::start`], with one emulated host whose clocks count its instructions, and
    /// `traffic` on it.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_counting(folder: &Path) -> Result<Self, GuestRunError> {
        let config = LabConfig::new(Backend::Lab, folder)?;
        let this = Self::with(LabConfig { counts_instructions: true, ..config })?;
        let ftvmm = ftvmm_program()?;
        this.lab.install(&ftvmm.with_file_name("traffic"))?;
        Ok(this)
    }

    fn with(config: LabConfig) -> Result<Self, GuestRunError> {
        let guest = guest_images()?;
        let ftvmm = ftvmm_program()?;
        let (folder, hosts) = (&config.folder, config.hosts);
        if folder.exists() {
            fs::remove_dir_all(folder).map_err(at(folder))?;
        }
        let lab = Lab::start(config)?;
        lab.install(&ftvmm)?;
        let this = Self { lab, guest };
        for image in this.images() {
            let place = this.outside(name_of(&image));
            fs::copy(&image, &place).map_err(at(&place))?;
        }
        for host in (0..hosts).map(|index| this.lab.host(index)) {
            host.tap(TAP)?;
        }
        Ok(this)
    }

    /// A file of the shared folder as the outer machine sees it.
    pub fn outside(&self, name: impl AsRef<Path>) -> PathBuf {
        self.lab.share().join(name)
    }

    /// The same file as every host sees it.
    pub fn inside(&self, name: impl AsRef<Path>) -> String {
        self.lab.host(0).share().join(name).display().to_string()
    }

    /// `ftvmm` with the tiny kernel and the initramfs, then `more`.
    pub fn boot(&self, more: &[&str]) -> Vec<String> {
        self.boot_kernel(GuestKernel::Tiny, more)
    }

    /// As [`Self::boot`], with another kernel and its initramfs.
    pub fn boot_kernel(&self, kernel: GuestKernel, more: &[&str]) -> Vec<String> {
        // A reset ends the run, and so does SIGTERM; tests of both boot with [`Self::power_on`].
        let ends = ["--on-reset", "end", "--stop-grace", "0"];
        self.power_on(kernel, &[&ends, more].concat())
    }

    /// As [`Self::boot_kernel`], as a user would.
    pub fn power_on(&self, kernel: GuestKernel, more: &[&str]) -> Vec<String> {
        let [kernel, initramfs] = self.boot_files(kernel);
        // An initramfs of the caller's stands for the kernel's own.
        let own = if more.contains(&"--initrd") { &[][..] } else { &["--initrd", &initramfs] };
        let words = ["ftvmm", "--kernel", &kernel].into_iter().chain(own.iter().copied());
        words.chain(more.iter().copied()).map(str::to_owned).collect()
    }

    /// A kernel and its initramfs, as every host sees them.
    pub fn boot_files(&self, kernel: GuestKernel) -> [String; 2] {
        self.guest.boot_files(kernel).map(|path| self.inside(name_of(&path)))
    }

    /// Starts `command` on the first host; its report goes to `<name>.json` in the shared folder.
    ///
    /// # Errors
    /// What the lab said.
    pub fn run(&self, name: &str, mut command: Vec<String>) -> Result<GuestRun, GuestRunError> {
        let report = format!("{name}.json");
        command.extend(["--report".to_owned(), self.inside(&report)]);
        let process = self.lab.host(0).spawn(&command)?;
        Ok(GuestRun { process, report: self.outside(report) })
    }

    /// Runs an `ftvmm` that answers and ends; of its output there is no report.
    ///
    /// # Errors
    /// What the lab said.
    pub fn ask(&self, words: &[&str]) -> Result<Finished, GuestRunError> {
        let output = self.lab.host(0).run(&[&["ftvmm"], words].concat())?;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok(Finished { ended: output.ended, errors, console: output.stdout, report: None })
    }

    /// Has the guest behind the control socket `socket` saved as `name` of the shared folder; the
    /// file's path as every host sees it.
    ///
    /// # Errors
    /// What the lab said; [`GuestRunError::NotSaved`].
    pub fn save(&self, socket: &str, name: &str) -> Result<String, GuestRunError> {
        let snapshot = self.inside(name);
        let asked = self.ask(&["snapshot", &snapshot, "--control", socket])?;
        if asked.ended.success() {
            Ok(snapshot)
        } else {
            Err(GuestRunError::NotSaved(asked.errors))
        }
    }

    /// Replays the recording `log` of the shared folder to its end.
    ///
    /// # Errors
    /// What the lab said.
    pub fn replay(&self, name: &str, log: &str, more: &[&str]) -> Result<Finished, GuestRunError> {
        let log = self.inside(log);
        let words = ["ftvmm", "replay", &log];
        let command = words.iter().chain(more).map(|&word| word.to_owned());
        self.run(name, command.collect())?.finish()
    }

    /// Writes a file into the shared folder.
    ///
    /// # Errors
    /// What the file system said.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<(), GuestRunError> {
        let place = self.outside(name);
        fs::write(&place, content).map_err(at(&place))
    }

    /// The cloud kernel's initramfs with kernels for `kexec`, as every host sees it. Made at the
    /// first call.
    ///
    /// # Errors
    /// What the file system said.
    pub fn kexec_initramfs(&self) -> Result<String, GuestRunError> {
        const NAME: &str = "kexec-initramfs.cpio";
        if !self.outside(NAME).exists() {
            self.write(NAME, &self.guest.kexec_initramfs()?)?;
        }
        Ok(self.inside(NAME))
    }

    fn images(&self) -> impl Iterator<Item = PathBuf> {
        GuestKernel::ALL.into_iter().flat_map(|kernel| self.guest.boot_files(kernel))
    }

    /// Whether a file of the shared folder is one of the guest's images.
    pub fn is_image(&self, path: &Path) -> bool {
        self.images().any(|image| name_of(&image) == name_of(path))
    }
}

/// Labs of one test program. A test borrows one for itself; they go away with the pool.
pub struct LabPool {
    folder: PathBuf,
    idle: Mutex<Vec<GuestLab>>,
    made: AtomicUsize,
}

impl LabPool {
    /// A pool without a lab yet; their folders will lie in `folder`.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder, idle: Mutex::default(), made: AtomicUsize::new(0) }
    }

    /// Lends `work` an idle lab, or a new one. A lab in which a panic happened is not lent again.
    ///
    /// # Errors
    /// As [`GuestLab::start`].
    pub fn with<T>(&self, work: impl FnOnce(&GuestLab) -> T) -> Result<T, GuestRunError> {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = idle().pop();
        let site = match waiting {
            Some(site) => site,
            None => {
                let number = self.made.fetch_add(1, Ordering::Relaxed);
                GuestLab::start(&self.folder.join(format!("lab-{number}")), 1)?
            }
        };
        let result = work(&site);
        idle().push(site);
        Ok(result)
    }
}

fn name_of(path: &Path) -> &OsStr {
    path.file_name().unwrap_or_default()
}

/// The part of the kernel command line that gives the guest its address and a script.
pub fn cmdline(script: &str) -> String {
    let base = format!("console=ttyS0 ftguest.ip={GUEST_ADDRESS}/24");
    match script {
        "" => base,
        script => format!("{base} ftguest.run=\"{script}\""),
    }
}

/// A running `ftvmm`.
pub struct GuestRun {
    process: LabProcess,
    report: PathBuf,
}

impl GuestRun {
    /// The process on its host.
    pub fn process(&self) -> &LabProcess {
        &self.process
    }

    /// Types on the guest's console.
    pub fn type_text(&self, text: &str) {
        self.process.write_stdin(text.as_bytes());
    }

    /// Waits until the guest has printed `wanted`.
    ///
    /// # Errors
    /// [`GuestRunError::EndedEarly`], and what the lab said.
    pub fn wait_for(&self, wanted: &str) -> Result<(), GuestRunError> {
        if self.process.wait_for_stdout(wanted)? {
            return Ok(());
        }
        let said = [self.process.stdout(), self.process.stderr()].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        let lines: Vec<&str> = said.lines().collect();
        Err(GuestRunError::EndedEarly {
            ended: self.process.ended(),
            wanted: wanted.to_owned(),
            tail: lines[lines.len().saturating_sub(10)..].join("\n"),
        })
    }

    /// Waits for the end of the run.
    ///
    /// # Errors
    /// What the lab said; [`GuestRunError::BadReport`] when a clean run left no report.
    pub fn finish(self) -> Result<Finished, GuestRunError> {
        let output = self.process.finish()?;
        let bad = |reason: String| GuestRunError::BadReport { path: self.report.clone(), reason };
        let report = match fs::read(&self.report) {
            Ok(text) => Some(serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?),
            Err(error) if output.ended.success() => return Err(bad(error.to_string())),
            Err(_) => None,
        };
        Ok(Finished {
            ended: output.ended,
            errors: String::from_utf8_lossy(&output.stderr).into_owned(),
            console: output.stdout,
            report,
        })
    }
}

/// What an `ftvmm` process left.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub ended: Ended,
    /// All the guest printed.
    pub console: Vec<u8>,
    /// All that `ftvmm` itself said.
    pub errors: String,
    /// The report, which a failed run may lack.
    pub report: Option<Report>,
}
