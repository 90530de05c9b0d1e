//! What an emulated host boots: Debian's cloud kernel and an initramfs made on the spot.
//!
//! The initramfs holds busybox, the agent as `/init` and the kernel modules as
//! `/modules/<nn>-<name>.ko`, numbered so that each comes after those it depends on. It is not
//! compressed: emulated unpacking would cost more than reading it.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cpio::newc::{Builder, ModeFileType, trailer};

use ftvmm_guest_images::modules::{self, load_order, not_built_in};

use super::error::{LabError, at};
use crate::Program;
use crate::packages::{self, DebianKernel};

/// The modules a lab host is made for; what they need comes along.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "virtio_net",
    "virtio-rng",
    "virtiofs",
    "bridge",
    "tun",
    "veth",
    "kvm-amd",
    "sch_netem",
];

/// A kernel and an initramfs, ready for `-kernel` and `-initrd`.
pub(crate) struct Image {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
}

impl Drop for Image {
    fn drop(&mut self) {
        // It can be made again and would outweigh the logs it lies among.
        let _ = fs::remove_file(&self.initramfs);
    }
}

/// Makes the image in `folder`.
pub(crate) fn build(folder: &Path, agent: &Path) -> Result<Image, LabError> {
    let kernel = packages::cloud_kernel()?;
    let initramfs = folder.join("initramfs.cpio");
    let archive = archive(&kernel, agent, MODULES, &[])?;
    fs::write(&initramfs, archive).map_err(at(&initramfs))?;
    Ok(Image { kernel: kernel.bzimage, initramfs })
}

/// A file of the outer machine and where a host has it.
pub(crate) struct Content<'a> {
    pub(crate) place: String,
    pub(crate) path: &'a Path,
}

/// The initramfs of a host that runs `agent`, with these modules and what they need, and `content`
/// in folders below `/share`.
pub(crate) fn archive(
    kernel: &DebianKernel,
    agent: &Path,
    modules: &[&str],
    content: &[Content<'_>],
) -> Result<Vec<u8>, LabError> {
    let mut archive = Archive(Vec::new());
    for directory in ["bin", "modules", "share", "share/bin"] {
        archive.add(directory, ModeFileType::Directory, 0o755, &[])?;
    }
    archive.add("init", ModeFileType::Regular, 0o755, &read(agent)?)?;
    archive.add("bin/busybox", ModeFileType::Regular, 0o755, &read(&Program::Busybox.path()?)?)?;
    let applets = Program::Busybox.command()?.arg("--list").output().map_err(at("busybox"))?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines() {
        if applet != "busybox" {
            archive.add(&format!("bin/{applet}"), ModeFileType::Symlink, 0o777, b"busybox")?;
        }
    }
    let dependencies = kernel.modules.join("modules.dep");
    let dependencies = fs::read_to_string(&dependencies).map_err(at(&dependencies))?;
    let built_in = kernel.modules.join("modules.builtin");
    let built_in = fs::read_to_string(&built_in).map_err(at(&built_in))?;
    let order = load_order(&dependencies, &not_built_in(&built_in, modules))
        .map_err(|missing| LabError::NoModule { module: missing.module })?;
    for (number, module) in order.iter().enumerate() {
        let name = modules::plain_path(module).rsplit('/').next().unwrap_or_default();
        let path = kernel.modules.join(module);
        let content = modules::read(&path).map_err(at(&path))?;
        archive.add(
            &format!("modules/{number:02}-{name}"),
            ModeFileType::Regular,
            0o644,
            &content,
        )?;
    }
    for Content { place, path } in content {
        archive.add(place, ModeFileType::Regular, 0o755, &read(path)?)?;
    }
    trailer(archive.0).map_err(at("initramfs"))
}

fn read(path: &Path) -> Result<Vec<u8>, LabError> {
    fs::read(path).map_err(at(path))
}

/// A growing archive; nothing in it has an owner, a time or a second name.
struct Archive(Vec<u8>);

impl Archive {
    fn add(
        &mut self,
        name: &str,
        kind: ModeFileType,
        mode: u32,
        content: &[u8],
    ) -> Result<(), LabError> {
        let write = || -> io::Result<()> {
            let length = u32::try_from(content.len()).map_err(io::Error::other)?;
            let entry = Builder::new(name).mode(mode).nlink(1).set_mode_file_type(kind);
            let mut writer = entry.write(&mut self.0, length);
            writer.write_all(content)?;
            writer.finish().map(|_| ())
        };
        write().map_err(at(name))
    }
}
