//! Kernel modules: which files a module needs, and the part of `/lib/modules` a guest gets.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::Path;

use liblzma::read::XzDecoder;

use crate::{GuestBuildError, StockKernel, at};

/// The modules that init loads, those they need aside: the transport, the network card, the source
/// of random numbers, the disk, and its file system with the checksum that it asks for by name.
const LOADED: &[&str] =
    &["virtio_mmio", "virtio_net", "virtio-rng", "virtio_blk", "crc32c_generic", "ext4"];

/// Modules that are there and that init leaves alone: the jitter entropy generator, which reads the
/// time stamp counter, the socket it is reached through, and the hash it asks for.
const LOADABLE: &[&str] = &["sha3_generic", "af_alg", "algif_rng", "jitterentropy_rng"];
/// Modules a test loads when it wants them: the power button and its events, and who tells of a
/// panic.
const AT_HAND: &[&str] = &["button", "evdev", "pvpanic-mmio"];

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
        let line = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(module, _)| is_named(module, name));
        let (module, needed) = line.ok_or_else(|| MissingModule { module: (*name).to_owned() })?;
        for path in needed.split_whitespace().rev().chain([module]) {
            if !order.iter().any(|known| known == path) {
                order.push(path.to_owned());
            }
        }
    }
    Ok(order)
}

/// Debian compresses modules from release 13 on.
const COMPRESSED: &str = ".xz";
/// Debian's largest, with debug information split off, has 8 MiB.
const MODULE_BYTES_MAX: u64 = 64 << 20;

/// Whether the path is that of the module with this name.
fn is_named(path: &str, name: &str) -> bool {
    let file = path.rsplit('/').next().unwrap_or_default();
    plain_path(file).strip_suffix(".ko") == Some(name)
}

/// The path that a module has when it is not compressed.
pub fn plain_path(path: &str) -> &str {
    path.strip_suffix(COMPRESSED).unwrap_or(path)
}

/// A module's own bytes, whether its file is compressed or not.
///
/// # Errors
/// What the file system or the decompressor said.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = fs::read(path)?;
    if !path.to_string_lossy().ends_with(COMPRESSED) {
        return Ok(file);
    }
    let mut module = Vec::new();
    let plain = XzDecoder::new_multi_decoder(&file[..]);
    plain.take(MODULE_BYTES_MAX + 1).read_to_end(&mut module)?;
    if module.len() as u64 > MODULE_BYTES_MAX {
        return Err(io::Error::other(format!(
            "unpacked it has more than {MODULE_BYTES_MAX} bytes"
        )));
    }
    Ok(module)
}

/// Those of the modules that the kernel image does not have itself; modules.builtin is a list of
/// the paths of those it has.
pub fn not_built_in<'a>(built_in: &str, names: &[&'a str]) -> Vec<&'a str> {
    let has = |name: &str| built_in.lines().any(|path| is_named(path, name));
    names.iter().copied().filter(|name| !has(name)).collect()
}

/// The files of an initramfs that `modprobe` needs, by their paths in it.
pub(crate) fn files(kernel: &StockKernel) -> Result<BTreeMap<String, Vec<u8>>, GuestBuildError> {
    const DEPENDENCIES: &str = "modules.dep";
    let path = kernel.modules.join(DEPENDENCIES);
    let dependencies = fs::read_to_string(&path).map_err(at(&path))?;
    let path = kernel.modules.join("modules.builtin");
    let built_in = fs::read_to_string(&path).map_err(at(&path))?;
    let loaded = not_built_in(&built_in, LOADED);
    let kept_modules = not_built_in(&built_in, &[LOADED, LOADABLE, AT_HAND].concat());
    let order = load_order(&dependencies, &kept_modules)?;
    let is_kept = |line: &&str| {
        line.split_once(':').is_some_and(|(module, _)| order.iter().any(|kept| kept == module))
    };
    let plain_line = |line: &str| line.replace(".ko.xz", ".ko") + "\n";
    let kept: String = dependencies.lines().filter(is_kept).map(plain_line).collect();
    let place = |path: &str| format!("lib/modules/{}/{path}", kernel.release);
    let mut files = BTreeMap::from([
        (place(DEPENDENCIES), kept.into_bytes()),
        (LOADED_FILE.to_owned(), loaded.join(" ").into_bytes()),
    ]);
    for module in &order {
        let path = kernel.modules.join(module);
        files.insert(place(plain_path(module)), read(&path).map_err(at(&path))?);
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
    fn compressed_modules_have_the_names_of_plain_ones_and_are_unpacked() {
        let dep = "k/b.ko.xz: k/a.ko.xz\nk/a.ko.xz:\n";
        assert_eq!(load_order(dep, &["b"]).unwrap(), ["k/a.ko.xz", "k/b.ko.xz"]);
        assert_eq!(plain_path("k/a.ko.xz"), "k/a.ko");
        assert_eq!(not_built_in("k/a.ko\n", &["a", "b"]), ["b"]);

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.ko.xz");
        let mut packed = Vec::new();
        let mut packer = liblzma::read::XzEncoder::new(&b"a module"[..], 1);
        packer.read_to_end(&mut packed).unwrap();
        fs::write(&path, packed).unwrap();
        assert_eq!(read(&path).unwrap(), b"a module");
        fs::write(&path, "no archive").unwrap();
        assert!(read(&path).is_err());
    }

    #[test]
    fn a_guest_gets_what_it_loads_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let lines = "k/virtio_mmio.ko: k/virtio.ko\nk/virtio_net.ko: k/failover.ko k/virtio.ko\n\
                     k/virtio-rng.ko: k/virtio.ko\nk/virtio_blk.ko: k/virtio.ko\n\
                     k/crc32c_generic.ko:\nk/failover.ko:\nk/virtio.ko:\nk/sound.ko:\n\
                     k/sha3_generic.ko:\nk/af_alg.ko:\nk/algif_rng.ko: k/af_alg.ko\n\
                     k/jitterentropy_rng.ko:\n";
        fs::create_dir(folder.path().join("k")).unwrap();
        fs::write(folder.path().join("modules.dep"), lines).unwrap();
        fs::write(
            folder.path().join("modules.builtin"),
            "k/fs/ext4.ko\nk/loop.ko\nk/button.ko\nk/evdev.ko\nk/pvpanic-mmio.ko\n",
        )
        .unwrap();
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
        assert_eq!(files.len(), 13, "{:?}", files.keys());
    }
}
