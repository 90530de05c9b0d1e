//! The reduced form: does the release have every package of the table, and does each bring its
//! program?
//!
//! apt works on a state of its own in which nothing is installed; packages with programs are
//! downloaded and looked into, none is installed.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use ftvmm_host_programs::{Origin, Program, Release, all_packages};
use ftvmm_tests::progress::Step;

use super::apt::{Settings, said_by};

/// Checks the table; true when all of it holds.
///
/// # Errors
/// When apt or the file system fails for another reason than the table.
pub fn check(release: Release, settings: &Settings, folder: &Path) -> Result<bool, Box<dyn Error>> {
    let apt = Apt::new(release, settings, &folder.join("packages"))?;
    let step = Step::start(format!("{}: apt-get update", release.name()));
    apt.ask(Program::AptGet, &["update"])?;
    drop(step);

    let _step = Step::start(format!("{}: looking into packages", release.name()));
    let names = all_packages(release);
    let install = ["install", "--simulate", "--no-install-recommends"];
    let plan = apt.ask(Program::AptGet, &[&install[..], &names].concat())?;
    let installed = plan.lines().filter(|line| line.starts_with("Inst ")).count();

    let rows = Program::ALL.iter().filter_map(|&p| Some((p, package_of(p, release)?)));
    let packages: BTreeSet<&str> = rows.clone().map(|(_, package)| package).collect();
    let download: Vec<&str> = ["download"].into_iter().chain(packages.iter().copied()).collect();
    apt.ask(Program::AptGet, &download)?;
    let mut contents = BTreeMap::new();
    for &package in &packages {
        contents.insert(package, apt.contents(package)?);
    }
    let mut faults = Vec::new();
    for (program, package) in rows {
        if !contents[package].lines().any(|line| is_program(line, program.file())) {
            faults.push(format!("{package} brings no {}", program.file()));
        }
        if matches!(program.origin(), Origin::Base(_)) && !apt.is_base(package)? {
            faults.push(format!("{package} is not part of the smallest Debian"));
        }
    }
    println!(
        "{}: {} programs in {} packages; {} packages for all that is ever started, {installed} \
         with \
         what those need",
        release.name(),
        Program::ALL.len(),
        packages.len(),
        names.len(),
    );
    faults.iter().for_each(|fault| println!("{}: {fault}", release.name()));
    Ok(faults.is_empty())
}

/// The package in which the program should be; none for one that is not Debian's.
fn package_of(program: Program, release: Release) -> Option<&'static str> {
    match program.origin() {
        Origin::Base(package) => Some(package),
        Origin::Package(package) => Some(package.name(release)),
        Origin::Toolchain | Origin::Crate(_) => None,
    }
}

/// Whether a line of `dpkg-deb --contents` is about this program: mode, owner, size, date, time,
/// path, and where a link leads to.
fn is_program(line: &str, file: &str) -> bool {
    let path = line.split_whitespace().nth(5).unwrap_or_default();
    let executable = line.starts_with('l') || line.get(3..4) == Some("x");
    executable
        && path.contains("/bin/") | path.contains("/sbin/") | path.contains("/lib")
        && path.rsplit('/').next() == Some(file)
}

/// apt with lists, archives and an empty list of installed packages in a folder.
struct Apt {
    /// An apt.conf, read before this machine's, which it puts out of force: its hooks have no
    /// business there.
    conf: PathBuf,
    archives: PathBuf,
}

impl Apt {
    fn new(release: Release, settings: &Settings, folder: &Path) -> Result<Self, Box<dyn Error>> {
        let archives = folder.join("archives");
        for below in ["lists/partial", "archives/partial"] {
            fs::create_dir_all(folder.join(below))?;
        }
        let [conf, status, sources] =
            ["apt.conf", "status", "sources.list"].map(|name| folder.join(name));
        fs::write(&status, "")?;
        fs::write(&sources, settings.sources(release))?;
        let nothing = Path::new("/dev/null");
        let places = [
            ("Dir::Etc::Main", nothing),
            ("Dir::Etc::Parts", nothing),
            ("Dir::Etc::SourceList", &sources),
            ("Dir::Etc::SourceParts", nothing),
            ("Dir::Etc::Preferences", nothing),
            ("Dir::Etc::PreferencesParts", nothing),
            ("Dir::State", folder),
            ("Dir::State::Lists", &folder.join("lists")),
            ("Dir::State::status", &status),
            ("Dir::Cache", folder),
            ("Dir::Cache::Archives", &archives),
        ];
        let line = |(name, place): (&str, &Path)| format!("{name} \"{}\";\n", place.display());
        let fixed = "APT::Architecture \"amd64\";\nAPT::Sandbox::User \"root\";\n";
        let places: String = places.into_iter().map(line).collect();
        fs::write(&conf, format!("{}{fixed}{places}", settings.acquire()))?;
        Ok(Self { conf, archives })
    }

    /// What one of apt's programs says.
    fn ask(&self, program: Program, arguments: &[&str]) -> Result<String, Box<dyn Error>> {
        let mut command = program.command()?;
        command.env("APT_CONFIG", &self.conf).env("LC_ALL", "C.UTF-8");
        said_by(command.args(arguments).current_dir(&self.archives))
    }

    /// What is in a package that was downloaded.
    fn contents(&self, package: &str) -> Result<String, Box<dyn Error>> {
        let prefix = format!("{package}_");
        let is_its = |path: &PathBuf| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
        };
        let newest = fs::read_dir(&self.archives)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(is_its)
            .max_by_key(|path| fs::metadata(path).and_then(|facts| facts.modified()).ok())
            .ok_or_else(|| format!("apt-get download {package} left no file"))?;
        said_by(Program::DpkgDeb.command()?.arg("--contents").arg(newest))
    }

    /// Whether debootstrap's minbase has it: what is essential, what that needs, and apt.
    fn is_base(&self, package: &str) -> Result<bool, Box<dyn Error>> {
        let said = self.ask(Program::AptCache, &["show", "--no-all-versions", package])?;
        Ok(package == "apt" || said.lines().any(|line| line == "Essential: yes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_an_executable_or_a_link_with_its_name() {
        let line = |mode: &str, path: &str| format!("{mode} root/root 1 2024-01-01 00:00 {path}");
        assert!(is_program(&line("-rwxr-xr-x", "./sbin/depmod"), "depmod"));
        assert!(is_program(&line("lrwxrwxrwx", "./bin/sh -> dash"), "sh"));
        assert!(is_program(&line("hrwxr-xr-x", "./sbin/mkfs.ext4 link to ./x"), "mkfs.ext4"));
        assert!(is_program(&line("-rwxr-xr-x", "./usr/lib/qemu/virtiofsd"), "virtiofsd"));
        assert!(!is_program(&line("-rw-r--r--", "./usr/share/bash-completion/make"), "make"));
        assert!(!is_program(&line("-rwxr-xr-x", "./sbin/depmod.old"), "depmod"));
    }
}
