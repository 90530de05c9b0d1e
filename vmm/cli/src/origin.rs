//! Where a run begins: at power-on, or at a snapshot.

use std::sync::Arc;

use ftvmm_devices::{BoardConfig, NetConfig};
use ftvmm_replication::Start;

use super::CommandError;
use super::args::{RoleArg, RunArgs};
use super::disk::open_disk;
use super::from_header::{PathOverrides, config_from_header};
use super::net_arg::NetArg;
use crate::guest::{DiskFacts, Guest, GuestConfig, full_cmdline};
use ftvmm_host::disk::{CompletionPolicy, Disk};
use ftvmm_host::tap_mtu;
use ftvmm_machine::cpu_template::DEFAULT_TEMPLATE;
use ftvmm_runtime::build;
use ftvmm_runtime::snapshot::{Parts, Snapshot};

/// The guest and where it begins.
pub struct GuestSource {
    /// The guest.
    pub config: GuestConfig,
    snapshot: Option<Snapshot>,
}

impl GuestSource {
    /// What the arguments say, and the guest's disk. A snapshot is whole when this returns.
    ///
    /// # Errors
    /// When the snapshot or the disk cannot be used, or not so.
    pub fn of(
        args: &RunArgs,
        rtc_epoch_s: u64,
        policy: CompletionPolicy,
    ) -> Result<(Self, Option<Arc<Disk>>), CommandError> {
        let snapshot = Self::snapshot(args)?;
        let net = args.net.as_ref().map(net_config).transpose()?;
        // Last: a restored disk is written, a plain one is read to its end.
        let (disk, facts) = open_disk(args, snapshot.as_ref(), policy)?.unzip();
        let config = match &snapshot {
            None => guest_config(args, rtc_epoch_s, net, facts),
            Some(snapshot) => {
                let files = PathOverrides {
                    kernel: args.kernel.as_deref(),
                    initramfs: args.initrd.as_deref(),
                    cpu_template: args.cpu_template.as_deref(),
                };
                // The network card is the only part that also depends on this host.
                GuestConfig { net, ..config_from_header(snapshot.header(), &files) }
            }
        };
        Ok((Self { config, snapshot }, disk))
    }

    fn snapshot(args: &RunArgs) -> Result<Option<Snapshot>, CommandError> {
        let Some(path) = &args.restore else { return Ok(None) };
        if args.role == RoleArg::Primary && !args.start_alone {
            return Err(CommandError::Configuration(
                "--restore starts a primary alone; add --start-alone, a backup may attach then"
                    .into(),
            ));
        }
        Ok(Some(Snapshot::open(path)?))
    }

    /// Refuses a snapshot of another guest.
    ///
    /// # Errors
    /// Names the first difference.
    pub fn check(&self, guest: &Guest) -> Result<(), CommandError> {
        let Some(snapshot) = &self.snapshot else { return Ok(()) };
        if let Some(difference) = snapshot.header().fingerprint.first_difference(&guest.fingerprint)
        {
            return Err(snapshot.unusable(format!("is of another guest: {difference}")).into());
        }
        if let Some(difference) = build::difference(&snapshot.header().build) {
            tracing::warn!("the snapshot was {difference}");
        }
        Ok(())
    }

    /// Where a recording of the run begins.
    pub fn start(&self) -> Option<Start> {
        self.snapshot.as_ref().map(|snapshot| snapshot.start().clone())
    }

    /// The parts of the snapshot to restore first.
    pub fn into_parts(self) -> Option<Parts> {
        self.snapshot.map(Snapshot::into_parts)
    }
}

/// The card, with the MTU of its tap.
fn net_config(net: &NetArg) -> Result<NetConfig, CommandError> {
    Ok(NetConfig { mac: net.mac, mtu: tap_mtu(&net.tap, net.mtu)? })
}

/// What the arguments say of the guest.
fn guest_config(
    args: &RunArgs,
    rtc_epoch_s: u64,
    net: Option<NetConfig>,
    disk: Option<DiskFacts>,
) -> GuestConfig {
    let disk_bytes = disk.map(|disk| disk.size_bytes);
    GuestConfig {
        kernel: args.kernel.clone().unwrap_or_default(),
        initramfs: args.initrd.clone(),
        cmdline: full_cmdline(&args.cmdline, &BoardConfig { rtc_epoch_s, net, disk_bytes }),
        cpu_template: args.cpu_template.clone().unwrap_or_else(|| DEFAULT_TEMPLATE.into()),
        memory_mib: args.mem,
        net,
        disk,
        tsc: args.tsc.into(),
        on_reset: args.on_reset.into(),
        on_panic: args.on_panic.into(),
        rtc_epoch_s,
        logged: args.record.is_some() || args.role != RoleArg::Solo || args.control.is_some(),
    }
}
