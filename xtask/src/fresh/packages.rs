//! The reduced form: does the release have every package of the table, and does each bring its program?
//!
//! apt works on a state of its own in which nothing is installed; packages with programs are downloaded and looked
//! into, none is installed.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::Command;

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
    said_by(apt.get()?.arg("update"))?;
    drop(step);

    let _step = Step::start(format!("{}: looking into packages", release.name()));
    let names = all_packages(release);
    let install = ["install", "--simulate", "--no-install-recommends"];
    let plan = said_by(apt.get()?.args(install).args(&names))?;
    let installed = plan.lines().filter(|line| line.starts_with("Inst ")).count();

    let mut faults = Vec::new();
    let mut contents = BTreeMap::new();
    for program in Program::ALL {
        let Some(package) = package_of(*program, release) else { continue };
        if !contents.contains_key(package) {
            contents.insert(package, apt.contents(package)?);
        }
        if !contents[package].lines().any(|line| is_program(line, program.file())) {
            faults.push(format!("{package} brings no {}", program.file()));
        }
        if matches!(program.origin(), Origin::Base(_)) && !apt.is_base(package)? {
            faults.push(format!("{package} is not part of the smallest Debian"));
        }
    }
    println!(
        "{}: {} programs in {} packages; {} packages for all that is ever started, {installed} with \
         what those need",
        release.name(),
        Program::ALL.len(),
        contents.len(),
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
        Origin::Toolchain => None,
    }
}

/// Whether a line of `dpkg-deb --contents` is about this program: mode, owner, size, date, time, path, and where a
/// link leads to.
fn is_program(line: &str, file: &str) -> bool {
    let path = line.split_whitespace().nth(5).unwrap_or_default();
    let executable = line.starts_with('l') || line.get(3..4) == Some("x");
    executable
        && path.contains("/bin/") | path.contains("/sbin/") | path.contains("/lib")
        && path.rsplit('/').next() == Some(file)
}

/// apt with lists, archives and an empty list of installed packages in a folder.
struct Apt {
    options: Vec<String>,
    archives: std::path::PathBuf,
}

impl Apt {
    fn new(release: Release, settings: &Settings, folder: &Path) -> Result<Self, Box<dyn Error>> {
        let archives = folder.join("archives");
        for below in ["lists/partial", "archives/partial"] {
            fs::create_dir_all(folder.join(below))?;
        }
        let (status, sources, conf) =
            (folder.join("status"), folder.join("sources.list"), folder.join("apt.conf"));
        fs::write(&status, "")?;
        fs::write(&sources, settings.sources(release))?;
        fs::write(&conf, settings.acquire())?;
        let places = [
            ("Dir::State", folder),
            ("Dir::State::Lists", &folder.join("lists")),
            ("Dir::State::status", &status),
            ("Dir::Cache", folder),
            ("Dir::Cache::Archives", &archives),
            ("Dir::Etc::SourceList", &sources),
            ("Dir::Etc::SourceParts", Path::new("/dev/null")),
            ("Dir::Etc::Preferences", Path::new("/dev/null")),
            ("Dir::Etc::PreferencesParts", Path::new("/dev/null")),
            // This machine's own hooks have no business there.
            ("Dir::Etc::Parts", Path::new("/dev/null")),
            ("Dir::Etc::Main", &conf),
        ];
        let fixed = ["APT::Architecture=amd64", "APT::Sandbox::User=root"].map(str::to_owned);
        let places = places.map(|(name, place)| format!("{name}={}", place.display()));
        let options = places.into_iter().chain(fixed).flat_map(|option| ["-o".to_owned(), option]);
        Ok(Self { options: options.collect(), archives })
    }

    fn get(&self) -> Result<Command, Box<dyn Error>> {
        let mut command = Program::AptGet.command()?;
        command.args(&self.options).env("LC_ALL", "C.UTF-8").current_dir(&self.archives);
        Ok(command)
    }

    /// What is in a package, which is downloaded unless it is here already.
    fn contents(&self, package: &str) -> Result<String, Box<dyn Error>> {
        said_by(self.get()?.args(["download", package]))?;
        let prefix = format!("{package}_");
        let newest = fs::read_dir(&self.archives)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&prefix))
            })
            .max_by_key(|path| fs::metadata(path).and_then(|facts| facts.modified()).ok())
            .ok_or_else(|| format!("apt-get download {package} left no file"))?;
        said_by(Program::DpkgDeb.command()?.arg("--contents").arg(newest))
    }

    /// Whether debootstrap's minbase has it: what is essential, what that needs, and apt.
    fn is_base(&self, package: &str) -> Result<bool, Box<dyn Error>> {
        let mut show = Program::AptCache.command()?;
        let said = said_by(show.args(&self.options).args(["show", "--no-all-versions", package]))?;
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
