//! What tests and benches of this crate and tests of the command line share. Nothing else names it,
//! so that the linker leaves it out of the program. A feature would have the program built twice,
//! with and without.

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "a test that cannot go on fails"
)]

mod fake;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use ftvmm_devices::Output;
use ftvmm_host::sync::lock;
use ftvmm_replication::{
    Event, FileHeader, Fingerprint, OnPanic, OnReset, Ordinal, OutputDigest, PROTOCOL_VERSION,
    Record, SnapshotWriter, StatePart, TscMode,
};

use crate::input::LogSink;
use crate::input_error::InputError;
use crate::step::OutputSink;
use crate::transfer::{Progress, ProgressDisplay};

pub use fake::{EndTold, Fake, NOW_NS, PIO, RESTORED};

/// A log that keeps what it was told, in words.
#[derive(Clone, Default)]
pub struct Told(Arc<Mutex<Vec<String>>>);

impl Told {
    /// What it was told since the last call.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.0))
    }

    /// Keeps one more thing.
    pub fn tell(&self, what: impl Into<String>) {
        lock(&self.0).push(what.into());
    }
}

impl LogSink for Told {
    fn append(&mut self, record: &Record) -> Result<(), InputError> {
        let what = match &record.event {
            Event::Input(_) => "input",
            Event::Check(_) => "check",
            Event::Slice(_) => "slice",
            Event::Snapshot(_) => "snapshot",
            Event::DiskAnswer(_) | Event::End(_) => "other",
        };
        self.tell(format!("{} {what}", record.at));
        Ok(())
    }

    fn exit_complete(&mut self, at: Ordinal) -> Result<(), InputError> {
        self.tell(format!("{at} complete"));
        Ok(())
    }

    fn idle(&mut self) -> Result<(), InputError> {
        self.tell("idle");
        Ok(())
    }
}

impl OutputSink for Told {
    fn emit(
        &mut self,
        at: Ordinal,
        digest: Option<OutputDigest>,
        _: Output,
    ) -> Result<(), InputError> {
        self.tell(format!("emit {at}{}", if digest.is_some() { "" } else { ", not digested" }));
        Ok(())
    }
}

/// The header of a recording of nothing in particular.
pub fn header() -> FileHeader {
    let fingerprint = Fingerprint {
        protocol_version: PROTOCOL_VERSION,
        kernel_sha256: [0; 32],
        initramfs_sha256: None,
        disk_bytes: None,
        disk_sha256: None,
        cmdline: String::new(),
        cpu_template: String::new(),
        cpu_template_sha256: [0; 32],
        tsc: TscMode::Trap,
        memory_mib: 64,
        net_mac: None,
        net_mtu: None,
        on_reset: OnReset::default(),
        on_panic: OnPanic::default(),
    };
    FileHeader {
        build: crate::build::own(),
        fingerprint,
        rtc_epoch_s: 0,
        kernel_path: String::new(),
        initramfs_path: None,
        start: None,
    }
}

/// Shows nobody anything.
pub struct NoDisplay;

impl ProgressDisplay for NoDisplay {
    fn begin(&self, _: &'static str, _: &Progress) {}

    fn show(&self, _: &Progress) {}

    fn end(&self) {}
}

/// A new snapshot in `folder` of a guest without a disk that is halted at exit 7.
pub fn snapshot_without_disk(folder: &Path) -> PathBuf {
    snapshot_of(folder, &header())
}

/// As [`snapshot_without_disk`], of this guest.
pub fn snapshot_of(folder: &Path, header: &FileHeader) -> PathBuf {
    let path = folder.join("snapshot");
    let mut writer = SnapshotWriter::new(File::create(&path).unwrap(), header).unwrap();
    let state = Fake::state(Ordinal(7)).encode();
    for part in [StatePart::Outline { total_bytes: 0 }, StatePart::Machine(state)] {
        writer.write_part(&part).unwrap();
    }
    writer.flush().unwrap();
    path
}
