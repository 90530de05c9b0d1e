//! How packages of Debian are had.
//!
//! Two ways: packages with programs are installed with apt-get ([`ensure`]), kernels are only
//! downloaded and unpacked into the user's cache ([`fetch_extracted`]), because installing a kernel
//! would touch the boot loader of the machine. Both keep a log and say what they do.
//!
//! Invariants: a process whose machine has a package asks dpkg about it once; a directory in the
//! cache is complete or absent (made aside, then renamed, under a lock); its name carries the
//! version.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::User;

use crate::Program;
use crate::progress::Step;
use crate::release::Release;
use crate::table::{CLOUD_KERNEL, GENERIC_KERNEL, KERNEL_SOURCE, Package};

/// apt changes this directory with every update.
const APT_LISTS: &str = "/var/lib/apt/lists";

/// Why something from Debian could not be had.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// Only root may install.
    #[error("missing packages; install them with:\n  {command}")]
    NeedsRoot {
        /// The exact command to type.
        command: String,
    },
    /// A program of the package system said no.
    #[error("`{command}` failed; the end of {log}:\n{tail}", log = log.display())]
    CommandFailed {
        /// What was run.
        command: String,
        /// Where all its output is.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
    },
    /// apt does not know the package, or nothing that it depends on.
    #[error("apt knows no installable version of {package}")]
    Unknown {
        /// The package asked for.
        package: String,
    },
    /// A package that should hold a file does not.
    #[error("{package} holds no {wanted}")]
    Incomplete {
        /// The package looked into.
        package: String,
        /// What was looked for.
        wanted: &'static str,
    },
    /// The environment names no place for a cache, and the user has no home.
    #[error("no cache directory: set XDG_CACHE_HOME or HOME")]
    NoCacheDirectory,
    /// It is nowhere on this machine, whatever apt was asked to install.
    #[error("this machine has no program {program:?}{}", from_package(packages))]
    NoProgram {
        /// Its file's name.
        program: &'static str,
        /// The packages that bring it; empty for a program that every Debian has.
        packages: String,
    },
    /// A program of a crate that nobody has installed here.
    #[error(
        "this machine has no {name}; it comes with `cargo install --locked {name}`, or at once and \
         without \
         root with `pip install astral-dev-toolchain-{name}`"
    )]
    NoCrate {
        /// The crate, and the file's name.
        name: &'static str,
    },
    /// The file system refused.
    #[error("{}", path.display())]
    Io {
        /// The file or directory concerned.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn from_package(packages: &str) -> String {
    match packages {
        "" => String::new(),
        packages => format!("; in Debian these packages bring it: {packages}"),
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> PackageError {
    let path = path.to_owned();
    move |source| PackageError::Io { path, source }
}

/// The user's cache directory of this project (`$XDG_CACHE_HOME/ftvmm` or `~/.cache/ftvmm`),
/// created when absent.
///
/// # Errors
/// [`PackageError::NoCacheDirectory`], or what the file system said.
pub fn cache_directory() -> Result<PathBuf, PackageError> {
    // Service managers and bare chroots start programs without HOME.
    let home = || match std::env::var_os("HOME") {
        Some(home) if !home.is_empty() => Some(PathBuf::from(home)),
        _ => User::from_uid(nix::unistd::getuid()).ok().flatten().map(|user| user.dir),
    };
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(cache) if !cache.is_empty() => PathBuf::from(cache),
        _ => home().ok_or(PackageError::NoCacheDirectory)?.join(".cache"),
    };
    let directory = base.join("ftvmm");
    fs::create_dir_all(&directory).map_err(at(&directory))?;
    Ok(directory)
}

/// Whether this machine is one where packages can be asked for: it has dpkg.
pub(crate) fn can_install() -> bool {
    Program::DpkgQuery.find().is_some()
}

/// What these packages are called on this machine.
pub(crate) fn names(packages: &[Package]) -> Vec<&'static str> {
    let release = Release::of_this_machine();
    packages.iter().map(|package| package.name(release)).collect()
}

/// Makes sure every package is installed, installing what is missing when root.
///
/// # Errors
/// [`PackageError::NeedsRoot`] carries the command to type; otherwise what apt-get answered.
pub fn ensure(packages: &[Package]) -> Result<(), PackageError> {
    // What was there once stays; and two threads must not both install.
    static INSTALLED: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    let release = Release::of_this_machine();
    let unknown = |package: &&Package| !installed.contains(package.name(release));
    let asked: Vec<Package> = packages.iter().filter(unknown).copied().collect();
    if !missing(&asked)?.is_empty() {
        let _held = lock(&cache_directory()?.join("packages.lock"))?;
        // Another process may have installed them meanwhile.
        install(&missing(&asked)?)?;
    }
    installed.extend(names(&asked));
    Ok(())
}

/// Those of the packages that are not installed.
fn missing(packages: &[Package]) -> Result<Vec<Package>, PackageError> {
    let release = Release::of_this_machine();
    let mut missing = Vec::new();
    for package in packages {
        if !is_installed(package.name(release))? {
            missing.push(*package);
        }
    }
    Ok(missing)
}

fn install(missing: &[Package]) -> Result<(), PackageError> {
    if missing.is_empty() {
        return Ok(());
    }
    let names = names(missing);
    let install = ["install", "--yes", "--no-install-recommends"];
    if !nix::unistd::geteuid().is_root() {
        let command = format!("sudo apt-get {} {}", install.join(" "), names.join(" "));
        return Err(PackageError::NeedsRoot { command });
    }
    for (package, name) in missing.iter().zip(&names) {
        eprintln!("missing {name}: {}", package.why);
    }
    update()?;
    let _step = Step::start(format!("apt-get install {}", names.join(" ")));
    apt_get(Path::new("/"), &[&install[..], &names[..]].concat())
}

fn is_installed(name: &str) -> Result<bool, PackageError> {
    let mut query = Program::DpkgQuery.command()?;
    query.args(["-W", "-f=${db:Status-Status}", name]);
    let answer = query.output().map_err(at(Path::new(query.get_program())))?;
    Ok(answer.stdout == b"installed")
}

fn update() -> Result<(), PackageError> {
    let _step = Step::start("apt-get update");
    apt_get(Path::new("/"), &["update"])
}

fn apt_get(directory: &Path, arguments: &[&str]) -> Result<(), PackageError> {
    // Somebody else's apt, such as a daily upgrade, ends by itself.
    let patience = ["-o", "DPkg::Lock::Timeout=300"];
    run_logged(Program::AptGet.command()?.args(patience).args(arguments).current_dir(directory))
}

/// Waits for the lock that this file is, and holds it.
fn lock(path: &Path) -> Result<Flock<File>, PackageError> {
    let file = File::create(path).map_err(at(path))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| at(path)(io::Error::from(errno)))
}

/// Where Debian puts the source of the kernel that guests get; installs it.
///
/// # Errors
/// As [`ensure`].
pub fn kernel_source() -> Result<PathBuf, PackageError> {
    ensure(&[KERNEL_SOURCE])?;
    let name = KERNEL_SOURCE.name(Release::of_this_machine());
    Ok(Path::new("/usr/src").join(format!("{name}.tar.xz")))
}

/// Runs a program of the package system, its output appended to the log in the cache.
fn run_logged(command: &mut Command) -> Result<(), PackageError> {
    let log = cache_directory()?.join("packages.log");
    let file = OpenOptions::new().create(true).append(true).open(&log).map_err(at(&log))?;
    let errors = file.try_clone().map_err(at(&log))?;
    let said = command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(errors)
        .status()
        .map_err(at(Path::new(command.get_program())))?;
    if said.success() {
        return Ok(());
    }
    let text = fs::read_to_string(&log).map_err(at(&log))?;
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(12)..].join("\n");
    Err(PackageError::CommandFailed { command: format!("{command:?}"), log, tail })
}

/// What apt would install for `name`, if anything.
fn candidate_version(name: &str) -> Option<String> {
    let show = ["show", "--no-all-versions", name];
    field(&Program::AptCache.command().ok()?.args(show).output().ok()?.stdout, "Version")
}

fn field(control: &[u8], name: &str) -> Option<String> {
    let control = String::from_utf8_lossy(control);
    let of_name = |line: &str| Some(line.strip_prefix(name)?.strip_prefix(": ")?.to_owned());
    control.lines().find_map(of_name)
}

/// Downloads a Debian package and unpacks it into the cache without installing it; returns the
/// directory that holds its files. `prepare` may add to the fresh directory before others see it.
///
/// # Errors
/// What apt-get, dpkg-deb or `prepare` answered; nothing half-made is left under the final name.
pub fn fetch_extracted(
    name: &str,
    prepare: impl Fn(&Path) -> Result<(), PackageError>,
) -> Result<PathBuf, PackageError> {
    let unknown = || PackageError::Unknown { package: name.to_owned() };
    let version = match candidate_version(name) {
        Some(version) => version,
        None => update().and_then(|()| candidate_version(name).ok_or_else(unknown))?,
    };
    let store = cache_directory()?.join("deb");
    fs::create_dir_all(&store).map_err(at(&store))?;
    let finished = store.join(format!("{name}_{version}"));
    if finished.is_dir() {
        return Ok(finished);
    }

    let _held = lock(&store.join(".lock"))?;
    if finished.is_dir() {
        return Ok(finished);
    }

    let _step = Step::start(format!("fetching {name} {version}"));
    let aside = tempfile::Builder::new().prefix(".new-").tempdir_in(&store).map_err(at(&store))?;
    let wanted = format!("{name}={version}");
    let download = || apt_get(aside.path(), &["download", &wanted]);
    // The archive drops superseded versions, so lists that have grown old name files that are gone.
    download().or_else(|_| update().and_then(|()| download()))?;
    let archive = fs::read_dir(aside.path())
        .map_err(at(aside.path()))?
        .find_map(|entry| entry.ok().map(|e| e.path()).filter(|p| has_extension(p, "deb")))
        .ok_or_else(unknown)?;
    let tree = aside.path().join("tree");
    run_logged(Program::DpkgDeb.command()?.arg("-x").arg(&archive).arg(&tree))?;
    prepare(&tree)?;
    fs::rename(&tree, &finished).map_err(at(&finished))?;
    Ok(finished)
}

fn has_extension(path: &Path, wanted: &str) -> bool {
    path.extension().is_some_and(|extension| extension == wanted)
}

/// A stock kernel of Debian's, unpacked in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DebianKernel {
    /// The unmodified bzImage.
    pub bzimage: PathBuf,
    /// `/lib/modules/<release>` of it, with `modules.dep` made by depmod.
    pub modules: PathBuf,
    /// As `uname -r` says it.
    pub release: String,
}

/// Fetches Debian's newest cloud kernel with its modules: it runs the lab hosts and it is a stock
/// kernel that guests are tested with.
///
/// # Errors
/// See [`fetch_extracted`]; also when the package is not laid out as Debian kernels are.
pub fn cloud_kernel() -> Result<DebianKernel, PackageError> {
    kernel(CLOUD_KERNEL)
}

/// Fetches Debian's newest generic kernel, the one that a freshly installed Debian boots.
///
/// # Errors
/// As [`cloud_kernel`].
pub fn generic_kernel() -> Result<DebianKernel, PackageError> {
    kernel(GENERIC_KERNEL)
}

fn kernel(newest: &str) -> Result<DebianKernel, PackageError> {
    let (versioned, tree) = match resolved_before(newest) {
        Some(known) => known,
        None => resolve(newest)?,
    };
    let release = versioned.trim_start_matches("linux-image-").to_owned();
    let bzimage = tree.join("boot").join(format!("vmlinuz-{release}"));
    let modules = tree.join("lib/modules").join(&release);
    let lacks = |wanted| PackageError::Incomplete { package: versioned.clone(), wanted };
    if !bzimage.is_file() {
        return Err(lacks("/boot/vmlinuz"));
    }
    if !modules.join("modules.dep").is_file() {
        return Err(lacks("/lib/modules"));
    }
    Ok(DebianKernel { bzimage, modules, release })
}

/// Where the answer of the last [`resolve`] is kept: asking apt costs seconds.
fn resolved_file(newest: &str) -> Option<PathBuf> {
    Some(cache_directory().ok()?.join("deb").join(newest))
}

/// The kept answer, when apt's lists have not changed since and the tree is still there.
fn resolved_before(newest: &str) -> Option<(String, PathBuf)> {
    let file = resolved_file(newest)?;
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    if modified(&file)? < modified(Path::new(APT_LISTS))? {
        return None;
    }
    let text = fs::read_to_string(&file).ok()?;
    let (versioned, tree) = text.split_once('\n')?;
    let tree = PathBuf::from(tree);
    tree.is_dir().then(|| (versioned.to_owned(), tree))
}

fn resolve(newest: &str) -> Result<(String, PathBuf), PackageError> {
    let versioned = kernel_package(newest)?;
    let release = versioned.trim_start_matches("linux-image-");
    let tree = fetch_extracted(&versioned, |tree| {
        // Since Debian 13 the modules are in /usr/lib, and depmod still looks into /lib.
        let lib = tree.join("lib");
        if !lib.exists() {
            std::os::unix::fs::symlink("usr/lib", &lib).map_err(at(&lib))?;
        }
        run_logged(Program::Depmod.command()?.arg("-b").arg(tree).arg(release))
    })?;
    if let Some(file) = resolved_file(newest) {
        let aside = file.with_extension(std::process::id().to_string());
        fs::write(&aside, format!("{versioned}\n{}", tree.display())).map_err(at(&aside))?;
        fs::rename(&aside, &file).map_err(at(&file))?;
    }
    Ok((versioned, tree))
}

fn kernel_package(newest: &str) -> Result<String, PackageError> {
    let ask = || {
        let depends = Program::AptCache.command().ok()?.args(["depends", newest]).output().ok()?;
        let text = String::from_utf8_lossy(&depends.stdout).into_owned();
        let name = text.lines().find_map(|line| line.trim().strip_prefix("Depends: "))?.to_owned();
        name.starts_with("linux-image-").then_some(name)
    };
    match ask() {
        Some(name) => Ok(name),
        None => update().and_then(|()| {
            ask().ok_or_else(|| PackageError::Unknown { package: newest.to_owned() })
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_installed_package_is_seen_and_an_absent_one_is_not() {
        assert!(is_installed("dpkg").unwrap());
        assert!(!is_installed("no-such-package-anywhere").unwrap());
    }

    #[test]
    fn a_control_field_is_found_by_its_whole_name() {
        let control = b"Package: x\nVersion-Old: 1\nVersion: 2:3~4\n";
        assert_eq!(field(control, "Version").as_deref(), Some("2:3~4"));
        assert_eq!(field(control, "Vers"), None);
    }

    #[test]
    fn a_failed_command_reports_itself_and_its_last_words() {
        let failed =
            run_logged(Program::Sh.command().unwrap().args(["-c", "echo last words; exit 3"]));
        let text = failed.expect_err("exit status 3 is a failure").to_string();
        assert!(text.contains("last words"), "{text}");
    }
}
