//! A host with VMX and EPT: Debian's Bochs, an emulator of a PC with an Intel CPU.
//!
//! It stands alone: no network, no shared folder. What it is to have goes into its initramfs,
//! commands and their output go over its second serial line, which Bochs joins to a TCP socket. The
//! emulated machine's clock counts its instructions, so what runs in it notices nothing of how fast
//! this machine is.
//!
//! Bochs 2.7 has its own ways: Debian's build starts in its debugger; KVM's page-modification log
//! must be off (`pml=0`), because addresses in it are not aligned; a single step with TF may be
//! more than one; there is no XSAVE.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::error::{LabError, at};
use super::image::{self, Content};
use super::link::{LabProcess, Link, Output};
use super::protocol::{SERIAL_MARK, SHARE, Start};
use super::watch::Watch;
use crate::Program;
use crate::packages::{self, DebianKernel};

/// The modules of the host, in an order of loading that [`image::archive`] completes.
const MODULES: &[&str] = &["tun", "kvm-intel"];

/// Kernel command line of the host, as of an emulated AMD host; and the agent's serial line.
const COMMAND_LINE: &str = "console=ttyS0 panic=-1 mitigations=off nokaslr tsc=reliable \
                            no_timer_check \
                            ipv6.disable=1 net.ifnames=0 kvm_intel.pml=0 AGENT_PORT=ttyS1";

/// What Bochs is told beside the machine's description: to leave its debugger.
const DEBUGGER_COMMANDS: &str = "c\n";
const GRUB_MODULES: &str = "/usr/lib/grub/i386-pc";
const ELF_MAGIC: &[u8] = b"\x7fELF";
const CONSOLE: &str = "console.log";
/// How often to look whether Bochs has connected.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What an Intel host is made of.
#[derive(Debug, Clone)]
pub struct IntelConfig {
    /// Where its files and logs go; made when absent.
    pub folder: PathBuf,
    /// How long its console and its commands may be silent while something is waited for.
    pub silence: Duration,
    /// Its memory.
    pub memory_mib: u32,
    /// The `lab-agent` program of this crate.
    pub agent: PathBuf,
    /// Programs it is to find by name.
    pub programs: Vec<PathBuf>,
    /// Files it is to find in [`IntelHost::share`], under their own names.
    pub files: Vec<PathBuf>,
}

/// A running emulated Intel host; dropping it is the hard stop.
pub struct IntelHost {
    bochs: Child,
    link: Arc<Link>,
    silence: Duration,
}

impl IntelHost {
    /// Makes the host's disc, boots it and waits until it takes commands: a minute and more.
    ///
    /// # Errors
    /// What was missing or failed.
    pub fn start(config: &IntelConfig) -> Result<Self, LabError> {
        fs::create_dir_all(&config.folder).map_err(at(&config.folder))?;
        let folder = config.folder.canonicalize().map_err(at(&config.folder))?;
        let kernel = packages::cloud_kernel()?;
        make_disc(&folder, &kernel, config)?;

        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(at("agent socket"))?;
        let port = listener.local_addr().map_err(at("agent socket"))?.port();
        write(&folder, "bochsrc", machine(config.memory_mib, port).as_bytes())?;
        write(&folder, "debugger", DEBUGGER_COMMANDS.as_bytes())?;
        // The emulator appends.
        write(&folder, CONSOLE, &[])?;
        let watch = Arc::new(Watch::new());
        watch.follow(&folder.join(CONSOLE));
        watch.follow(&folder.join("bochs.log"));
        let screen = File::create(folder.join("screen.log")).map_err(at(&folder))?;
        let errors = screen.try_clone().map_err(at(&folder))?;
        // It ends with the thread that started it, however that ends.
        let mut bochs = Program::Setpriv
            .command()?
            .args(["--pdeathsig", "KILL"])
            .arg(Program::Bochs.path()?)
            .args(["-q", "-f", "bochsrc", "-rc", "debugger"])
            .current_dir(&folder)
            .env("TERM", "vt100")
            .stdin(Stdio::null())
            .stdout(screen)
            .stderr(errors)
            .spawn()
            .map_err(at("bochs"))?;
        let linked = accept(&listener, &mut bochs, &watch, config.silence)
            .and_then(|stream| Link::after_mark("intel", &folder, &watch, stream, SERIAL_MARK));
        let link = match linked {
            Ok(link) => link,
            Err(error) => {
                stop(&mut bochs);
                return Err(error);
            }
        };
        let host = Self { bochs, link, silence: config.silence };
        host.link.wait_ready(config.silence)?;
        // Two guests in lockstep on this one host meet there.
        let up = host.run(&["ip", "link", "set", "lo", "up"])?;
        if up.ended.success() {
            return Ok(host);
        }
        Err(LabError::HostCommandFailed {
            host: "intel".to_owned(),
            doing: "setting up the network".to_owned(),
            said: String::from_utf8_lossy(&up.stderr).into_owned(),
        })
    }

    /// Where the host has the files it was given.
    pub fn share(&self) -> &Path {
        Path::new(SHARE)
    }

    /// Starts a program with its arguments.
    ///
    /// # Errors
    /// [`LabError::Refused`] when the host cannot run it, [`LabError::HostGone`],
    /// [`LabError::Silent`].
    pub fn spawn(&self, argv: &[impl AsRef<str>]) -> Result<LabProcess, LabError> {
        self.launch(argv, false)
    }

    /// As [`Self::spawn`], and what it writes appears on this program's own output at once.
    ///
    /// # Errors
    /// As [`Self::spawn`].
    pub fn spawn_visible(&self, argv: &[impl AsRef<str>]) -> Result<LabProcess, LabError> {
        self.launch(argv, true)
    }

    fn launch(&self, argv: &[impl AsRef<str>], forward: bool) -> Result<LabProcess, LabError> {
        let argv = argv.iter().map(|word| word.as_ref().to_owned()).collect();
        self.link.spawn(Start { argv, env: Vec::new() }, forward, self.silence)
    }

    /// Runs a program with empty standard input to its end.
    ///
    /// # Errors
    /// As [`Self::spawn`]. An exit status other than 0 is no error here.
    pub fn run(&self, argv: &[impl AsRef<str>]) -> Result<Output, LabError> {
        self.spawn(argv)?.finish()
    }
}

impl Drop for IntelHost {
    fn drop(&mut self) {
        stop(&mut self.bochs);
    }
}

/// SIGKILL, then waits so that nothing of it runs when this returns.
fn stop(bochs: &mut Child) {
    // Both fail only when it has ended already.
    let _ = bochs.kill();
    let _ = bochs.wait();
}

/// The connection of Bochs, which connects while it makes its devices.
fn accept(
    listener: &TcpListener,
    bochs: &mut Child,
    watch: &Watch,
    silence: Duration,
) -> Result<TcpStream, LabError> {
    listener.set_nonblocking(true).map_err(at("agent socket"))?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).map_err(at("agent socket"))?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(at("agent socket")(error)),
        }
        let doing = "starting bochs".to_owned();
        if bochs.try_wait().map_err(at("bochs"))?.is_some() {
            let host = "intel".to_owned();
            return Err(LabError::HostGone { host, doing, tails: watch.tails() });
        }
        if watch.silence() > silence {
            return Err(LabError::Silent { silence, doing, tails: watch.tails() });
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// The machine, in Bochs's words.
fn machine(memory_mib: u32, port: u16) -> String {
    format!(
        "megs: {memory_mib}
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
cpu: model=corei7_skylake_x, count=1, ips=50000000, reset_on_triple_fault=0, ignore_bad_msrs=1
ata0-master: type=cdrom, path=host.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={CONSOLE}
com2: enabled=1, mode=socket-client, dev=localhost:{port}
log: bochs.log
display_library: term
clock: sync=none
sound: driver=dummy
panic: action=fatal
error: action=report
"
    )
}

/// Makes `host.iso`, which GRUB starts the kernel from.
fn make_disc(folder: &Path, kernel: &DebianKernel, config: &IntelConfig) -> Result<(), LabError> {
    let disc = folder.join("disc");
    let grub = disc.join("boot/grub");
    fs::create_dir_all(&grub).map_err(at(&grub))?;
    let menu = format!("linux /vmlinuz {COMMAND_LINE}\ninitrd /initramfs.cpio\nboot\n");
    write(&grub, "grub.cfg", menu.as_bytes())?;
    fs::copy(&kernel.bzimage, disc.join("vmlinuz")).map_err(at(&kernel.bzimage))?;
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let programs = config.programs.iter().map(|path| (format!("share/bin/{}", name(path)), path));
    let files = config.files.iter().map(|path| (format!("share/{}", name(path)), path));
    let stripped = tempfile::tempdir().map_err(at("a folder for programs"))?;
    let programs = programs
        .map(|(place, path)| Ok((place, strip(path, stripped.path())?)))
        .collect::<Result<Vec<_>, LabError>>()?;
    let agent = strip(&config.agent, stripped.path())?;
    let content: Vec<Content<'_>> = programs
        .iter()
        .map(|(place, path)| (place.clone(), path))
        .chain(files)
        .map(|(place, path)| Content { place, path: path.as_path() })
        .collect();
    let archive = image::archive(kernel, &agent, MODULES, &content)?;
    write(&disc, "initramfs.cpio", &archive)?;
    let mut command = Program::GrubMkrescue.command()?;
    command
        .args(["-d", GRUB_MODULES, "--install-modules=normal linux iso9660 biosdisk"])
        .args(["--fonts=", "--themes=", "--locales=", "-o"])
        .args([folder.join("host.iso").as_os_str(), disc.as_os_str()]);
    succeed(command)?;
    fs::remove_dir_all(&disc).map_err(at(&disc))
}

/// A copy of `program` in `folder` without what only a debugger reads: nine tenths of it, which the
/// emulator would read from its disc. A script is copied as it is.
fn strip(program: &Path, folder: &Path) -> Result<PathBuf, LabError> {
    let copy = folder.join(program.file_name().unwrap_or_default());
    let content = fs::read(program).map_err(at(program))?;
    if !content.starts_with(ELF_MAGIC) {
        fs::write(&copy, content).map_err(at(&copy))?;
        return Ok(copy);
    }
    let mut command = Program::Strip.command()?;
    command.arg("--strip-debug").arg("-o").args([copy.as_path(), program]);
    succeed(command)?;
    Ok(copy)
}

fn succeed(mut command: Command) -> Result<(), LabError> {
    let said = command.output().map_err(at(Path::new(command.get_program())))?;
    if said.status.success() {
        return Ok(());
    }
    Err(LabError::CommandFailed {
        command: format!("{command:?}"),
        said: String::from_utf8_lossy(&said.stderr).into_owned(),
    })
}

fn write(folder: &Path, name: &str, content: &[u8]) -> Result<(), LabError> {
    let path = folder.join(name);
    fs::write(&path, content).map_err(at(&path))
}
