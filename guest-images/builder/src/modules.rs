//! Kernel modules: which files a module needs, and the part of `/lib/modules` a guest gets.

use std::collections::BTreeMap;
use std::fs;

use crate::{GuestBuildError, StockKernel, at};

/// The modules that init loads, those they need aside: the transport, the network card, the source of
/// random numbers, the disk, and its file system with the checksum that it asks for by name.
const LOADED: &[&str] =
    &["virtio_mmio", "virtio_net", "virtio-rng", "virtio_blk", "crc32c_generic", "ext4"];

/// No line of modules.dep is about this module.
#[derive(Debug, thiserror::Error)]
#[error("modules.dep names no module {module:?}")]
pub struct MissingModule {
    /// The name looked for.
    pub module: String,
}

/// Paths of the wanted modules and all they need, needed ones first.
///
/// A line of modules.dep is `module: needed…` with all transitive needs, the most basic last
/// (depmod(8)), so reading a line from its end gives a valid order.
///
/// # Errors
/// When a module is not there.
pub fn load_order(dependencies: &str, wanted: &[&str]) -> Result<Vec<String>, MissingModule> {
    let mut order: Vec<String> = Vec::new();
    for name in wanted {
        let file = format!("{name}.ko");
        let line = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(module, _)| module.rsplit('/').next() == Some(&file));
        let (module, needed) = line.ok_or_else(|| MissingModule { module: (*name).to_owned() })?;
        for path in needed.split_whitespace().rev().chain([module]) {
            if !order.iter().any(|known| known == path) {
                order.push(path.to_owned());
            }
        }
    }
    Ok(order)
}

/// Whether modules.builtin, a list of paths, names the module: then the kernel image has it.
fn is_built_in(built_in: &str, name: &str) -> bool {
    let file = format!("{name}.ko");
    built_in.lines().any(|path| path.rsplit('/').next() == Some(&file))
}

/// The files of an initramfs that `modprobe` needs, by their paths in it.
pub(crate) fn files(kernel: &StockKernel) -> Result<BTreeMap<String, Vec<u8>>, GuestBuildError> {
    const DEPENDENCIES: &str = "modules.dep";
    let path = kernel.modules.join(DEPENDENCIES);
    let dependencies = fs::read_to_string(&path).map_err(at(&path))?;
    let path = kernel.modules.join("modules.builtin");
    let built_in = fs::read_to_string(&path).map_err(at(&path))?;
    let loaded: Vec<&str> =
        LOADED.iter().copied().filter(|name| !is_built_in(&built_in, name)).collect();
    let order = load_order(&dependencies, &loaded)?;
    let is_kept = |line: &&str| {
        line.split_once(':').is_some_and(|(module, _)| order.iter().any(|kept| kept == module))
    };
    let kept: String =
        dependencies.lines().filter(is_kept).map(|line| format!("{line}\n")).collect();
    let place = |path: &str| format!("lib/modules/{}/{path}", kernel.release);
    let mut files = BTreeMap::from([
        (place(DEPENDENCIES), kept.into_bytes()),
        (LOADED_FILE.to_owned(), loaded.join(" ").into_bytes()),
    ]);
    for module in &order {
        let path = kernel.modules.join(module);
        files.insert(place(module), fs::read(&path).map_err(at(&path))?);
    }
    Ok(files)
}

/// Tells init what to load.
const LOADED_FILE: &str = "lib/modules/loaded";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needed_modules_come_first_and_only_once() {
        let dep = "k/b.ko: k/a.ko\nk/c.ko: k/b.ko k/a.ko\nk/a.ko:\nk/ab.ko:\n";
        assert_eq!(
            load_order(dep, &["c", "b", "ab"]).unwrap(),
            ["k/a.ko", "k/b.ko", "k/c.ko", "k/ab.ko"]
        );
        let missing = load_order(dep, &["d"]).unwrap_err().to_string();
        assert!(missing.contains('d'), "{missing}");
    }

    #[test]
    fn a_guest_gets_what_it_loads_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let lines = "k/virtio_mmio.ko: k/virtio.ko\nk/virtio_net.ko: k/failover.ko k/virtio.ko\n\
                     k/virtio-rng.ko: k/virtio.ko\nk/virtio_blk.ko: k/virtio.ko\n\
                     k/crc32c_generic.ko:\nk/failover.ko:\nk/virtio.ko:\nk/sound.ko:\n";
        fs::create_dir(folder.path().join("k")).unwrap();
        fs::write(folder.path().join("modules.dep"), lines).unwrap();
        fs::write(folder.path().join("modules.builtin"), "k/fs/ext4.ko\nk/loop.ko\n").unwrap();
        for line in lines.lines() {
            let (module, _) = line.split_once(':').unwrap();
            fs::write(folder.path().join(module), module).unwrap();
        }
        let kernel = StockKernel {
            bzimage: folder.path().into(),
            modules: folder.path().into(),
            release: "6.1".into(),
        };
        let files = files(&kernel).unwrap();
        assert_eq!(
            files["lib/modules/loaded"],
            b"virtio_mmio virtio_net virtio-rng virtio_blk crc32c_generic"
        );
        assert_eq!(files["lib/modules/6.1/k/failover.ko"], b"k/failover.ko");
        let dep = lines.replace("k/sound.ko:\n", "");
        assert_eq!(files["lib/modules/6.1/modules.dep"], dep.as_bytes());
        assert_eq!(files.len(), 9, "{:?}", files.keys());
    }
}
