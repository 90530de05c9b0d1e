//! The table: programs, and the packages they come from.
//!
//! `cargo xtask fresh --packages-only` holds it against Debian's own lists, for every release.

use crate::release::Release;

/// A Debian package and the reason this project wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Package {
    bookworm: &'static str,
    trixie: &'static str,
    /// What it is for, shown when it is missing.
    pub why: &'static str,
}

impl Package {
    const fn new(name: &'static str, why: &'static str) -> Self {
        Self { bookworm: name, trixie: name, why }
    }

    const fn renamed(bookworm: &'static str, trixie: &'static str, why: &'static str) -> Self {
        Self { bookworm, trixie, why }
    }

    /// Name as apt knows it in this release.
    pub fn name(&self, release: Release) -> &'static str {
        match release {
            Release::Bookworm => self.bookworm,
            Release::Trixie => self.trixie,
        }
    }
}

/// Where a program comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The smallest Debian has it: debootstrap's `minbase`.
    Base(&'static str),
    /// This package.
    Package(Package),
    /// rustup.
    Toolchain,
    /// A crate of this name, which whoever wants it installs: nothing here waits for its build
    /// unasked.
    Crate(&'static str),
}

const QEMU: Package = Package::new("qemu-system-x86", "emulates a machine with AMD-V");
const VIRTIOFSD: Package =
    Package::renamed("qemu-system-common", "virtiofsd", "the folder that the hosts of a lab share");
const BUSYBOX: Package =
    Package::new("busybox-static", "the userland of a guest and of a lab host");
const IPROUTE: Package = Package::new("iproute2", "private networks between hosts and clients");
const KMOD: Package = Package::new("kmod", "depmod: the load order of a kernel's modules");
const CURL: Package = Package::new("curl", "the client that must not notice a failover");
const PING: Package = Package::new("iputils-ping", "the client that measures stalls");
const E2FSPROGS: Package = Package::new("e2fsprogs", "makes and checks the disks of guests");
const BOCHS: Package = Package::new("bochs", "emulates a machine with VMX and EPT");
const GRUB: Package = Package::new("grub-common", "makes the disc an Intel host boots from");
const BINUTILS: Package = Package::new("binutils", "strip: the programs on that disc");
const DEBOOTSTRAP: Package = Package::new("debootstrap", "makes a fresh Debian in a folder");
const GIT: Package = Package::new("git", "names the commit that was measured");
const ETCD: Package =
    Package::new("etcd-server", "a cluster that the tests of the etcd witness ask");
const XZ: Package = Package::new("xz-utils", "unpacks the guest kernel's source");
const MAKE: Package = Package::new("make", "drives the guest kernel's build");

/// What a build of the guest kernel starts or reads, make aside.
const KERNEL_BUILD: &[Package] = &[
    Package::new("gcc", "compiles the guest kernel"),
    Package::new("libc6-dev", "the C library of the programs that build the guest kernel"),
    Package::new("flex", "part of the guest kernel's build"),
    Package::new("bison", "part of the guest kernel's build"),
    Package::new("bc", "part of the guest kernel's build"),
    Package::new("libelf-dev", "objtool of the guest kernel's build"),
    Package::new("lz4", "compresses the guest kernel"),
];

/// What a build of this workspace starts and reads, beside a linker: etcd's protocol is compiled
/// from its description.
const RUST_BUILD: &[Package] = &[
    Package::new("protobuf-compiler", "protoc: compiles the description of etcd's protocol"),
    Package::new("libprotobuf-dev", "what that description is written with"),
];

/// What Bochs loads beside itself.
const BOCHS_PARTS: &[Package] = &[
    Package::new("bochs-term", "the emulator's screen"),
    Package::new("bochsbios", "the emulated machine's firmware"),
    Package::new("vgabios", "the firmware of its graphics card"),
];

/// What grub-mkrescue starts and reads.
const GRUB_PARTS: &[Package] = &[
    Package::new("grub-pc-bin", "the boot loader on the disc of an Intel host"),
    Package::new("xorriso", "writes that disc"),
];

/// The source of the tiny guest kernel.
pub(crate) const KERNEL_SOURCE: Package = Package::renamed(
    "linux-source-6.1",
    "linux-source-6.12",
    "the source of the tiny guest kernel",
);

/// Packages that always depend on Debian's newest kernel of a kind.
pub(crate) const CLOUD_KERNEL: &str = "linux-image-cloud-amd64";
pub(crate) const GENERIC_KERNEL: &str = "linux-image-amd64";

/// A program of this machine that the tooling starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// Looks into apt's lists.
    AptCache,
    /// Tells how apt is set up.
    AptConfig,
    /// Installs and downloads packages.
    AptGet,
    /// Emulates an Intel host.
    Bochs,
    /// The userland of guests and lab hosts, statically linked.
    Busybox,
    /// Builds Rust.
    Cargo,
    /// Looks into licences and sources of the dependencies.
    CargoDeny,
    /// Tells which lines tests reach.
    CargoLlvmCov,
    /// A client that downloads.
    Curl,
    /// Looks into the file system of a guest's disk.
    Debugfs,
    /// Makes a Debian in a folder.
    Debootstrap,
    /// Finds out which kernel modules need which.
    Depmod,
    /// Unpacks packages.
    DpkgDeb,
    /// Tells what is installed.
    DpkgQuery,
    /// Checks the file system of a guest's disk.
    E2fsck,
    /// A member of a cluster that holds a witness.
    Etcd,
    /// Runs a program while a file is locked.
    Flock,
    /// Tells which commit is checked out.
    Git,
    /// Makes a disc that boots.
    GrubMkrescue,
    /// Makes networks, and starts other programs in them.
    Ip,
    /// Tells which libraries a program is linked with.
    Ldd,
    /// Builds the guest kernel.
    Make,
    /// Makes the file system of a guest's disk.
    MkfsExt4,
    /// A client that asks for echoes.
    Ping,
    /// Emulates a host.
    Qemu,
    /// Runs a program of another toolchain.
    Rustup,
    /// Starts a program that ends with the one that started it.
    Setpriv,
    /// A shell for what it has built in.
    Sh,
    /// Takes from a program what only a debugger reads.
    Strip,
    /// Unpacks the kernel's source.
    Tar,
    /// Makes a network lose, delay and spoil frames.
    Tc,
    /// Starts a program in namespaces of its own.
    Unshare,
    /// Serves a folder to emulated hosts.
    Virtiofsd,
}

impl Program {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::AptCache,
        Self::AptConfig,
        Self::AptGet,
        Self::Bochs,
        Self::Busybox,
        Self::Cargo,
        Self::CargoDeny,
        Self::CargoLlvmCov,
        Self::Curl,
        Self::Debugfs,
        Self::Debootstrap,
        Self::Depmod,
        Self::DpkgDeb,
        Self::DpkgQuery,
        Self::E2fsck,
        Self::Etcd,
        Self::Flock,
        Self::Git,
        Self::GrubMkrescue,
        Self::Ip,
        Self::Ldd,
        Self::Make,
        Self::MkfsExt4,
        Self::Ping,
        Self::Qemu,
        Self::Rustup,
        Self::Setpriv,
        Self::Sh,
        Self::Strip,
        Self::Tar,
        Self::Tc,
        Self::Unshare,
        Self::Virtiofsd,
    ];

    /// Its row: the file's name, where it comes from, and the packages of what it starts or reads
    /// in turn.
    fn row(self) -> (&'static str, Origin, &'static [Package]) {
        use Origin::{Base, Crate, Package as From, Toolchain};
        match self {
            Self::AptCache => ("apt-cache", Base("apt"), &[]),
            Self::AptConfig => ("apt-config", Base("apt"), &[]),
            Self::AptGet => ("apt-get", Base("apt"), &[]),
            Self::Bochs => ("bochs", From(BOCHS), BOCHS_PARTS),
            Self::Busybox => ("busybox", From(BUSYBOX), &[]),
            Self::Cargo => ("cargo", Toolchain, RUST_BUILD),
            Self::CargoDeny => ("cargo-deny", Crate("cargo-deny"), &[]),
            Self::CargoLlvmCov => ("cargo-llvm-cov", Crate("cargo-llvm-cov"), &[]),
            Self::Curl => ("curl", From(CURL), &[]),
            Self::Debugfs => ("debugfs", From(E2FSPROGS), &[]),
            Self::Debootstrap => ("debootstrap", From(DEBOOTSTRAP), &[]),
            Self::Depmod => ("depmod", From(KMOD), &[]),
            Self::DpkgDeb => ("dpkg-deb", Base("dpkg"), &[]),
            Self::DpkgQuery => ("dpkg-query", Base("dpkg"), &[]),
            Self::E2fsck => ("e2fsck", From(E2FSPROGS), &[]),
            Self::Etcd => ("etcd", From(ETCD), &[]),
            Self::Flock => ("flock", Base("util-linux"), &[]),
            Self::Git => ("git", From(GIT), &[]),
            Self::GrubMkrescue => ("grub-mkrescue", From(GRUB), GRUB_PARTS),
            Self::Ip => ("ip", From(IPROUTE), &[]),
            Self::Ldd => ("ldd", Base("libc-bin"), &[]),
            Self::Make => ("make", From(MAKE), KERNEL_BUILD),
            Self::MkfsExt4 => ("mkfs.ext4", From(E2FSPROGS), &[]),
            Self::Ping => ("ping", From(PING), &[]),
            Self::Qemu => ("qemu-system-x86_64", From(QEMU), &[]),
            Self::Rustup => ("rustup", Toolchain, &[]),
            Self::Setpriv => ("setpriv", Base("util-linux"), &[]),
            Self::Sh => ("sh", Base("dash"), &[]),
            Self::Strip => ("strip", From(BINUTILS), &[]),
            Self::Tar => ("tar", Base("tar"), &[XZ]),
            Self::Tc => ("tc", From(IPROUTE), &[]),
            Self::Unshare => ("unshare", Base("util-linux"), &[]),
            Self::Virtiofsd => ("virtiofsd", From(VIRTIOFSD), &[]),
        }
    }

    /// The name of its file.
    pub fn file(self) -> &'static str {
        self.row().0
    }

    /// Where it comes from.
    pub fn origin(self) -> Origin {
        self.row().1
    }

    /// What must be installed before it starts: its own package and those of what it starts or
    /// reads.
    pub fn packages(self) -> Vec<Package> {
        let (_, origin, further) = self.row();
        let own = match origin {
            Origin::Package(package) => Some(package),
            Origin::Base(_) | Origin::Toolchain | Origin::Crate(_) => None,
        };
        own.into_iter().chain(further.iter().copied()).collect()
    }
}

/// Every package of the table, in the release's names.
pub fn all_packages(release: Release) -> Vec<&'static str> {
    let of_programs = Program::ALL.iter().flat_map(|program| program.packages());
    let names = of_programs.chain([KERNEL_SOURCE]).map(|package| package.name(release));
    let mut names: Vec<_> = names.chain([CLOUD_KERNEL, GENERIC_KERNEL]).collect();
    names.sort_unstable();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_has_every_program_once() {
        let files: std::collections::BTreeSet<_> = Program::ALL.iter().map(|p| p.file()).collect();
        assert_eq!(files.len(), Program::ALL.len());
        // The last one has the number of all before it.
        assert_eq!(Program::ALL.len(), Program::Virtiofsd as usize + 1);
    }

    #[test]
    fn a_program_brings_what_it_starts() {
        let names = |program: Program, release| -> Vec<_> {
            program.packages().iter().map(|package| package.name(release)).collect()
        };
        assert!(names(Program::Make, Release::Bookworm).contains(&"bison"));
        assert_eq!(names(Program::Tar, Release::Trixie), ["xz-utils"]);
        assert_eq!(names(Program::Virtiofsd, Release::Bookworm), ["qemu-system-common"]);
        assert_eq!(names(Program::Virtiofsd, Release::Trixie), ["virtiofsd"]);
    }

    #[test]
    fn packages_have_the_names_of_the_release() {
        let trixie = all_packages(Release::Trixie);
        assert!(trixie.contains(&"linux-source-6.12") && !trixie.contains(&"linux-source-6.1"));
    }
}
