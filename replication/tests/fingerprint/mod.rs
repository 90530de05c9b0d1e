//! What the hosts of the model and of the simulator agree on.

use ftvmm_replication::{Fingerprint, OnPanic, OnReset, PROTOCOL_VERSION, TscMode};

/// Of a small guest without a disk.
pub fn fingerprint() -> Fingerprint {
    Fingerprint {
        protocol_version: PROTOCOL_VERSION,
        kernel_sha256: [1; 32],
        initramfs_sha256: None,
        disk_bytes: None,
        disk_sha256: None,
        cmdline: "console=ttyS0".into(),
        cpu_template: "sim".into(),
        cpu_template_sha256: [2; 32],
        tsc: TscMode::Trap,
        memory_mib: 1,
        net_mac: None,
        net_mtu: None,
        on_reset: OnReset::default(),
        on_panic: OnPanic::default(),
    }
}
