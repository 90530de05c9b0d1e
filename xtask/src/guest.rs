//! `cargo xtask guest`: joins Debian's packages with the builder of the guest images.

use std::error::Error;
use std::process::ExitCode;

use ftvmm_guest_images::{Guest, Inputs, StockKernel};
use ftvmm_tests::packages::{self, DebianKernel};

/// Names the folder of a finished guest and so spares the look into the cache.
const GUEST_FOLDER: &str = "FTVMM_GUEST";

/// Arguments of `cargo xtask guest`.
#[derive(clap::Args)]
pub struct GuestArguments {}

/// Makes the guest images and prints their folder.
pub fn run(_arguments: &GuestArguments) -> Result<ExitCode, Box<dyn Error>> {
    println!("{}", ensure()?.folder.display());
    Ok(ExitCode::SUCCESS)
}

/// Installs or fetches what the guest is made from and builds what the cache lacks.
///
/// # Errors
/// What the package system or the build answered.
pub fn ensure() -> Result<Guest, Box<dyn Error>> {
    if let Some(folder) = std::env::var_os(GUEST_FOLDER) {
        return Ok(Guest::in_folder(folder.as_ref()));
    }
    let stock = |kernel: DebianKernel| StockKernel {
        bzimage: kernel.bzimage,
        modules: kernel.modules,
        release: kernel.release,
    };
    let inputs = Inputs {
        cache: packages::cache_directory()?,
        kernel_source: packages::kernel_source()?,
        cloud: stock(packages::cloud_kernel()?),
        generic: stock(packages::generic_kernel()?),
    };
    Ok(ftvmm_guest_images::build(&inputs)?)
}
