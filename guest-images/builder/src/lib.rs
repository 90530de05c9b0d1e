//! Builds what runs in the virtual machine under test: a tiny kernel from Debian's source, an
//! initramfs with busybox and our programs, and beside them Debian's stock kernels, each with an
//! initramfs that also holds its own modules.
//!
//! The caller says where Debian's files are ([`Inputs`]); the tools are [`Program`]s, which come
//! when they are started.
//!
//! Invariants: a finished folder in the cache is named by a digest of all that went into it,
//! appears by one rename and never changes. Equal inputs give equal bytes: no time, name or path of
//! the machine goes in.

mod initramfs;
mod kernel;
pub mod modules;
mod programs;
mod store;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ftvmm_host_programs::{PackageError, Program};
use store::Store;

/// What the guest is made from.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// The folder of this project in the user's cache.
    pub cache: PathBuf,
    /// The archive of Debian's kernel source, such as `linux-source-6.1.tar.xz`.
    pub kernel_source: PathBuf,
    /// Debian's stock kernel for clouds.
    pub cloud: StockKernel,
    /// Debian's stock kernel for everything.
    pub generic: StockKernel,
}

/// An unpacked kernel package of Debian's.
#[derive(Debug, Clone)]
pub struct StockKernel {
    /// Its `vmlinuz`.
    pub bzimage: PathBuf,
    /// Its `/lib/modules/<release>`, with `modules.dep`.
    pub modules: PathBuf,
    /// As `uname -r` says it.
    pub release: String,
}

/// The kernels a guest can boot, each with an initramfs of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestKernel {
    /// Ours, with everything built in.
    Tiny,
    /// Debian's for clouds, unmodified.
    Cloud,
    /// Debian's for everything, unmodified.
    Generic,
}

impl GuestKernel {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tiny, Self::Cloud, Self::Generic];

    /// The name a user types.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tiny => "tiny",
            Self::Cloud => "cloud",
            Self::Generic => "generic",
        }
    }

    /// What a stock kernel needs to unpack its initramfs and run is more than the tiny one's.
    pub fn memory_mib(self) -> u32 {
        match self {
            Self::Tiny => 128,
            Self::Cloud | Self::Generic => 256,
        }
    }

    /// Names of kernel and initramfs in the folder of a guest.
    fn files(self) -> [&'static str; 2] {
        match self {
            Self::Tiny => ["bzImage", "initramfs.cpio"],
            Self::Cloud => ["cloud-vmlinuz", "cloud-initramfs.cpio"],
            Self::Generic => ["generic-vmlinuz", "generic-initramfs.cpio"],
        }
    }
}

/// A finished guest; all files lie in one folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// The folder.
    pub folder: PathBuf,
    /// bzImage of the tiny kernel.
    pub kernel: PathBuf,
    /// The tiny kernel's initramfs, an uncompressed cpio archive.
    pub initramfs: PathBuf,
    /// The guest programs; they run on a host too, as in `ftguest streamsum 1000000`.
    pub programs: PathBuf,
}

impl Guest {
    /// The guest in a folder that [`build`] made and `cargo xtask guest` printed.
    pub fn in_folder(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            kernel: folder.join(GuestKernel::Tiny.files()[0]),
            initramfs: folder.join(GuestKernel::Tiny.files()[1]),
            programs: folder.join(PROGRAMS),
        }
    }

    /// An initramfs for the cloud kernel whose folder `boot` has that kernel and its initramfs, as
    /// `vmlinuz` and `initramfs`: for `kexec`. The tiny kernel cannot be moved, so it cannot be
    /// started like that.
    ///
    /// # Errors
    /// What the file system said.
    pub fn kexec_initramfs(&self) -> Result<Vec<u8>, GuestBuildError> {
        let [kernel, initramfs] = self.boot_files(GuestKernel::Cloud);
        let kernel = fs::read(&kernel).map_err(at(&kernel))?;
        let mut archive = fs::read(&initramfs).map_err(at(&initramfs))?;
        let files = BTreeMap::from([
            ("boot/vmlinuz".to_owned(), kernel),
            ("boot/initramfs".to_owned(), archive.clone()),
        ]);
        archive.extend(initramfs::overlay(files).map_err(at(&initramfs))?);
        Ok(archive)
    }

    /// Kernel and initramfs of one of the kernels.
    pub fn boot_files(&self, kernel: GuestKernel) -> [PathBuf; 2] {
        kernel.files().map(|name| self.folder.join(name))
    }
}

/// Why a guest could not be built.
#[derive(Debug, thiserror::Error)]
pub enum GuestBuildError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory concerned.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A program could not be had.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// A program could not be started.
    #[error("{program}: {source}")]
    NotStarted {
        /// The program.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// A program of the build failed.
    #[error("`{command}` failed ({status}); the end of {}:\n{tail}", log.display())]
    CommandFailed {
        /// What was run.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// Where all its output is.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
    },
    /// Kconfig did not take a line of kernel.config: an option was renamed or lacks what it depends
    /// on.
    #[error("the kernel's configuration does not honour {line:?}")]
    ConfigurationIgnored {
        /// The line.
        line: String,
    },
    /// A kernel package lacks a module.
    #[error(transparent)]
    NoModule(#[from] modules::MissingModule),
    /// Cargo built the guest programs but did not say where.
    #[error("cargo named no executable of {package}")]
    NoExecutable {
        /// The package built.
        package: &'static str,
    },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> GuestBuildError {
    let path = path.to_owned();
    move |source| GuestBuildError::Io { path, source }
}

/// Builds what is not in the cache yet and returns the finished guest. The programs are always put
/// to cargo, which knows best whether they are fresh. Concurrent builders wait for each other.
///
/// # Errors
/// See [`GuestBuildError`]; nothing half-made is left under a final name.
pub fn build(inputs: &Inputs) -> Result<Guest, GuestBuildError> {
    let store = Store::lock(&inputs.cache)?;
    let kernel = kernel::build(&store, &inputs.kernel_source)?;
    let programs = programs::build(&store)?;
    let userland = initramfs::Userland::read(&Program::Busybox.path()?, &programs)?;
    let stock = |kernel: &StockKernel| userland.archive(modules::files(kernel)?);
    let kernels = [
        (GuestKernel::Tiny, &kernel, userland.archive(BTreeMap::new())?),
        (GuestKernel::Cloud, &inputs.cloud.bzimage, stock(&inputs.cloud)?),
        (GuestKernel::Generic, &inputs.generic.bzimage, stock(&inputs.generic)?),
    ];

    let mut parts = vec![fs::read(&programs).map_err(at(&programs))?];
    for (_, kernel, archive) in &kernels {
        parts.push(fs::read(kernel).map_err(at(kernel))?);
        parts.push(archive.clone());
    }
    let digest = store::digest(parts.iter().map(Vec::as_slice));
    let folder = store.publish("guest", &digest, |folder| {
        for (which, kernel, archive) in &kernels {
            let [kernel_place, archive_place] = which.files().map(|name| folder.join(name));
            link_or_copy(kernel, &kernel_place)?;
            fs::write(&archive_place, archive).map_err(at(&archive_place))?;
        }
        link_or_copy(&programs, &folder.join(PROGRAMS))
    })?;
    Ok(Guest::in_folder(&folder))
}

/// Kernels are the same in most guest folders, so they share their blocks where the file system
/// allows.
fn link_or_copy(from: &Path, to: &Path) -> Result<(), GuestBuildError> {
    fs::hard_link(from, to).or_else(|_| fs::copy(from, to).map(drop)).map_err(at(to))
}

const PROGRAMS: &str = "ftguest";
