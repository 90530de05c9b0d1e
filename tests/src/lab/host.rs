//! One host of a lab, whatever it is made of.

use std::ffi::OsStr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::signal::Signal;

use super::LabConfig;
use super::choice::Backend;
use super::error::LabError;
use super::image::Image;
use super::link::{LabProcess, Link, Output};
use super::local::LocalHost;
use super::net::{Namespace, Nic, add_tap};
use super::protocol::{SHARE, Start};
use super::qemu::{self, Plan, QemuHost};
use super::watch::Watch;

/// Makes the host's side of the networks. The kernel has made the NICs; br0 joins the outer one
/// with the taps of guests and has the host's address there.
const SET_UP_NETWORK: &str = "set -e; ip() { busybox ip \"$@\"; }
    ip link set lo up; ip link set eth0 up; ip link set eth1 up
    busybox brctl addbr br0; busybox brctl addif br0 eth0; ip link set br0 up
    ip addr add $OUTER/24 dev br0; ip addr add $LINK/24 dev eth1";

/// Makes a persistent tap that a program can attach to by name, joined to br0.
const ADD_TAP: &str = "set -e; busybox tunctl -t $TAP >/dev/null
    busybox brctl addif br0 $TAP; busybox ip link set $TAP up";

/// What the hosts of one lab have in common.
pub(crate) struct Shared {
    pub(crate) config: LabConfig,
    /// What emulated hosts boot; none for local ones.
    pub(crate) image: Option<Image>,
    pub(crate) share: PathBuf,
    pub(crate) watch: Arc<Watch>,
    pub(crate) outer: Namespace,
}

/// A host. All methods take `&self`; a host may be driven from several threads.
pub struct Host {
    number: usize,
    letter: &'static str,
    shared: Arc<Shared>,
    running: Mutex<Option<Machine>>,
    link: Mutex<Arc<Link>>,
}

/// Dropping it is the hard stop.
enum Machine {
    Qemu { host: QemuHost },
    Local { _host: LocalHost },
}

impl Host {
    pub(crate) fn start(number: usize, shared: Arc<Shared>) -> Result<Self, LabError> {
        let letter = ["a", "b"][number - 1];
        if shared.image.is_some() {
            for nic in Nic::ALL {
                add_tap(&shared.outer, nic, letter)?;
            }
        }
        for log in [qemu::console, qemu::machine_log] {
            shared.watch.follow(&log(&shared.config.folder, letter));
        }
        let (machine, link) = power_on(number, letter, &shared)?;
        Ok(Self { number, letter, shared, running: Some(machine).into(), link: link.into() })
    }

    /// Waits until the host takes commands and makes its networks.
    pub(crate) fn set_up(&self) -> Result<(), LabError> {
        self.link().wait_ready(self.shared.config.silence)?;
        let (outer, link) = (self.outer_address(), self.link_address());
        let env = [("OUTER", outer.as_str()), ("LINK", link.as_str())];
        self.shell("setting up the network", SET_UP_NETWORK, &env)
    }

    fn link(&self) -> Arc<Link> {
        Arc::clone(&self.link.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn running(&self) -> MutexGuard<'_, Option<Machine>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shell(&self, doing: &str, script: &str, env: &[(&str, &str)]) -> Result<(), LabError> {
        let output = self.launch(&["busybox", "sh", "-c", script], env, false)?.finish()?;
        if output.ended.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
        Err(LabError::HostCommandFailed {
            host: self.letter.to_owned(),
            doing: doing.to_owned(),
            said,
        })
    }

    fn launch(
        &self,
        argv: &[impl AsRef<str>],
        env: &[(&str, &str)],
        forward: bool,
    ) -> Result<LabProcess, LabError> {
        let argv = argv.iter().map(|argument| argument.as_ref().to_owned()).collect();
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let start = Start { argv, env: env.iter().map(owned).collect() };
        self.link().spawn(start, forward, self.shared.config.silence)
    }

    /// `a` or `b`.
    pub fn letter(&self) -> &'static str {
        self.letter
    }

    /// Starts a program with its arguments.
    ///
    /// # Errors
    /// [`LabError::Refused`] when the host cannot run it, [`LabError::HostGone`],
    /// [`LabError::Silent`].
    pub fn spawn(&self, argv: &[impl AsRef<str>]) -> Result<LabProcess, LabError> {
        self.launch(argv, &[], false)
    }

    /// As [`Self::spawn`], and what it writes appears on this program's own output at once.
    ///
    /// # Errors
    /// As [`Self::spawn`].
    pub fn spawn_visible(&self, argv: &[impl AsRef<str>]) -> Result<LabProcess, LabError> {
        self.launch(argv, &[], true)
    }

    /// Runs a program with empty standard input to its end.
    ///
    /// # Errors
    /// As [`Self::spawn`]. An exit status other than 0 is no error here.
    pub fn run(&self, argv: &[impl AsRef<str>]) -> Result<Output, LabError> {
        self.spawn(argv)?.finish()
    }

    /// Makes a tap for a guest and joins it to br0.
    ///
    /// # Errors
    /// As [`Self::spawn`], or what the host's tools said.
    pub fn tap(&self, name: &str) -> Result<(), LabError> {
        self.shell(&format!("making the tap {name}"), ADD_TAP, &[("TAP", name)])
    }

    /// The shared directory as this host sees it.
    pub fn share(&self) -> &Path {
        match self.shared.config.backend {
            Backend::Lab => Path::new(SHARE),
            Backend::Local => &self.shared.share,
        }
    }

    /// Address on the link between the hosts.
    pub fn link_address(&self) -> String {
        format!("10.77.0.{}", self.number)
    }

    /// Address on the clients' network.
    pub fn outer_address(&self) -> String {
        format!("10.78.0.{}", self.number)
    }

    /// Cuts or mends one host's end of the link between the hosts, for both directions.
    ///
    /// # Errors
    /// What `ip` answered.
    pub fn set_link(&self, up: bool) -> Result<(), LabError> {
        self.set_port(Nic::Link, up)
    }

    /// Cuts or mends the host's NIC towards the clients.
    ///
    /// # Errors
    /// What `ip` answered.
    pub fn set_outer(&self, up: bool) -> Result<(), LabError> {
        self.set_port(Nic::Outer, up)
    }

    /// Whether what the others send on the link between the hosts reaches this one. What it sends
    /// reaches them either way.
    ///
    /// # Errors
    /// What `ip` answered.
    pub fn set_link_deaf(&self, deaf: bool) -> Result<(), LabError> {
        let port = Nic::Link.port(self.letter);
        let hears = if deaf { "off" } else { "on" };
        let mut words = vec!["link", "set", "dev", &port, "type", "bridge_slave", "fdb_flush"];
        for kind in ["learning", "flood", "mcast_flood", "bcast_flood"] {
            words.extend([kind, hears]);
        }
        self.shared.outer.ip(&words)
    }

    /// Spoils what this host sends on the link between the hosts, in the words of netem(8); mends
    /// it without any.
    ///
    /// # Errors
    /// What `tc` answered.
    pub fn spoil_link(&self, netem: &[&str]) -> Result<(), LabError> {
        let device = Nic::Link.inside();
        let words = match netem {
            [] => format!("qdisc del dev {device} root"),
            words => format!("qdisc replace dev {device} root netem {}", words.join(" ")),
        };
        let tools = self.share().join("bin/iproute2");
        let script = format!(
            "cd {tools} && exec ./ld.so --library-path . ./tc {words}",
            tools = tools.display()
        );
        self.shell("spoiling the link", &script, &[])
    }

    /// Stops the host as a hypervisor pauses a virtual machine: nothing of it runs, its clocks
    /// stand still.
    ///
    /// # Errors
    /// [`LabError::NotEmulated`] for a host on this machine, whose clocks go on.
    pub fn pause(&self) -> Result<(), LabError> {
        self.signal_machine(Signal::SIGSTOP)
    }

    /// Has a paused host go on.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn resume(&self) -> Result<(), LabError> {
        self.signal_machine(Signal::SIGCONT)
    }

    fn signal_machine(&self, signal: Signal) -> Result<(), LabError> {
        match &*self.running() {
            Some(Machine::Qemu { host }) => host.signal(signal),
            _ => Err(LabError::NotEmulated { host: self.letter.to_owned() }),
        }
    }

    fn set_port(&self, nic: Nic, up: bool) -> Result<(), LabError> {
        let state = if up { "up" } else { "down" };
        self.shared.outer.ip(&["link", "set", "dev", &nic.port(self.letter), state])
    }

    /// The hard stop: the host is gone when this returns, as if its power had been cut.
    pub fn kill(&self) {
        self.running().take();
    }

    /// Puts a fresh host in the place of this one after [`Self::kill`], or instead of what still
    /// runs, while the others go on. It has the same letter, addresses and shared directory,
    /// and nothing else of the former one: taps are to be made anew.
    ///
    /// # Errors
    /// As [`super::Lab::start`].
    pub fn restart(&self) -> Result<(), LabError> {
        self.kill();
        let (machine, link) = power_on(self.number, self.letter, &self.shared)?;
        *self.running() = Some(machine);
        *self.link.lock().unwrap_or_else(PoisonError::into_inner) = link;
        self.set_up()
    }
}

fn power_on(
    number: usize,
    letter: &'static str,
    shared: &Shared,
) -> Result<(Machine, Arc<Link>), LabError> {
    let LabConfig { memory_mib, folder, agent, counts_instructions, .. } = &shared.config;
    let (machine, stream): (Machine, UnixStream) = match &shared.image {
        Some(image) => {
            let (share, outer) = (&shared.share, &shared.outer);
            let (memory_mib, counts_instructions) = (*memory_mib, *counts_instructions);
            let plan = Plan {
                letter,
                number,
                memory_mib,
                counts_instructions,
                image,
                folder,
                share,
                outer,
            };
            let (host, stream) = QemuHost::start(&plan)?;
            (Machine::Qemu { host }, stream)
        }
        None => {
            let own = std::env::var_os("PATH").unwrap_or_default();
            let places = [shared.share.join("bin")];
            let places = places.into_iter().chain(std::env::split_paths(&own));
            let path = std::env::join_paths(places).unwrap_or(own);
            let (host, stream) =
                LocalHost::start(letter, &shared.outer, agent, folder, OsStr::new(&path))?;
            (Machine::Local { _host: host }, stream)
        }
    };
    Ok((machine, Link::new(letter, folder, &shared.watch, stream)?))
}
