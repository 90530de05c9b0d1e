//! Where a run begins: at power-on, or at a snapshot.

use std::sync::Arc;

use ftvmm_devices::{BoardConfig, NetConfig};
use ftvmm_host::disk::{CompletionPolicy, Disk};
use ftvmm_host::tap_mtu;
use ftvmm_machine::cpu_template::DEFAULT_TEMPLATE;
use ftvmm_replication::Start;
use ftvmm_runtime::build;
use ftvmm_runtime::snapshot::{Parts, Snapshot};

use super::CommandError;
use super::args::{RoleArg, RunArgs};
use super::disk::open_disk;
use super::from_header::{PathOverrides, config_from_header};
use super::net_arg::NetArg;
use crate::guest::{DiskFacts, Guest, GuestConfig, full_cmdline};

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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use ftvmm_replication::{OnPanic, OnReset, TscMode};
    use ftvmm_runtime::testing::snapshot_without_disk;

    use super::super::args::tests::run_args;
    use super::*;

    fn config(line: &str) -> GuestConfig {
        GuestSource::of(&run_args(line), 99, CompletionPolicy::Immediate).unwrap().0.config
    }

    #[test]
    fn the_guest_is_as_the_arguments_say() {
        let plain = config("--kernel k");
        assert_eq!((plain.kernel.as_path(), &plain.initramfs), (Path::new("k"), &None));
        assert_eq!(plain.cpu_template, Path::new(DEFAULT_TEMPLATE));
        assert_eq!((plain.memory_mib, plain.rtc_epoch_s, plain.logged), (128, 99, false));
        assert!(plain.cmdline.ends_with(" console=ttyS0"), "{}", plain.cmdline);
        assert_eq!((plain.tsc, plain.on_reset), (TscMode::Trap, OnReset::Restart));
        let other = config(
            "--kernel k --initrd i --cmdline quiet --mem 64 --cpu-template avx --tsc hide \
             --on-reset end --on-panic ignore --record r",
        );
        assert_eq!(other.initramfs.as_deref(), Some(Path::new("i")));
        assert_eq!(other.cpu_template, Path::new("avx"));
        assert!(other.cmdline.ends_with(" quiet"), "{}", other.cmdline);
        assert_eq!((other.memory_mib, other.tsc), (64, TscMode::Hide));
        assert_eq!((other.on_reset, other.on_panic), (OnReset::End, OnPanic::Ignore));
    }

    #[test]
    fn a_guest_that_may_be_logged_or_sent_is_tracked() {
        let pair = "--witness file:/w --role";
        for line in [
            "--record r".to_owned(),
            "--control c".to_owned(),
            format!("{pair} primary --listen 1.2.3.4:5"),
            format!("{pair} backup --connect 1.2.3.4:5"),
        ] {
            assert!(config(&format!("--kernel k {line}")).logged, "{line}");
        }
    }

    #[test]
    fn a_snapshot_says_what_the_guest_is_and_where_it_begins() {
        let folder = tempfile::tempdir().unwrap();
        let path = snapshot_without_disk(folder.path());
        let line = format!("--restore {} --kernel new", path.display());
        let (source, disk) =
            GuestSource::of(&run_args(&line), 99, CompletionPolicy::Immediate).unwrap();
        assert!(disk.is_none());
        assert_eq!(source.config.kernel, Path::new("new"));
        // Not those of the command line.
        assert_eq!((source.config.memory_mib, source.config.rtc_epoch_s), (64, 0));
        assert_eq!(source.start().unwrap().at.0, 7);
        assert!(source.into_parts().is_some());
        assert!(
            GuestSource::of(&run_args("--kernel k"), 99, CompletionPolicy::Immediate)
                .unwrap()
                .0
                .start()
                .is_none()
        );

        for (more, says) in [
            ("--disk path=/none", "has no disk; leave --disk out"),
            ("--role primary --listen 1.2.3.4:5 --witness file:/w", "add --start-alone"),
        ] {
            let args = run_args(&format!("{line} {more}"));
            let error =
                GuestSource::of(&args, 99, CompletionPolicy::Immediate).err().unwrap().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
