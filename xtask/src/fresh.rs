//! `cargo xtask fresh`: shows that a machine with nothing installed is enough.
//!
//! The whole takes debootstrap's `minbase` of a release in a folder, the toolchain of this machine
//! and a copy of the checkout, and runs the README's commands inside. `--packages-only` holds the
//! table of programs against the release's packages, which takes seconds instead of many minutes.

mod apt;
mod packages;
mod root;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ftvmm_host_programs::Release;

use self::apt::Settings;

/// Where roots, archives and logs lie.
const FOLDER: &str = "out/fresh";

/// Arguments of `cargo xtask fresh`.
#[derive(clap::Args)]
pub struct FreshArguments {
    /// The release of Debian: bookworm or trixie [default: both]
    #[arg(long, value_name = "NAME", value_parser = release)]
    release: Option<Release>,
    /// Only look whether the release's packages bring every program that is ever started
    #[arg(long)]
    packages_only: bool,
    /// Leave the root of the fresh machine where it is, to look into it
    #[arg(long)]
    keep: bool,
}

fn release(name: &str) -> Result<Release, String> {
    let names = || Release::ALL.map(Release::name).join(" or ");
    Release::named(name).ok_or_else(|| format!("expected {}", names()))
}

/// Tries the releases one after the other.
pub fn run(arguments: &FreshArguments) -> Result<ExitCode, Box<dyn Error>> {
    let settings = Settings::of_this_machine()?;
    let releases = arguments.release.map_or(Release::ALL.to_vec(), |release| vec![release]);
    let mut good = true;
    for release in releases {
        let folder = folder_of(release)?;
        good &= if arguments.packages_only {
            packages::check(release, &settings, &folder)?
        } else {
            root::run(release, &settings, &folder, arguments.keep)?
        };
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The release's folder, an absolute path.
fn folder_of(release: Release) -> Result<PathBuf, Box<dyn Error>> {
    let folder = Path::new(FOLDER).join(release.name());
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    Ok(folder.canonicalize()?)
}
