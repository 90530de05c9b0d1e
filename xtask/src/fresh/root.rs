//! The whole: a fresh Debian in a folder, and the README's commands inside it.
//!
//! Everything is mounted in a mount namespace of one thread, so nothing stays mounted when that
//! thread or this program ends, however it ends; what runs inside is in a PID namespace of its own
//! and ends with it.

use std::error::Error;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use ftvmm_host_programs::{Program, Release, packages::cache_directory};
use ftvmm_tests::clock;
use ftvmm_tests::progress::Step;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::apt::Settings;

/// Where the checkout lies inside; a name with spaces costs nothing and has broken many a build.
const CHECKOUT: &str = "root/a fresh checkout";
/// What a checkout does not consist of.
const NOT_COPIED: &[&str] = &["target", "out", ".git"];
/// What the README asks for beside the toolchain: Rust links with it.
const LINKER: &str =
    "apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev";
/// What the README promises.
const COMMANDS: &[(&str, &str)] = &[
    ("linker", LINKER),
    ("demo", "cargo xtask demo"),
    ("test", "cargo xtask test --only format,unit"),
];
/// Variables of this machine that say how the network is reached.
const PASSED_ON: &[&str] = &["http_proxy", "https_proxy", "no_proxy", "RUSTUP_TOOLCHAIN"];
const SEARCH_PATH: &str =
    "/root/.cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// One command and how it went.
struct Done {
    name: &'static str,
    took: Duration,
    good: bool,
    packages: usize,
}

/// Makes the machine, runs the commands, says what came of them; true when all went well.
///
/// # Errors
/// When the machine cannot be made.
pub fn run(
    release: Release,
    settings: &Settings,
    folder: &Path,
    keep: bool,
) -> Result<bool, Box<dyn Error>> {
    if !nix::unistd::geteuid().is_root() {
        return Err("a fresh machine needs root: it is made by debootstrap and mounts".into());
    }
    let root = folder.join("root");
    remove(&root)?;
    // Crates come from this machine's registry folder, so nothing inside has to reach a registry.
    let fetched = Program::Cargo.command()?.args(["fetch", "--quiet", "--locked"]).status()?;
    if !fetched.success() {
        return Err("cargo fetch failed".into());
    }
    let began = clock::now();
    bootstrap(release, settings, folder, &root)?;
    let mut done = vec![Done {
        name: "debootstrap",
        took: began.elapsed(),
        good: true,
        packages: installed(&root),
    }];
    copy(Path::new("."), &root.join(CHECKOUT))?;

    let ran = thread::scope(|scope| scope.spawn(|| inside(folder, &root)).join());
    done.extend(
        ran.unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map_err(|e| e.to_string())?,
    );
    if !keep {
        remove(&root)?;
    }
    Ok(print(release, folder, &done)?)
}

fn print(release: Release, folder: &Path, done: &[Done]) -> std::io::Result<bool> {
    let mut text = format!("{:>8}  {:<12} {:>9}  result\n", "seconds", release.name(), "packages");
    for Done { name, took, good, packages } in done {
        let result = if *good { "passed" } else { "FAILED" };
        text += &format!("{:>8.0}  {name:<12} {packages:>9}  {result}\n", took.as_secs_f64());
    }
    println!("\n{text}logs: {}", folder.display());
    fs::write(folder.join("result.txt"), text)?;
    Ok(done.iter().all(|step| step.good))
}

fn bootstrap(
    release: Release,
    settings: &Settings,
    folder: &Path,
    root: &Path,
) -> Result<(), Box<dyn Error>> {
    let archives = folder.join("archives");
    fs::create_dir_all(&archives)?;
    let _step = Step::start(format!("debootstrap {}", release.name()));
    let log = File::create(folder.join("debootstrap.log"))?;
    let status = Program::Debootstrap
        .command()?
        .arg("--variant=minbase")
        .arg(format!("--keyring={}", settings.keyring().display()))
        .arg(format!("--cache-dir={}", archives.display()))
        .args([release.name().as_ref(), root.as_os_str(), settings.main_archive().as_ref()])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .status()?;
    if !status.success() {
        return Err(
            format!("debootstrap: {status}; see {}/debootstrap.log", folder.display()).into()
        );
    }
    fs::write(root.join("etc/apt/sources.list"), settings.sources(release))?;
    let keep = "Binary::apt::APT::Keep-Downloaded-Packages \"1\";\nAPT::Sandbox::User \"root\";\n";
    let conf = format!("{}{keep}", settings.acquire());
    fs::write(root.join("etc/apt/apt.conf.d/90-of-the-outer-machine"), conf)?;
    for file in ["etc/resolv.conf", "etc/hosts"] {
        fs::copy(Path::new("/").join(file), root.join(file))
            .map_err(|e| format!("/{file}: {e}"))?;
    }
    Ok(())
}

/// Runs the commands; the calling thread is in another mount namespace afterwards.
fn inside(folder: &Path, root: &Path) -> Outcome<Vec<Done>> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&Path>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    // What is `/` inside must be a mount: `ip netns exec` makes it a slave, as on every machine.
    bind(root, root)?;
    bind(Path::new("/dev"), &root.join("dev"))?;
    bind(&toolchain("RUSTUP_HOME", ".rustup")?, &root.join("root/.rustup"))?;
    bind(&toolchain("CARGO_HOME", ".cargo")?, &root.join("root/.cargo"))?;
    bind(&folder.join("archives"), &root.join("var/cache/apt/archives"))?;
    COMMANDS.iter().map(|&(name, line)| run_inside(name, line, folder, root)).collect()
}

fn bind(from: &Path, to: &Path) -> Outcome<()> {
    fs::create_dir_all(to)?;
    mount(Some(from), to, None::<&Path>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&Path>)
        .map_err(|errno| format!("{} on {}: {errno}", from.display(), to.display()).into())
}

/// A folder of rustup's or cargo's.
fn toolchain(variable: &str, usual: &str) -> Outcome<PathBuf> {
    let home = || Some(cache_directory().ok()?.ancestors().nth(2)?.join(usual));
    let folder = std::env::var_os(variable).map(PathBuf::from).or_else(home);
    let folder = folder.filter(|folder| folder.is_dir());
    folder.ok_or_else(|| format!("no toolchain to lend: set {variable} to rustup's folder").into())
}

fn run_inside(name: &'static str, line: &str, folder: &Path, root: &Path) -> Outcome<Done> {
    println!("\n=== {name}: {line}");
    let began = clock::now();
    let status = shell(line, root)?.stdin(Stdio::null()).status()?;
    fs::write(folder.join(format!("{name}.status")), format!("{status}\n"))?;
    Ok(Done { name, took: began.elapsed(), good: status.success(), packages: installed(root) })
}

/// A command that runs this line inside. It gets nothing of this machine's environment but the way
/// to the network: above all no locale.
fn shell(line: &str, root: &Path) -> Outcome<Command> {
    let variable = |name: &str| {
        let value = std::env::var_os(name)?;
        Some([OsString::from(name), value].join(&OsString::from("=")))
    };
    let mut command = Program::Unshare.command()?;
    command
        .args(["--pid", "--fork", "--kill-child", "--mount-proc", "--root"])
        .arg(root)
        .arg("--wd")
        .arg(Path::new("/").join(CHECKOUT))
        .args(["/usr/bin/env", "--ignore-environment", "HOME=/root", "TERM=dumb"])
        .arg(format!("PATH={SEARCH_PATH}"))
        .args(["CARGO_NET_OFFLINE=true", "RUSTUP_AUTO_INSTALL=0", "DEBIAN_FRONTEND=noninteractive"])
        .args(PASSED_ON.iter().filter_map(|name| variable(name)))
        .args(["/bin/sh", "-c", line]);
    Ok(command)
}

/// How many packages the machine in this folder has.
fn installed(root: &Path) -> usize {
    let status = fs::read_to_string(root.join("var/lib/dpkg/status")).unwrap_or_default();
    status.lines().filter(|line| *line == "Status: install ok installed").count()
}

/// Copies a checkout, with what is not committed yet.
fn copy(from: &Path, to: &Path) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (name, kind) = (entry.file_name(), entry.file_type()?);
        let target = to.join(&name);
        if kind.is_dir() && !NOT_COPIED.iter().any(|left| name == *left) {
            copy(&entry.path(), &target)?;
        } else if kind.is_file() {
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

/// Removes an earlier root, but never through a mount: it would lead out of it.
fn remove(root: &Path) -> Result<(), Box<dyn Error>> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    // As /proc/self/mounts writes a space.
    let inside = format!("{}/", root.display()).replace(' ', "\\040");
    if mounts.lines().any(|line| line.split(' ').nth(1).is_some_and(|at| at.starts_with(&inside))) {
        return Err(
            format!("something is mounted below {}; unmount it first", root.display()).into()
        );
    }
    match fs::remove_dir_all(root) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("{}: {error}", root.display()).into())
        }
        _ => Ok(()),
    }
}
