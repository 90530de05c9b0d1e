//! One or two hosts with a working KVM, a network to real clients, and a hard stop.
//!
//! ```text
//!   outer machine, network namespace of the lab       clients: Lab::client
//!     bridge "outer" 10.78.0.254        bridge "link"
//!        |               |               |         |
//!      eth0            eth0            eth1      eth1
//!     host a          host b          host a    host b
//!     br0 10.78.0.1   br0 10.78.0.2   10.77.0.1 10.77.0.2
//!      + guest taps    + guest taps
//! ```
//! A host is an emulated machine ([`Backend::Lab`]) or a pair of namespaces on this machine
//! ([`Backend::Local`]); tests do not see the difference. Guests may use 10.78.0.10 to .250,
//! and fd78::10 to ::250; the clients are fd78::254.
//!
//! Invariants: every wait is bounded by silence; everything a lab makes goes away when it is
//! dropped, except its folder; what a killed lab left is removed by the next one.

pub mod protocol;

mod choice;
mod client;
mod error;
mod host;
mod image;
mod intel;
mod link;
mod local;
mod net;
mod qemu;
mod watch;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

pub use choice::{Backend, choose_backend};
pub use error::{LabError, at};
pub use host::Host;
pub use intel::{IntelConfig, IntelHost};
pub use link::{LabProcess, Output};
pub use protocol::Ended;

use crate::Program;

use host::Shared;
use net::Namespace;
use watch::Watch;

/// What starts a program with its libraries, on every x86-64 Linux with glibc.
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
/// Most hosts of one lab.
pub const HOSTS_MAX: usize = 2;

/// What kind of lab is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabConfig {
    /// Emulated machines or namespaces.
    pub backend: Backend,
    /// Number of hosts, 1 to [`HOSTS_MAX`].
    pub hosts: usize,
    /// Memory of an emulated host.
    pub memory_mib: u32,
    /// Where all logs go; made when absent.
    pub folder: PathBuf,
    /// How long all consoles and commands may be silent while something is waited for.
    pub silence: Duration,
    /// The `lab-agent` program of this crate.
    pub agent: PathBuf,
    /// An emulated host's clocks count its instructions: one is a nanosecond, and a tick of its
    /// time-stamp counter.
    pub counts_instructions: bool,
}

impl LabConfig {
    /// One host of 1536 MiB that may be silent for two minutes, its agent found beside the
    /// running program.
    ///
    /// # Errors
    /// [`LabError::NotBuilt`] when no agent is there.
    pub fn new(backend: Backend, folder: impl Into<PathBuf>) -> Result<Self, LabError> {
        Ok(Self {
            backend,
            hosts: 1,
            memory_mib: 1536,
            folder: folder.into(),
            silence: Duration::from_secs(120),
            agent: find_agent()?,
            counts_instructions: false,
        })
    }
}

/// Cargo puts `xtask` and `lab-agent` into one directory and tests into `deps` below it.
fn find_agent() -> Result<PathBuf, LabError> {
    let own = std::env::current_exe().map_err(at("current_exe"))?;
    let candidates = || own.ancestors().skip(1).take(2).map(|place| place.join("lab-agent"));
    candidates().find(|path| path.is_file()).ok_or_else(|| LabError::NotBuilt {
        path: candidates().next().unwrap_or_default(),
        command: "cargo build --release --package ftvmm-tests",
    })
}

/// A running lab.
pub struct Lab {
    // Hosts go before the namespace they are plugged into.
    hosts: Vec<Host>,
    shared: Arc<Shared>,
}

/// A file that is listened to: [`Lab::hear`].
pub struct Hearing<'a> {
    watch: &'a Watch,
    log: PathBuf,
}

impl Drop for Hearing<'_> {
    fn drop(&mut self) {
        self.watch.leave(&self.log);
    }
}

impl Lab {
    /// Makes the networks, boots the hosts side by side and waits until all take commands.
    ///
    /// # Errors
    /// Whatever was missing or failed; nothing of it is left behind.
    pub fn start(config: LabConfig) -> Result<Self, LabError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(LabError::NeedsRoot);
        }
        net::remove_leftovers();
        let share = config.folder.join("share");
        let programs = share.join("bin");
        fs::create_dir_all(&programs).map_err(at(&programs))?;
        let folder = config.folder.canonicalize().map_err(at(&config.folder))?;
        let image = match config.backend {
            Backend::Lab => Some(image::build(&folder, &config.agent)?),
            Backend::Local => {
                // Such a host sets its network up with it, as an emulated one does.
                Program::Busybox.path()?;
                None
            }
        };
        let outer = Namespace::create(net::unique_name())?;
        net::build_outer(&outer)?;
        let share = folder.join("share");
        let config = LabConfig { folder, ..config };
        let watch = Arc::new(Watch::new());
        let shared = Arc::new(Shared { config, image, share, watch, outer });
        let numbers = 1..=shared.config.hosts.clamp(1, HOSTS_MAX);
        let hosts = numbers
            .map(|number| Host::start(number, Arc::clone(&shared)))
            .collect::<Result<Vec<_>, _>>()?;
        let lab = Self { hosts, shared };
        for host in &lab.hosts {
            host.set_up()?;
        }
        Ok(lab)
    }

    /// The host of this index: 0 is `a`, 1 is `b`.
    ///
    /// # Panics
    /// When the lab has fewer hosts.
    pub fn host(&self, index: usize) -> &Host {
        &self.hosts[index]
    }

    /// The folder with all logs.
    pub fn folder(&self) -> &Path {
        &self.shared.config.folder
    }

    /// The shared directory as the outer machine sees it; [`Host::share`] is the same inside.
    pub fn share(&self) -> &Path {
        &self.shared.share
    }

    /// Copies a program where every host finds it by name.
    ///
    /// # Errors
    /// What the file system answered.
    pub fn install(&self, program: &Path) -> Result<(), LabError> {
        let name = program.file_name().unwrap_or_default();
        let place = self.share().join("bin").join(name);
        fs::copy(program, &place).map(|_| ()).map_err(at(program))
    }

    /// Copies a program of this machine and the libraries it is linked with, for
    /// [`Host::spoil_link`]: a host has no libraries of its own.
    ///
    /// # Errors
    /// What the file system or the program's loader answered.
    pub fn install_tc(&self) -> Result<(), LabError> {
        let folder = self.share().join("bin/iproute2");
        fs::create_dir_all(&folder).map_err(at(&folder))?;
        let program = Program::Tc.path()?;
        fs::copy(&program, folder.join("tc")).map_err(at(&program))?;
        let listed = Program::Ldd.command()?.arg(&program).output().map_err(at("ldd"))?;
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        let libraries = listed.lines().filter_map(|line| line.split_whitespace().nth(2));
        for library in libraries.map(Path::new).filter(|path| path.is_absolute()) {
            let name = library.file_name().unwrap_or_default();
            fs::copy(library, folder.join(name)).map_err(at(library))?;
        }
        fs::copy(LOADER, folder.join("ld.so")).map(|_| ()).map_err(at(LOADER))
    }

    /// The clients' address in that network, where hosts reach a server of the outer machine.
    pub fn client_address(&self) -> &'static str {
        net::CLIENT_ADDRESS
    }

    /// Name of the network namespace with the clients, for `ip netns exec` by hand.
    pub fn namespace(&self) -> &str {
        self.shared.outer.name()
    }

    /// A command for a real client: on this machine, in the network the hosts are plugged into.
    /// Waiting for it is the caller's; [`Self::run_client`] bounds the wait.
    ///
    /// # Errors
    /// When the program cannot be had.
    pub fn client(&self, program: Program, arguments: &[&str]) -> Result<Command, LabError> {
        let mut command = self.shared.outer.command(program)?;
        command.args(arguments);
        Ok(command)
    }

    /// Runs a client to its end. What it writes counts as a sign of life and is kept in the
    /// folder as `client-<number>-<program>.stdout|stderr`.
    ///
    /// # Errors
    /// [`LabError::Silent`] when client and lab were silent for too long; the client is killed.
    pub fn run_client(&self, program: Program, arguments: &[&str]) -> Result<Output, LabError> {
        let LabConfig { folder, silence, .. } = &self.shared.config;
        let command = self.client(program, arguments)?;
        client::run(command, program.file(), folder, &self.shared.watch, *silence)
    }

    /// Counts the growth of a file as a sign of life, until the answer is dropped: of what a
    /// command writes only there.
    pub fn hear(&self, log: &Path) -> Hearing<'_> {
        self.shared.watch.follow(log);
        Hearing { watch: &self.shared.watch, log: log.to_owned() }
    }

    /// Last lines of every log, for a failure message.
    pub fn tails(&self) -> String {
        self.shared.watch.tails()
    }
}
