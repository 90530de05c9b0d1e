//! What the end-to-end tests of several hosts share: a lab with guests, cases that run in it one
//! after the other, and small checks that say what they found.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use ftvmm_guest_images::GuestKernel;
use ftvmm_guest_programs::stream::{DEFAULT_SEED, stream_sha256};
use libtest_mimic::{Arguments, Failed, Trial};

use crate::download::{Download, Downloaded};
use crate::guest_run::GuestLab;
use crate::lab::{Ended, Lab, LabProcess};
use crate::pair::{GUEST_ADDRESS, GuestFiles, Pair, READY, Report, RunOptions, read_report};
use crate::{Program, clock};

/// A busy build machine must not look like a dead peer.
const PATIENT: [&str; 2] = ["--failure-timeout-ms", "3000"];

/// The lab with what its guests boot from.
pub struct Site {
    /// The lab.
    pub lab: Lab,
    /// The tiny kernel and the initramfs.
    pub files: GuestFiles,
    /// Debian's kernel for clouds, and its initramfs.
    pub cloud: GuestFiles,
    /// Debian's kernel for everything, and its initramfs.
    pub generic: GuestFiles,
    /// The initramfs as the outer machine sees it.
    pub initramfs: PathBuf,
}

/// What the cases of a test program run in.
pub trait Stage: Send + Sized + 'static {
    /// Starts it in an emptied `folder`.
    ///
    /// # Errors
    /// What the lab said.
    fn start(folder: &Path) -> Result<Self, Failed>;

    /// Its lab, of two hosts.
    fn lab(&self) -> &Lab;

    /// Starts what an earlier case has killed, mends what it has cut.
    ///
    /// # Errors
    /// What the lab said.
    fn mend(&self) -> Result<(), Failed> {
        for host in [self.lab().host(0), self.lab().host(1)] {
            host.set_link(true)?;
            if host.run(&["true"]).is_err() {
                host.restart()?;
            }
        }
        Ok(())
    }
}

impl Stage for Site {
    fn start(folder: &Path) -> Result<Self, Failed> {
        let site = GuestLab::start(folder, 2)?;
        let [files, cloud, generic] = [GuestKernel::Tiny, GuestKernel::Cloud, GuestKernel::Generic]
            .map(|kernel| GuestFiles::of(&site, kernel));
        let GuestLab { lab, guest } = site;
        Ok(Self { lab, files, cloud, generic, initramfs: guest.initramfs })
    }

    fn lab(&self) -> &Lab {
        &self.lab
    }
}

impl Site {
    /// What a guest with this kernel boots from.
    pub fn files_of(&self, kernel: GuestKernel) -> &GuestFiles {
        match kernel {
            GuestKernel::Tiny => &self.files,
            GuestKernel::Cloud => &self.cloud,
            GuestKernel::Generic => &self.generic,
        }
    }

    /// A pair, the primary on the first host.
    ///
    /// # Errors
    /// What the lab said.
    pub fn pair(&self, options: &RunOptions) -> Result<Pair, Failed> {
        Ok(Pair::start(&self.lab, &self.files, options)?)
    }

    /// A pair whose guest answers clients.
    pub fn ready_pair(&self, options: &RunOptions) -> Result<Pair, Failed> {
        let pair = self.pair(options)?;
        self.answers(&pair.primary)?;
        Ok(pair)
    }

    /// A client that tries until it is answered. A guest says nothing of itself when it starts, so
    /// the switch may still know its address behind the host where the last guest was, and the
    /// client may have given up.
    ///
    /// # Errors
    /// When there is no curl.
    pub fn asking(&self) -> Result<std::process::Command, Failed> {
        let url = format!("http://{GUEST_ADDRESS}/bytes/1");
        let retry = ["--retry", "60", "--retry-all-errors", "--retry-delay", "1"];
        let head = ["--silent", "--output", "/dev/null", "--connect-timeout", "2"];
        Ok(self.lab.client(Program::Curl, &[&head[..], &retry, &[&url]].concat())?)
    }

    /// Waits until the guest on this console is up and a client gets an answer.
    pub fn answers(&self, process: &LabProcess) -> Result<(), Failed> {
        wait_for(process, READY)?;
        // The guest's address may be in the client's memory as unreachable.
        self.lab.run_client(Program::Ip, &["neigh", "flush", "all"])?;
        require(self.asking()?.status()?.success(), "the guest does not answer")
    }

    /// A download from the guest, under way.
    ///
    /// # Errors
    /// What the lab said.
    pub fn download(&self, bytes: u64) -> Result<Download, Failed> {
        Ok(Download::start(&self.lab, &format!("http://{GUEST_ADDRESS}/bytes/{bytes}"))?)
    }

    /// Downloads without a disturbance.
    pub fn download_all(&self, bytes: u64) -> Result<(), Failed> {
        let downloaded = self.download(bytes)?.finish(|_| ())?;
        complete(&downloaded, bytes)
    }

    /// A report in the shared directory.
    ///
    /// # Errors
    /// When it is not there.
    pub fn report(&self, name: &str) -> Result<Report, Failed> {
        Ok(read_report(&self.lab, name)?)
    }
}

/// A guest that gets by on a busy machine, and `more` arguments.
pub fn options(more: &[&str]) -> RunOptions {
    let arguments = PATIENT.iter().chain(more).map(|&word| word.to_owned()).collect();
    RunOptions { arguments, ..RunOptions::default() }
}

/// A guest that runs `script` beside its servers.
pub fn running(script: &str) -> RunOptions {
    RunOptions { cmdline: format!("ftguest.run=\"{script}\""), ..options(&[]) }
}

/// The download has every byte.
///
/// # Errors
/// When it has not.
pub fn complete(downloaded: &Downloaded, bytes: u64) -> Result<(), Failed> {
    equal("curl's exit status", downloaded.status, 0)?;
    equal("bytes downloaded", downloaded.bytes, bytes)?;
    equal("sha-256", downloaded.sha256, stream_sha256(DEFAULT_SEED, bytes))
}

/// Two things are the same.
///
/// # Errors
/// When they are not: both, and `what` they are.
pub fn equal<T: PartialEq + fmt::Debug>(what: &str, found: T, wanted: T) -> Result<(), Failed> {
    if found == wanted {
        return Ok(());
    }
    Err(format!("{what}: {found:?}, wanted {wanted:?}").into())
}

/// A condition holds.
///
/// # Errors
/// `otherwise`.
pub fn require(held: bool, otherwise: impl Into<String>) -> Result<(), Failed> {
    if held { Ok(()) } else { Err(otherwise.into().into()) }
}

/// What an `ftvmm` has said of itself so far.
pub fn said(process: &LabProcess) -> String {
    String::from_utf8_lossy(&process.stderr()).into_owned()
}

/// Waits for this on the guest's console.
///
/// # Errors
/// When the run ends without it.
pub fn wait_for(process: &LabProcess, wanted: &str) -> Result<(), Failed> {
    let found = process.wait_for_stdout(wanted)?;
    require(found, format!("it ended without {wanted:?}:\n{}", said(process)))
}

/// Waits for the end of a run.
///
/// # Errors
/// When it is another than `wanted`.
pub fn ends_with(who: &str, process: &LabProcess, wanted: Ended) -> Result<(), Failed> {
    let ended = process.wait()?;
    require(ended == wanted, format!("{who}: {ended:?}, wanted {wanted:?}:\n{}", said(process)))
}

/// A setting from the environment.
///
/// # Panics
/// When it cannot be understood.
pub fn setting<T: FromStr<Err: fmt::Debug>>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error:?}")))
}

/// What a case does in the lab.
pub type Case<S = Site> = Box<dyn FnOnce(&S) -> Result<(), Failed> + Send>;

/// Runs the cases one after the other in one lab, as the arguments of the program choose; what one
/// has killed is started again before the next.
pub fn run_cases<S: Stage>(folder: &Path, cases: Vec<(String, Case<S>)>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let shared: Arc<Mutex<Option<S>>> = Arc::default();
    let trial = |(name, case): (String, Case<S>)| {
        let (shared, folder, title) = (Arc::clone(&shared), folder.to_owned(), name.clone());
        Trial::test(name, move || {
            let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            let site = match &mut *shared {
                Some(site) => site,
                none => none.insert(S::start(&folder)?),
            };
            site.mend()?;
            println!("{title}");
            let began = clock::now();
            let result = case(site);
            println!("  {:.1} s", began.elapsed().as_secs_f32());
            result
        })
    };
    let trials = cases.into_iter().map(trial).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(shared);
    conclusion.exit_code()
}
