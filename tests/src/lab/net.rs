//! The outer machine's side of a lab's networks: one private network namespace.
//!
//! It holds two bridges, `outer` (clients, and every host's first NIC) and `link` (every host's
//! second NIC). Two bridges instead of a QEMU socket network for the link between hosts: taps
//! carry checksum and segmentation offload, survive the restart of one end, can be cut, and are
//! the same for both backends. Nothing leads from the namespace to the machine's own interfaces.
//!
//! Names carry process id and start time of their maker, so what a dead process left behind is
//! told from what a living one uses, even after the process id came round again.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::error::{LabError, at};
use crate::Program;

/// Where `ip netns` keeps its namespaces.
const NAMESPACES: &str = "/run/netns";
const PREFIX: &str = "ftvmm-lab";

/// A round takes a few milliseconds; one or two are enough for processes that can die.
const KILL_ROUNDS_MAX: usize = 1000;

/// Which of a host's two NICs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Nic {
    /// To the clients on the outer machine.
    Outer,
    /// To the other host.
    Link,
}

impl Nic {
    /// Both, in the order a host sees them (eth0, eth1).
    pub(crate) const ALL: [Self; 2] = [Self::Outer, Self::Link];

    /// The bridge it leads to; with the host's letter also the name of its port there.
    pub(crate) fn bridge(self) -> &'static str {
        match self {
            Self::Outer => "outer",
            Self::Link => "link",
        }
    }

    /// Name of the port of `host` in the bridge.
    pub(crate) fn port(self, host: &str) -> String {
        format!("{host}-{}", self.bridge())
    }

    /// Name of the NIC inside a host.
    pub(crate) fn inside(self) -> &'static str {
        match self {
            Self::Outer => "eth0",
            Self::Link => "eth1",
        }
    }
}

/// Address of the clients' end of the outer bridge; hosts have .1 and .2 there.
pub(crate) const CLIENT_ADDRESS: &str = "10.78.0.254";

/// The same for IPv6, of a network of its own (RFC 4193).
pub(crate) const CLIENT_ADDRESS6: &str = "fd78::254";

/// A network namespace that goes away with everything in it.
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    /// A new one with its loopback up. `role` tells the namespaces of one lab apart.
    pub(crate) fn create(name: String) -> Result<Self, LabError> {
        ip(&["netns", "add", &name])?;
        let namespace = Self { name };
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` on this namespace.
    pub(crate) fn ip(&self, arguments: &[&str]) -> Result<(), LabError> {
        ip(&[&["-n", &self.name], arguments].concat())
    }

    /// A command that will run inside.
    pub(crate) fn command(&self, program: Program) -> Result<Command, LabError> {
        let mut command = Program::Ip.command()?;
        command.args(["netns", "exec", &self.name]).arg(program.path()?);
        Ok(command)
    }

    /// Ends every process inside; none is left when this returns.
    pub(crate) fn kill_all(&self) {
        kill_processes_of(&self.name);
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

fn ip(arguments: &[&str]) -> Result<(), LabError> {
    run(Program::Ip.command()?.args(arguments))
}

/// Runs a program that is silent when all is well.
pub(crate) fn run(command: &mut Command) -> Result<(), LabError> {
    let output = command.output().map_err(at(Path::new(command.get_program())))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
    Err(LabError::CommandFailed { command: format!("{command:?}"), said })
}

/// SIGKILL takes a moment to act and a process may fork meanwhile, so it looks again until nobody
/// is left, giving up on processes that the kernel does not let die.
fn kill_processes_of(namespace: &str) {
    for _ in 0..KILL_ROUNDS_MAX {
        let Ok(mut ask) = Program::Ip.command() else {
            return;
        };
        let Ok(pids) = ask.args(["netns", "pids", namespace]).output() else {
            return;
        };
        let pids = String::from_utf8_lossy(&pids.stdout);
        let pids: Vec<i32> = pids.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
        if pids.is_empty() {
            return;
        }
        for pid in pids {
            // It may have ended by itself meanwhile.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Clean-up does what it can: the next lab's start tries again.
fn remove(namespace: &str) {
    kill_processes_of(namespace);
    let _ = ip(&["netns", "del", namespace]);
}

/// A name that no other lab of this machine has or had.
pub(crate) fn unique_name() -> String {
    static LABS: AtomicU32 = AtomicU32::new(0);
    let pid = std::process::id();
    let started = start_time(pid).unwrap_or_default();
    format!("{PREFIX}.{pid}.{started}.{}", LABS.fetch_add(1, Ordering::Relaxed))
}

/// Start time of a living process in clock ticks since boot: field 22 of `/proc/<pid>/stat`
/// (proc(5)), counted after the parenthesised name, which may hold anything.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Removes the namespaces of labs whose process is dead.
pub(crate) fn remove_leftovers() {
    let Ok(entries) = fs::read_dir(NAMESPACES) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_leftover(&name) {
            remove(&name);
        }
    }
}

fn is_leftover(name: &str) -> bool {
    let mut parts = name.split('.');
    if parts.next() != Some(PREFIX) {
        return false;
    }
    let (Some(pid), Some(started)) = (parts.next(), parts.next()) else {
        return false;
    };
    let alive = pid.parse().ok().and_then(start_time).map(|time| time.to_string());
    alive.as_deref() != Some(started)
}

/// Makes the two bridges and the clients' address.
pub(crate) fn build_outer(namespace: &Namespace) -> Result<(), LabError> {
    for nic in Nic::ALL {
        let bridge = nic.bridge();
        namespace.ip(&["link", "add", "name", bridge, "type", "bridge", "mcast_snooping", "0"])?;
        bring_up(namespace, bridge)?;
    }
    let address6 = format!("{CLIENT_ADDRESS6}/64");
    namespace.ip(&["addr", "add", &address6, "dev", Nic::Outer.bridge(), "nodad"])?;
    let address = format!("{CLIENT_ADDRESS}/24");
    namespace.ip(&["addr", "add", &address, "dev", Nic::Outer.bridge()])
}

/// Makes a tap for an emulated host's NIC and plugs it into its bridge.
pub(crate) fn add_tap(namespace: &Namespace, nic: Nic, host: &str) -> Result<(), LabError> {
    let port = nic.port(host);
    namespace.ip(&["tuntap", "add", "dev", &port, "mode", "tap", "vnet_hdr"])?;
    plug(namespace, nic, &port)
}

/// Joins the bridge and the namespace of a host on this machine by a veth pair.
pub(crate) fn add_veth(outer: &Namespace, host: &Namespace, nic: Nic) -> Result<(), LabError> {
    let letter = host.name().rsplit('.').next().unwrap_or_default();
    let port = nic.port(letter);
    let peer = ["type", "veth", "peer", "name", nic.inside(), "netns", host.name()];
    outer.ip(&[&["link", "add", "name", &port][..], &peer[..]].concat())?;
    plug(outer, nic, &port)
}

fn plug(namespace: &Namespace, nic: Nic, port: &str) -> Result<(), LabError> {
    namespace.ip(&["link", "set", "dev", port, "master", nic.bridge()])?;
    bring_up(namespace, port)
}

/// Without IPv6 addresses of its own making, whose announcements would be noise in every guest.
fn bring_up(namespace: &Namespace, device: &str) -> Result<(), LabError> {
    namespace.ip(&["link", "set", "dev", device, "addrgenmode", "none"])?;
    namespace.ip(&["link", "set", "dev", device, "up"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_a_leftover_when_its_maker_is_dead() {
        let own = unique_name();
        assert!(!is_leftover(&own));
        assert!(!is_leftover("somebody-elses"));
        let pid = std::process::id();
        assert!(is_leftover(&format!("{PREFIX}.{pid}.1.0")), "same process id, other start time");
        assert!(is_leftover(&format!("{PREFIX}.4194305.5.0")), "above the highest process id");
    }
}
