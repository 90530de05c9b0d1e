//! A lab host as a QEMU process: software emulation of a machine with AMD-V.
//!
//! One emulated CPU on one thread: two lock up about once in five minutes (QEMU 7.2, a stale INT3
//! of a static-key patch against an IPI). Memory is a shared memfd because virtiofsd reads it.
//! `cache=none` makes every access reach the shared directory, so two hosts see one file system.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::error::{LabError, at};
use super::image::Image;
use super::net::{Namespace, Nic};
use super::protocol::{PORT_NAME, SHARE_TAG};
use crate::Program;

/// Kernel command line of a lab host. Mitigations cost emulated time and change no semantics; a
/// panic ends QEMU; the emulated TSC is the outer machine's and better than any watchdog that
/// would judge it while QEMU is not scheduled; IPv6 would add noise. Not `quiet`: a console that
/// says nothing during a boot would look stuck.
const COMMAND_LINE: &str = "console=ttyS0 panic=-1 mitigations=off nokaslr tsc=reliable \
                            no_timer_check ipv6.disable=1 net.ifnames=0 random.trust_cpu=on";

/// What one host needs to start.
pub(crate) struct Plan<'a> {
    pub(crate) letter: &'a str,
    pub(crate) number: usize,
    pub(crate) memory_mib: u32,
    pub(crate) counts_instructions: bool,
    pub(crate) image: &'a Image,
    pub(crate) folder: &'a Path,
    pub(crate) share: &'a Path,
    pub(crate) outer: &'a Namespace,
}

/// A running emulated host; dropping it is the hard stop.
pub(crate) struct QemuHost {
    qemu: Child,
    virtiofsd: Child,
}

/// Path of the host's serial console in the lab's folder.
pub(crate) fn console(folder: &Path, letter: &str) -> PathBuf {
    folder.join(format!("{letter}-console.log"))
}

/// Path of what QEMU and virtiofsd themselves say.
pub(crate) fn machine_log(folder: &Path, letter: &str) -> PathBuf {
    folder.join(format!("{letter}-qemu.log"))
}

impl QemuHost {
    /// Starts both processes; the stream leads to the agent and ends with QEMU.
    pub(crate) fn start(plan: &Plan<'_>) -> Result<(Self, UnixStream), LabError> {
        let log_path = machine_log(plan.folder, plan.letter);
        let log = || append(&log_path);
        let (socket, listener) = listen(plan)?;
        // An absolute path: the daemon goes to / before it looks.
        let source = plan.share.display().to_string().replace(',', "\\,");
        let source = format!("source={source}");
        let mut virtiofsd = plan
            .outer
            .command(Program::Virtiofsd)?
            // It takes its listening socket as descriptor 0, so nobody waits for a file to appear.
            // In its own mount namespace it would be two processes; a hard stop wants one.
            .args(["--fd=0", "-f", "-o", "sandbox=chroot,cache=none", "-o"])
            .arg(source)
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(log()?)
            .stderr(log()?)
            .spawn()
            .map_err(at("virtiofsd"))?;

        let (ours, theirs) = UnixStream::pair().map_err(at("agent stream"))?;
        let mut command = plan.outer.command(Program::Qemu)?;
        add_arguments(&mut command, plan, &socket);
        record(&command, plan)?;
        let qemu = command
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(log()?)
            .stderr(log()?)
            .spawn()
            .map_err(at("qemu-system-x86_64"));
        match qemu {
            Ok(qemu) => Ok((Self { qemu, virtiofsd }, ours)),
            Err(error) => {
                stop(&mut virtiofsd);
                Err(error)
            }
        }
    }
}

impl QemuHost {
    /// Sends a signal to the emulator.
    pub(crate) fn signal(&self, signal: Signal) -> Result<(), LabError> {
        let pid = Pid::from_raw(self.qemu.id().cast_signed());
        kill(pid, signal).map_err(|e| at("qemu-system-x86_64")(e.into()))
    }
}

impl Drop for QemuHost {
    fn drop(&mut self) {
        for child in [&mut self.qemu, &mut self.virtiofsd] {
            stop(child);
        }
    }
}

/// Makes the socket that QEMU reaches virtiofsd by; returns its name in the lab's folder.
///
/// A socket's name has room for 107 bytes and the folder may lie deep, so it is bound through the
/// folder's descriptor here and reached from the working directory there.
fn listen(plan: &Plan<'_>) -> Result<(String, UnixListener), LabError> {
    let name = format!("{}-share.sock", plan.letter);
    let folder = File::open(plan.folder).map_err(at(plan.folder))?;
    let path = format!("/proc/self/fd/{}/{name}", folder.as_raw_fd());
    // The host's earlier life left its own.
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path).map_err(at(&name))?;
    Ok((name, listener))
}

/// SIGKILL, then waits so that nothing of it runs when this returns.
fn stop(child: &mut Child) {
    // Both fail only when the child has ended already.
    let _ = child.kill();
    let _ = child.wait();
}

fn add_arguments(command: &mut Command, plan: &Plan<'_>, socket: &str) {
    let console = console(plan.folder, plan.letter);
    let memory = format!("{}M", plan.memory_mib);
    command
        .current_dir(plan.folder)
        .args([
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-machine",
            "pc,memory-backend=ram",
        ])
        .args(["-accel", "tcg,thread=single", "-smp", "1", "-cpu", "EPYC,svm=on,npt=on"])
        .args(["-m", &memory, "-object"])
        .arg(format!("memory-backend-memfd,id=ram,size={memory},share=on"))
        .arg("-kernel")
        .arg(&plan.image.kernel)
        .arg("-initrd")
        .arg(&plan.image.initramfs)
        .args(["-append", COMMAND_LINE, "-chardev"])
        .arg(format!("file,id=console,append=on,path={}", escaped(&console)))
        .args(["-serial", "chardev:console", "-chardev", "socket,id=agent,fd=0"])
        .args(["-device", "virtio-serial-pci", "-device"])
        .arg(format!("virtserialport,chardev=agent,name={PORT_NAME}"))
        .args(["-device", "virtio-rng-pci", "-chardev"])
        .arg(format!("socket,id=fs,path={socket}"))
        .arg("-device")
        .arg(format!("vhost-user-fs-pci,chardev=fs,tag={SHARE_TAG}"));
    if plan.counts_instructions {
        command.args(["-icount", "shift=0"]);
    }
    for (nic, subnet) in Nic::ALL.into_iter().zip([0x78, 0x77]) {
        let (id, port) = (nic.bridge(), nic.port(plan.letter));
        command
            .arg("-netdev")
            .arg(format!("tap,id={id},ifname={port},script=no,downscript=no"))
            .arg("-device")
            .arg(format!(
                "virtio-net-pci,netdev={id},romfile=,mac=52:54:00:{subnet:x}:00:{:02x}",
                plan.number
            ));
    }
}

/// A path inside a QEMU option list: a comma is written twice.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

fn append(path: &Path) -> Result<File, LabError> {
    OpenOptions::new().create(true).append(true).open(path).map_err(at(path))
}

/// Keeps the command line where people look for it.
fn record(command: &Command, plan: &Plan<'_>) -> Result<(), LabError> {
    let path = plan.folder.join(format!("{}-command.txt", plan.letter));
    fs::write(&path, format!("{command:?}\n")).map_err(at(&path))
}
