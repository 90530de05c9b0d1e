//! What two machines must have in common to compute the same thing.
//!
//! Why: a backup, or a replay, that starts from another kernel or another CPU template diverges at
//! some later exit, from which the cause cannot be seen. So the facts are compared before the first
//! instruction, and the one that differs is named.

use core::fmt;

use serde::{Deserialize, Serialize};

use crate::bounded;
use crate::record::Hex;

/// Version of the meaning of log records: raised whenever the same log would lead to another
/// execution (a device model changes, a record means something else, the processor's state in a
/// slice is encoded otherwise). Messages and files have versions of their own:
/// [`crate::wire::WIRE_VERSION`], [`crate::log::LOG_VERSION`] and
/// [`crate::snapshot::SNAPSHOT_VERSION`].
pub const PROTOCOL_VERSION: u32 = 5;

/// Longest command line and name of a template, in bytes. Linux takes 2,047 of a command line.
const FACT_BYTES_MAX: usize = 4096;
/// Longest printed fact, in bytes.
const PRINTED_BYTES_MAX: usize = 64 << 10;

/// The facts execution depends on besides the logged inputs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// [`PROTOCOL_VERSION`] of the program.
    pub protocol_version: u32,
    /// SHA-256 of the kernel image file.
    pub kernel_sha256: [u8; 32],
    /// SHA-256 of the initramfs file, if one is given.
    pub initramfs_sha256: Option<[u8; 32]>,
    /// Size of the disk, if there is one.
    pub disk_bytes: Option<u64>,
    /// SHA-256 of the disk image at power-on, if one is given.
    pub disk_sha256: Option<[u8; 32]>,
    /// Kernel command line.
    #[serde(deserialize_with = "bounded::text::<_, FACT_BYTES_MAX>")]
    pub cmdline: String,
    /// Name of the CPU template.
    #[serde(deserialize_with = "bounded::text::<_, FACT_BYTES_MAX>")]
    pub cpu_template: String,
    /// Digest of everything the template sets: CPUID, MSR list, control registers.
    pub cpu_template_sha256: [u8; 32],
    /// What user mode's RDTSC and RDTSCP do.
    pub tsc: TscMode,
    /// Guest memory.
    pub memory_mib: u32,
    /// MAC address of the guest's network card, if it has one.
    pub net_mac: Option<[u8; 6]>,
    /// Longest payload of a frame of that card, in bytes.
    pub net_mtu: Option<u16>,
    /// What the machine does when the guest resets it.
    pub on_reset: OnReset,
    /// What it does when the guest's kernel panics.
    pub on_panic: OnPanic,
}

/// What the machine does when the guest resets it, or its processor shuts down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnReset {
    /// It goes back to power-on, and the run goes on.
    #[default]
    Restart,
    /// The run ends.
    End,
}

impl fmt::Display for OnReset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Restart => "restart",
            Self::End => "end",
        })
    }
}

/// What the machine does when the guest's kernel panics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnPanic {
    /// The run ends.
    #[default]
    End,
    /// It goes back to power-on, and the run goes on.
    Restart,
    /// Nothing: what the guest does then, a crash dump for one, is its own affair.
    Ignore,
}

impl fmt::Display for OnPanic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::End => "end",
            Self::Restart => "restart",
            Self::Ignore => "ignore",
        })
    }
}

/// What RDTSC and RDTSCP do in the guest's user mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TscMode {
    /// They read guest time in nanoseconds.
    #[default]
    Trap,
    /// They fault.
    Hide,
}

impl fmt::Display for TscMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Trap => "trap",
            Self::Hide => "hide",
        })
    }
}

/// A fact of the [`Fingerprint`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fact {
    /// [`Fingerprint::protocol_version`].
    ProtocolVersion,
    /// [`Fingerprint::kernel_sha256`].
    Kernel,
    /// [`Fingerprint::initramfs_sha256`].
    Initramfs,
    /// [`Fingerprint::disk_bytes`].
    DiskSize,
    /// [`Fingerprint::disk_sha256`].
    Disk,
    /// [`Fingerprint::cmdline`].
    CommandLine,
    /// [`Fingerprint::cpu_template`] and [`Fingerprint::cpu_template_sha256`].
    CpuTemplate,
    /// [`Fingerprint::tsc`].
    Tsc,
    /// [`Fingerprint::memory_mib`].
    MemorySize,
    /// [`Fingerprint::net_mac`].
    NetMac,
    /// [`Fingerprint::net_mtu`].
    NetMtu,
    /// [`Fingerprint::on_reset`].
    OnReset,
    /// [`Fingerprint::on_panic`].
    OnPanic,
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ProtocolVersion => "protocol version",
            Self::Kernel => "kernel",
            Self::Initramfs => "initramfs",
            Self::DiskSize => "disk size",
            Self::Disk => "disk",
            Self::CommandLine => "command line",
            Self::CpuTemplate => "CPU template",
            Self::Tsc => "time stamp counter in user mode",
            Self::MemorySize => "memory size",
            Self::NetMac => "network card",
            Self::NetMtu => "MTU of the network",
            Self::OnReset => "--on-reset",
            Self::OnPanic => "--on-panic",
        })
    }
}

/// The first fact two fingerprints differ in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// The fact.
    pub fact: Fact,
    /// Its value here, printed.
    #[serde(deserialize_with = "bounded::text::<_, PRINTED_BYTES_MAX>")]
    pub ours: String,
    /// Its value there, printed.
    #[serde(deserialize_with = "bounded::text::<_, PRINTED_BYTES_MAX>")]
    pub theirs: String,
}

impl Difference {
    /// The same difference seen from the other side.
    #[must_use]
    pub fn swapped(self) -> Self {
        Self { fact: self.fact, ours: self.theirs, theirs: self.ours }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} differs: ours is {}, theirs is {}", self.fact, self.ours, self.theirs)
    }
}

impl Fingerprint {
    /// The facts in the order they are compared: the ones that explain the others come first.
    fn facts(&self) -> [(Fact, String); 13] {
        let sha256 = |digest: &[u8; 32]| format!("sha256 {}", Hex(digest));
        let file = |digest: &Option<[u8; 32]>| digest.as_ref().map_or("absent".into(), sha256);
        let mac = |mac: &[u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
        let template = format!("{} ({})", self.cpu_template, sha256(&self.cpu_template_sha256));
        [
            (Fact::ProtocolVersion, self.protocol_version.to_string()),
            (Fact::Kernel, sha256(&self.kernel_sha256)),
            (Fact::Initramfs, file(&self.initramfs_sha256)),
            (
                Fact::DiskSize,
                self.disk_bytes.map_or("absent".into(), |size| format!("{size} bytes")),
            ),
            (Fact::Disk, file(&self.disk_sha256)),
            (Fact::CommandLine, format!("{:?}", self.cmdline)),
            (Fact::CpuTemplate, template),
            (Fact::Tsc, self.tsc.to_string()),
            (Fact::MemorySize, format!("{} MiB", self.memory_mib)),
            (Fact::NetMac, self.net_mac.as_ref().map_or("absent".into(), mac)),
            (Fact::NetMtu, self.net_mtu.map_or("absent".into(), |mtu| format!("{mtu} bytes"))),
            (Fact::OnReset, self.on_reset.to_string()),
            (Fact::OnPanic, self.on_panic.to_string()),
        ]
    }

    /// The first fact in which `self` and `other` differ; `None` when they may run together.
    #[must_use]
    pub fn first_difference(&self, other: &Self) -> Option<Difference> {
        self.facts()
            .into_iter()
            .zip(other.facts())
            .find(|(ours, theirs)| ours != theirs)
            .map(|((fact, ours), (_, theirs))| Difference { fact, ours, theirs })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn example() -> Fingerprint {
        Fingerprint {
            protocol_version: PROTOCOL_VERSION,
            kernel_sha256: [0x11; 32],
            initramfs_sha256: Some([0x22; 32]),
            disk_bytes: Some(1 << 20),
            disk_sha256: None,
            cmdline: "console=ttyS0".into(),
            cpu_template: "x86-64-v1".into(),
            cpu_template_sha256: [0x33; 32],
            tsc: TscMode::Trap,
            memory_mib: 128,
            net_mac: Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]),
            net_mtu: Some(1500),
            on_reset: OnReset::Restart,
            on_panic: OnPanic::End,
        }
    }

    /// The example with one fact changed, for every fact.
    pub(crate) fn changed() -> Vec<(Fact, Fingerprint)> {
        let base = example();
        vec![
            (Fact::ProtocolVersion, Fingerprint { protocol_version: 99, ..base.clone() }),
            (Fact::Kernel, Fingerprint { kernel_sha256: [0; 32], ..base.clone() }),
            (Fact::Initramfs, Fingerprint { initramfs_sha256: None, ..base.clone() }),
            (Fact::DiskSize, Fingerprint { disk_bytes: None, ..base.clone() }),
            (Fact::Disk, Fingerprint { disk_sha256: Some([0; 32]), ..base.clone() }),
            (Fact::CommandLine, Fingerprint { cmdline: "quiet".into(), ..base.clone() }),
            (Fact::CpuTemplate, Fingerprint { cpu_template: "epyc".into(), ..base.clone() }),
            (Fact::CpuTemplate, Fingerprint { cpu_template_sha256: [0; 32], ..base.clone() }),
            (Fact::Tsc, Fingerprint { tsc: TscMode::Hide, ..base.clone() }),
            (Fact::MemorySize, Fingerprint { memory_mib: 64, ..base.clone() }),
            (Fact::NetMac, Fingerprint { net_mac: None, ..base.clone() }),
            (Fact::NetMtu, Fingerprint { net_mtu: Some(9000), ..base.clone() }),
            (Fact::OnReset, Fingerprint { on_reset: OnReset::End, ..base.clone() }),
            (Fact::OnPanic, Fingerprint { on_panic: OnPanic::Ignore, ..base }),
        ]
    }

    #[test]
    fn every_fact_is_compared_and_named() {
        let base = example();
        assert_eq!(base.first_difference(&base), None);
        for (fact, other) in changed() {
            let difference = base.first_difference(&other).unwrap();
            assert_eq!(difference.fact, fact);
            assert_ne!(difference.ours, difference.theirs);
            let text = difference.to_string();
            assert!(text.starts_with(&format!("{fact} differs: ours is ")), "{text}");
            assert_eq!(other.first_difference(&base), Some(difference.swapped()));
        }
    }

    #[test]
    fn both_values_are_printed() {
        let other = Fingerprint { memory_mib: 64, ..example() };
        let text = example().first_difference(&other).unwrap().to_string();
        assert_eq!(text, "memory size differs: ours is 128 MiB, theirs is 64 MiB");
    }
}
