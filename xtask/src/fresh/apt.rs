//! Where this machine has its packages from: a fresh one beside it asks the same mirrors.

use std::error::Error;
use std::path::Path;
use std::process::Command;

use ftvmm_host_programs::{Program, Release};

/// What signs Debian's archives; its package belongs to every Debian.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// The parts of a release.
const PARTS: [&str; 3] = ["", "-updates", "-security"];

/// This machine's mirrors and how it reaches them.
pub struct Settings {
    /// For each of [`PARTS`]: the address of its archive.
    archives: Vec<(&'static str, String)>,
    /// Lines of an apt.conf: proxies, time limits and the like.
    acquire: String,
}

impl Settings {
    /// Asks apt.
    ///
    /// # Errors
    /// When apt says nothing of an archive of Debian's.
    pub fn of_this_machine() -> Result<Self, Box<dyn Error>> {
        let format = "$(CREATED_BY) $(RELEASE) $(COMPONENT) $(REPO_URI)";
        let targets =
            said_by(Program::AptGet.command()?.args(["indextargets", "--format", format]))?;
        let archives = archives(&targets);
        if archives.iter().all(|(part, _)| !part.is_empty()) {
            return Err("apt on this machine is not set up for any release of Debian".into());
        }
        let acquire = ["dump", "--no-empty", "--format", "%F \"%v\";%n", "Acquire"];
        let acquire = said_by(Program::AptConfig.command()?.args(acquire))?;
        // How to reach a mirror, not what else to fetch from it.
        let reach = acquire.lines().filter(|line| !line.starts_with("Acquire::IndexTargets"));
        let acquire = reach.map(|line| format!("{line}\n")).collect();
        Ok(Self { archives, acquire })
    }

    /// Lines of a sources.list for `release`.
    pub fn sources(&self, release: Release) -> String {
        let line = |(part, uri): &(&str, String)| {
            format!("deb [signed-by={KEYRING}] {uri} {}{part} main\n", release.name())
        };
        self.archives.iter().map(line).collect()
    }

    /// The archive of the release itself.
    pub fn main_archive(&self) -> &str {
        self.archives.iter().find(|(part, _)| part.is_empty()).map_or("", |(_, uri)| uri)
    }

    /// Lines of an apt.conf.
    pub fn acquire(&self) -> &str {
        &self.acquire
    }

    /// The keys that archives are signed with.
    pub fn keyring(&self) -> &'static Path {
        Path::new(KEYRING)
    }
}

/// From lines such as `Packages bookworm-updates main <address>`, the first address of each part,
/// of whatever release this machine has.
fn archives(targets: &str) -> Vec<(&'static str, String)> {
    let address = |part: &str| {
        targets.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            let [kind, suite, component, uri] = std::array::from_fn(|_| words.next());
            let wanted = Release::ALL.iter().any(|release| {
                suite.and_then(|suite| suite.strip_prefix(release.name())) == Some(part)
            });
            let wanted = wanted && kind == Some("Packages") && component == Some("main");
            uri.filter(|_| wanted).map(str::to_owned)
        })
    };
    PARTS.into_iter().filter_map(|part| Some((part, address(part)?))).collect()
}

/// What a program that ends well writes.
pub fn said_by(command: &mut Command) -> Result<String, Box<dyn Error>> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim_end()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_release_have_the_mirrors_of_this_machine() {
        let targets = "Translations bookworm main http://wrong/\n\
                       Packages cloud-sdk main http://somebody-elses/\n\
                       Packages bookworm main http://mirror/debian/\n\
                       Packages bookworm-security main http://mirror/security/\n";
        let archives = archives(targets);
        assert_eq!(archives.len(), 2, "{archives:?}");
        let settings = Settings { archives, acquire: String::new() };
        assert_eq!(settings.main_archive(), "http://mirror/debian/");
        let lines = settings.sources(Release::Trixie);
        assert!(lines.contains("http://mirror/debian/ trixie main\n"), "{lines}");
        assert!(lines.contains("http://mirror/security/ trixie-security main\n"), "{lines}");
    }
}
