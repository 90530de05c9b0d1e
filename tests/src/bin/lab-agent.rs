//! The first program of a lab host: sets the machine up, then runs what it is told to.
//!
//! Started three ways. As `/init` of a lab host it loads modules, mounts, opens the virtio-serial
//! port, or the serial line that `AGENT_PORT` names, and supervises. As `lab-agent supervise` it is
//! process 1 of a PID namespace on a machine with real KVM and supervises only. To supervise is to
//! start `lab-agent serve` on the same byte stream (its standard input and output) and to reap
//! orphans; two processes, because a reaper of orphans would take the exit statuses that the server
//! waits for.
//!
//! When the server ends, process 1 ends, and with it every process of the host.

use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use ftvmm_tests::lab::protocol::{
    CHUNK_BYTES, CommandId, Ended, PORT_NAME, Report, Request, SERIAL_MARK, SERIAL_PORT, SHARE,
    SHARE_TAG, Start, Stream, read_frame, write_frame,
};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{Pid, getpid};

/// File systems of a lab host, in the order of mounting: type, place, data.
const MOUNTS: &[(&str, &str, &str)] = &[
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("devtmpfs", "/dev", ""),
    ("devpts", "/dev/pts", ""),
    ("tmpfs", "/dev/shm", ""),
    ("tmpfs", "/tmp", ""),
    ("tmpfs", "/run", ""),
];

fn main() -> ExitCode {
    let mode = std::env::args().nth(1);
    let outcome = match mode.as_deref() {
        Some("serve") => serve(),
        Some("supervise") => supervise(None, Stdio::inherit(), Stdio::inherit()),
        _ if getpid() == Pid::from_raw(1) => boot(),
        _ => Err("usage: lab-agent serve | supervise, or as /init of a lab host".into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Process 1 of an emulated host. QEMU runs with `-no-reboot`, so a reboot ends it.
fn boot() -> Result<(), Box<dyn Error>> {
    if let Err(error) = set_up_and_supervise() {
        eprintln!("lab-agent: {error}");
    }
    reboot(RebootMode::RB_AUTOBOOT)?;
    Ok(())
}

fn set_up_and_supervise() -> Result<(), Box<dyn Error>> {
    for (kind, place, data) in MOUNTS {
        fs::create_dir_all(place)?;
        mount(Some(*kind), *place, Some(*kind), MsFlags::empty(), Some(*data))
            .map_err(|errno| format!("mounting {place}: {errno}"))?;
    }
    load_modules(Path::new("/modules"), &fs::read_to_string("/proc/cmdline")?)?;
    let port = match std::env::var_os(SERIAL_PORT) {
        Some(line) => serial_line(&Path::new("/dev").join(line))?,
        None => {
            mount(Some(SHARE_TAG), SHARE, Some("virtiofs"), MsFlags::empty(), None::<&str>)
                .map_err(|errno| format!("mounting {SHARE}: {errno}"))?;
            OpenOptions::new().read(true).write(true).open(agent_port()?)?
        }
    };
    let search_path = format!("{SHARE}/bin:/bin");
    supervise(Some(&search_path), port.try_clone()?.into(), port.into())
}

/// Loads every file of `directory` in the order of the names, which the builder of the initramfs
/// chose so that each module comes after those it needs. Parameters come from the kernel's command
/// line.
fn load_modules(directory: &Path, command_line: &str) -> Result<(), Box<dyn Error>> {
    let mut modules: Vec<PathBuf> =
        fs::read_dir(directory)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    modules.sort();
    for module in modules {
        let file = File::open(&module)?;
        let parameters = CString::new(parameters(&module, command_line))?;
        finit_module(file.as_fd(), &parameters, ModuleInitFlags::empty())
            .map_err(|errno| format!("loading {}: {errno}", module.display()))?;
    }
    Ok(())
}

/// What the command line says for the module in this file, `<nn>-<name>.ko`, as modprobe reads it:
/// `name.parameter=value`, a dash and an underscore being the same.
fn parameters(file: &Path, command_line: &str) -> String {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy().replace('-', "_");
    let name = stem.split_once('_').map_or("", |(_number, name)| name);
    let of_module = |word: &&str| {
        word.split_once('.').is_some_and(|(module, _)| module.replace('-', "_") == name)
    };
    let words = command_line.split_whitespace().filter(of_module);
    words.map(|word| &word[name.len() + 1..]).collect::<Vec<_>>().join(" ")
}

/// Opens a serial line for bytes of any value, and says that the agent is here.
fn serial_line(path: &Path) -> Result<File, Box<dyn Error>> {
    let mut line = OpenOptions::new().read(true).write(true).open(path)?;
    // Not termios: nix's functions for the speed do not link statically.
    #[allow(clippy::disallowed_methods, reason = "a host has the programs that the lab gave it")]
    let set = Command::new("busybox")
        .env("PATH", "/bin")
        .args(["stty", "-F"])
        .arg(path)
        .args(["raw", "-echo", "115200"])
        .status()?;
    if !set.success() {
        return Err(format!("stty of {} ended with {set}", path.display()).into());
    }
    line.write_all(SERIAL_MARK)?;
    Ok(line)
}

/// The device file of the port; without udev nothing makes `/dev/virtio-ports/<name>`.
fn agent_port() -> Result<PathBuf, Box<dyn Error>> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim_end() == PORT_NAME {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    Err(format!("no virtio-serial port is called {PORT_NAME}").into())
}

fn supervise(search_path: Option<&str>, input: Stdio, output: Stdio) -> Result<(), Box<dyn Error>> {
    let server = ftvmm_tests::built(std::env::current_exe()?)
        .arg("serve")
        .envs(search_path.map(|path| ("PATH", path)))
        .stdin(input)
        .stdout(output)
        .spawn()?;
    let server = Pid::from_raw(i32::try_from(server.id())?);
    loop {
        match wait()? {
            WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _) if pid == server => {
                return Ok(());
            }
            _ => {}
        }
    }
}

/// The half of the stream that leads to the lab, shared by all threads.
type Reports = Arc<Mutex<File>>;

/// What the server still needs of a running command.
struct Running {
    group: Pid,
    stdin: Option<Sender<Vec<u8>>>,
}

type Table = Arc<Mutex<BTreeMap<CommandId, Running>>>;

fn serve() -> Result<(), Box<dyn Error>> {
    let mut requests = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let reports: Reports =
        Arc::new(Mutex::new(File::from(io::stdout().as_fd().try_clone_to_owned()?)));
    let table = Table::default();
    send(&reports, &Report::Ready);
    while let Some(request) = read_frame(&mut requests)? {
        match request {
            Request::Start(id, start) => run(id, &start, &table, &reports),
            Request::Stdin(id, bytes) => {
                if let Some(Running { stdin: Some(stdin), .. }) = lock(&table).get(&id) {
                    // A command that closed its input or ended does not want the rest.
                    let _ = stdin.send(bytes);
                }
            }
            Request::CloseStdin(id) => {
                if let Some(running) = lock(&table).get_mut(&id) {
                    running.stdin = None;
                }
            }
            Request::Signal(id, number) => {
                if let Some(running) = lock(&table).get(&id) {
                    // The group may be gone already; its end is reported anyway.
                    let _ = killpg(running.group, Signal::try_from(number).ok());
                }
            }
        }
    }
    Ok(())
}

fn run(id: CommandId, start: &Start, table: &Table, reports: &Reports) {
    match spawn(start) {
        Ok(child) => follow(id, child, table, reports),
        Err(error) => send(reports, &Report::Refused(id, error.to_string())),
    }
}

fn spawn(start: &Start) -> io::Result<Child> {
    let Some((program, arguments)) = start.argv.split_first() else {
        return Err(io::Error::other("no program named"));
    };
    #[allow(clippy::disallowed_methods, reason = "a host has the programs that the lab gave it")]
    Command::new(program)
        .args(arguments)
        .envs(start.env.iter().map(|(name, value)| (name, value)))
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
}

/// Starts the threads that carry a command's streams and wait for its end.
fn follow(id: CommandId, mut child: Child, table: &Table, reports: &Reports) {
    let pid = child.id();
    let (stdin, bytes) = channel();
    if let Some(pipe) = child.stdin.take() {
        thread::spawn(move || feed(pipe, &bytes));
    }
    let group = Pid::from_raw(pid.cast_signed());
    lock(table).insert(id, Running { group, stdin: Some(stdin) });
    send(reports, &Report::Started(id, pid));

    let carry = |stream, pipe: Option<Box<dyn Read + Send>>| {
        let reports = Arc::clone(reports);
        pipe.map(|pipe| thread::spawn(move || carry_output(id, stream, pipe, &reports)))
    };
    let stdout = carry(Stream::Stdout, child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let stderr = carry(Stream::Stderr, child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let (table, reports) = (Arc::clone(table), Arc::clone(reports));
    thread::spawn(move || {
        let status = child.wait();
        for carrier in [stdout, stderr].into_iter().flatten() {
            // A carrier that panicked has printed why; the end of the command counts more.
            let _ = carrier.join();
        }
        lock(&table).remove(&id);
        // Only an agent that lost its child to another waiter fails here; that is no success.
        let ended = status.map_or(Ended::Status(i32::from(u8::MAX)), Ended::from);
        send(&reports, &Report::Ended(id, ended));
    });
}

fn feed(mut pipe: ChildStdin, bytes: &Receiver<Vec<u8>>) {
    for chunk in bytes {
        if pipe.write_all(&chunk).is_err() {
            return;
        }
    }
}

fn carry_output(id: CommandId, stream: Stream, mut pipe: impl Read, reports: &Reports) {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match pipe.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => send(reports, &Report::Output(id, stream, buffer[..count].to_vec())),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// A lab that is gone ends the server through its requests, not through its reports.
fn send(reports: &Reports, report: &Report) {
    let mut stream = reports.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = write_frame(&mut *stream, report);
}

fn lock(table: &Table) -> std::sync::MutexGuard<'_, BTreeMap<CommandId, Running>> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_gets_its_own_parameters() {
        let line = "console=ttyS0 kvm_intel.pml=0 kvm.x=1 kvm-intel.ept=N net.ifnames=0";
        assert_eq!(parameters(Path::new("/modules/03-kvm-intel.ko"), line), "pml=0 ept=N");
        assert_eq!(parameters(Path::new("/modules/02-kvm.ko"), line), "x=1");
        assert_eq!(parameters(Path::new("/modules/01-tun.ko"), line), "");
    }
}
