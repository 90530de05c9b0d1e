//! The guest that a file's header describes.

use std::path::{Path, PathBuf};

use ftvmm_devices::{DEFAULT_MTU, NetConfig};
use ftvmm_replication::{FileHeader, Fingerprint};

use crate::guest::{DiskFacts, GuestConfig};

/// Files that are not where a header says they were.
#[derive(Clone, Copy, Debug, Default)]
pub struct PathOverrides<'a> {
    /// The kernel.
    pub kernel: Option<&'a Path>,
    /// The initramfs.
    pub initramfs: Option<&'a Path>,
    /// The CPU template.
    pub cpu_template: Option<&'a Path>,
}

/// The guest that a file's header describes.
pub fn config_from_header(header: &FileHeader, files: &PathOverrides) -> GuestConfig {
    let Fingerprint { cmdline, cpu_template, memory_mib, tsc, on_reset, on_panic, .. } =
        &header.fingerprint;
    let Fingerprint { net_mac, net_mtu, .. } = header.fingerprint;
    let or = |given: Option<&Path>, recorded: &str| {
        given.map_or_else(|| recorded.into(), Path::to_path_buf)
    };
    let initramfs = header.initramfs_path.as_ref().map(PathBuf::from);
    GuestConfig {
        kernel: or(files.kernel, &header.kernel_path),
        initramfs: files.initramfs.map(Path::to_path_buf).or(initramfs),
        cmdline: cmdline.clone(),
        cpu_template: or(files.cpu_template, cpu_template),
        memory_mib: *memory_mib,
        net: net_mac.map(|mac| NetConfig { mac, mtu: net_mtu.unwrap_or(DEFAULT_MTU) }),
        disk: header
            .fingerprint
            .disk_bytes
            .map(|size_bytes| DiskFacts { size_bytes, sha256: header.fingerprint.disk_sha256 }),
        tsc: *tsc,
        on_reset: *on_reset,
        on_panic: *on_panic,
        rtc_epoch_s: header.rtc_epoch_s,
        logged: true,
    }
}

#[cfg(test)]
mod tests {
    use ftvmm_runtime::testing::header;

    use super::*;

    #[test]
    fn a_file_that_was_moved_is_read_where_it_is_and_the_others_where_they_were() {
        let recorded = FileHeader {
            kernel_path: "/old/kernel".into(),
            initramfs_path: Some("/old/initrd".into()),
            ..header()
        };
        let initramfs = Some(Path::new("/new/initrd"));
        let files = PathOverrides { initramfs, ..PathOverrides::default() };
        let config = config_from_header(&recorded, &files);
        assert_eq!(config.kernel, Path::new("/old/kernel"));
        assert_eq!(config.initramfs.as_deref(), initramfs);
        assert_eq!((config.memory_mib, config.logged), (64, true));
    }
}
