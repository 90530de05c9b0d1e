//! A lab host as namespaces of this very machine, for machines whose KVM is good.
//!
//! The agent is process 1 of a PID namespace inside a network namespace that two veth pairs join
//! to the same bridges an emulated host is plugged into. The hard stop first cuts the host's
//! links, then kills all of it: with process 1 the kernel ends the whole PID namespace, so nothing
//! forked meanwhile escapes, and what still runs for an instant reaches nobody.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};

use super::error::{LabError, at};
use super::net::{Namespace, Nic, add_veth};
use super::qemu::console;
use crate::Program;

/// A host that is a pair of namespaces; dropping it is the hard stop.
pub(crate) struct LocalHost {
    namespace: Namespace,
    child: Child,
}

impl LocalHost {
    /// Starts the agent; the stream leads to it and ends with it.
    pub(crate) fn start(
        letter: &str,
        outer: &Namespace,
        agent: &Path,
        folder: &Path,
        search_path: &OsStr,
    ) -> Result<(Self, UnixStream), LabError> {
        let namespace = Namespace::create(format!("{}.{letter}", outer.name()))?;
        for nic in Nic::ALL {
            add_veth(outer, &namespace, nic)?;
        }
        let log = console(folder, letter);
        let log = OpenOptions::new().create(true).append(true).open(&log).map_err(at(&log))?;
        let (ours, theirs) = UnixStream::pair().map_err(at("agent stream"))?;
        let (input, output) = (theirs.try_clone().map_err(at("agent stream"))?, theirs);
        let child = namespace
            .command(Program::Unshare)?
            .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
            .arg(agent)
            .arg("supervise")
            .env("PATH", search_path)
            .stdin(Stdio::from(OwnedFd::from(input)))
            .stdout(Stdio::from(OwnedFd::from(output)))
            .stderr(log)
            .spawn()
            .map_err(at("unshare"))?;
        Ok((Self { namespace, child }, ours))
    }
}

impl Drop for LocalHost {
    fn drop(&mut self) {
        for nic in Nic::ALL {
            // Deleting one end of a veth pair deletes both.
            let _ = self.namespace.ip(&["link", "del", nic.inside()]);
        }
        self.namespace.kill_all();
        let _ = self.child.wait();
    }
}
