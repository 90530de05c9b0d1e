//! Every program of this machine that the project's tooling starts, and what brings it.
//!
//! A fresh machine has next to none of them. So nobody starts a program by a name of their own:
//! [`Program`] is the list, [`Program::command`] installs the Debian package of a program, and what
//! that program starts in turn, before it starts it. clippy.toml forbids
//! `std::process::Command::new` everywhere else; what this workspace has built itself is started
//! with [`built`].
//!
//! Programs inside the hosts of a lab and inside guests are not in the list: those are busybox's
//! and ours, and both are carried in.

#![forbid(unsafe_code)]

pub mod packages;
pub mod progress;
mod release;
mod table;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

pub use packages::PackageError;
pub use release::Release;
pub use table::{Origin, Package, Program, all_packages};

/// Where programs lie that not every user's `PATH` finds; the last two hold Debian's virtiofsd, by
/// release.
const FURTHER_PLACES: &[&str] = &[
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
    "/usr/lib/qemu",
    "/usr/libexec",
];

impl Program {
    /// A command that will start it, by its full path. Installs what is missing for that.
    ///
    /// # Errors
    /// [`PackageError::NeedsRoot`] carries the command that installs it; otherwise what apt-get
    /// answered, [`PackageError::NoProgram`] when the package is there and the program is not,
    /// or [`PackageError::NoCrate`] for a program that only cargo or pip brings.
    pub fn command(self) -> Result<Command, PackageError> {
        Ok(new_command(self.path()?))
    }

    /// Its full path. Installs what is missing for it.
    ///
    /// # Errors
    /// As [`Self::command`].
    pub fn path(self) -> Result<PathBuf, PackageError> {
        let packages = self.packages();
        // Only the programs of the base have none, among them those that ask for packages.
        if !packages.is_empty() && packages::can_install() {
            packages::ensure(&packages)?;
        }
        self.find().ok_or_else(|| match self.origin() {
            Origin::Crate(name) => PackageError::NoCrate { name },
            _ => PackageError::NoProgram {
                program: self.file(),
                packages: packages::names(&packages).join(" "),
            },
        })
    }

    fn find(self) -> Option<PathBuf> {
        let named = (self == Self::Cargo).then(|| std::env::var_os("CARGO")).flatten();
        let path = std::env::var_os("PATH").unwrap_or_default();
        named.map(PathBuf::from).or_else(|| find_in(&path, self.file()))
    }
}

fn find_in(search_path: &OsStr, file: &str) -> Option<PathBuf> {
    let further = FURTHER_PLACES.iter().map(PathBuf::from);
    std::env::split_paths(search_path)
        // A relative entry would mean another place in another directory.
        .filter(|place| place.is_absolute())
        .chain(further)
        .map(|place| place.join(file))
        .find(|path| path.is_file())
}

/// A command for a program that this workspace has built, by its path.
pub fn built(program: impl AsRef<Path>) -> Command {
    new_command(program.as_ref())
}

#[allow(clippy::disallowed_methods, reason = "the one place where programs are started")]
fn new_command(program: impl AsRef<OsStr>) -> Command {
    Command::new(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_where_a_users_path_does_not_look() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("depmod");
        std::fs::write(&file, "").unwrap();
        assert_eq!(find_in(place.path().as_os_str(), "depmod"), Some(file));
        assert!(find_in(OsStr::new(""), "dpkg-query").is_some());
        assert_eq!(find_in(place.path().as_os_str(), "no-such-program"), None);
    }

    #[test]
    fn a_program_of_debians_base_starts() {
        let said = Program::DpkgQuery.command().unwrap().arg("--version").output().unwrap();
        assert!(said.status.success(), "{said:?}");
    }

    #[test]
    fn a_crate_that_nobody_installed_is_named_with_its_command() {
        let error = PackageError::NoCrate { name: "cargo-deny" }.to_string();
        assert!(error.contains("cargo install --locked cargo-deny"), "{error}");
    }

    #[test]
    fn cargo_is_the_one_that_runs_us() {
        let running = std::env::var_os("CARGO").unwrap();
        assert_eq!(Program::Cargo.path().unwrap(), PathBuf::from(running));
    }
}
