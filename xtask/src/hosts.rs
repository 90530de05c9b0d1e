//! Two hosts with `ftvmm` and a guest on them: where the demo and the bench begin.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ftvmm_guest_images::GuestKernel;
use ftvmm_tests::clock;
use ftvmm_tests::lab::{Backend, Lab, LabConfig, choose_backend};
use ftvmm_tests::pair::GuestFiles;
use ftvmm_tests::progress::Step;

use crate::{cargo, guest};

/// Memory of a lab host, enough for a guest and its files.
const HOST_MEMORY_MIB: u32 = 768;
/// How long all consoles may be silent while something is waited for.
const SILENCE: Duration = Duration::from_secs(120);

/// A lab that is ready for guests.
pub struct Hosts {
    /// The two hosts.
    pub lab: Lab,
    /// What they are made of.
    pub backend: Backend,
    /// Kernel and initramfs as the hosts see them.
    pub files: GuestFiles,
}

/// The folder for the logs of a `command`: the one that was chosen, or a new one below `out/`.
pub fn log_folder(command: &str, chosen: Option<&Path>) -> PathBuf {
    let new = || {
        let seconds = clock::since_epoch().as_secs();
        format!("out/{command}/{seconds}-{}", std::process::id()).into()
    };
    chosen.map_or_else(new, Path::to_owned)
}

impl Hosts {
    /// Builds what is missing, starts the hosts and carries `ftvmm`, the guest with `kernel` and
    /// `more` in. Logs go to `folder`, by default one below `out/` with the name of the
    /// `command`.
    ///
    /// # Errors
    /// What the build, the machine or the lab answered.
    pub fn start(
        command: &str,
        kernel: GuestKernel,
        folder: Option<&Path>,
        more: &[PathBuf],
    ) -> Result<Self, Box<dyn Error>> {
        let images = guest::ensure()?;
        let agent = cargo::build("ftvmm-tests", "lab-agent")?;
        let ftvmm = cargo::build("ftvmm", "ftvmm")?;
        let (backend, reason) = choose_backend(&ftvmm)?;
        println!("hosts: {backend:?} ({reason})");
        let folder = log_folder(command, folder);
        let _step = Step::start("starting two hosts");
        let lab = Lab::start(LabConfig {
            backend,
            hosts: 2,
            memory_mib: HOST_MEMORY_MIB,
            folder,
            silence: SILENCE,
            agent,
            counts_instructions: false,
        })?;
        for program in [&ftvmm, &images.programs].into_iter().chain(more) {
            lab.install(program)?;
        }
        let [kernel, initramfs] = images.boot_files(kernel);
        let files = GuestFiles::install(&lab, &kernel, &initramfs)?;
        println!("logs:  {}", lab.folder().display());
        Ok(Self { lab, backend, files })
    }
}
