//! From a configuration to a machine that stands at its kernel's entry.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use ftvmm_devices::{Board, BoardConfig, NetConfig, virtio_slots};
use ftvmm_host::memory::{self, TooLittleMemory};
use ftvmm_host::user_file::{self, FileError};
use ftvmm_kvm::micro_guest::{ProbeFailure, xsave};
use ftvmm_kvm::{KvmError, Vcpu, Vm};
use ftvmm_machine::boot::{
    BootError, BootImage, BootPlan, ImageError, KernelImage, UNPACKED_BYTES_MAX,
};
use ftvmm_machine::cpu_template::{CpuTemplate, TemplateError};
use ftvmm_machine::efer::EFER;
use ftvmm_machine::machine::{Start, act_as_firmware};
use ftvmm_machine::memory::Memory;
use ftvmm_machine::msr::{MsrAnswer, MsrBank};
use ftvmm_machine::page_tracker::PageTracker;
use ftvmm_machine::tsc::TscTrap;
use ftvmm_machine::{Cpu, CpuError};
use ftvmm_replication::{Fingerprint, LogHeader, OnPanic, OnReset, PROTOCOL_VERSION, TscMode};
use sha2::{Digest, Sha256};
use thiserror::Error;

/// Kernel parameters every guest of ours needs: no APIC (it is not there, whatever IA32_APIC_BASE
/// says), no delay-loop calibration (it would wait for a timer without making exits), reset on a
/// panic.
const BASE_CMDLINE: &str = "nolapic lpj=1000000 panic=-1";
/// The card sends at once, so the driver needs no interrupt to learn that a frame has gone: some
/// six exits less for every frame.
const NET_CMDLINE: &str = "virtio_net.napi_tx=0";
/// What an unprivileged `--mem` may be: enough for a kernel, not beyond the 40 address bits of the
/// template.
const MEMORY_MIB: std::ops::RangeInclusive<u32> = 32..=512 * 1024;
/// The longest of the program's own has 10 KiB.
const TEMPLATE_BYTES_MAX: u64 = 1 << 20;

/// A machine on KVM.
pub type Machine = ftvmm_machine::Machine<Vcpu>;

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// The kernel file.
    pub kernel: PathBuf,
    /// The initramfs file.
    pub initramfs: Option<PathBuf>,
    /// The whole kernel command line; see [`full_cmdline`].
    pub cmdline: String,
    /// The CPU template: one that comes with the program, or a file.
    pub cpu_template: PathBuf,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// The network card, if there is one.
    pub net: Option<NetConfig>,
    /// The disk, if there is one.
    pub disk: Option<DiskFacts>,
    /// What user mode's RDTSC does.
    pub tsc: TscMode,
    /// What a reset by the guest leads to.
    pub on_reset: OnReset,
    /// What a panic of the guest's kernel leads to.
    pub on_panic: OnPanic,
    /// Unix time of power-on in seconds.
    pub rtc_epoch_s: u64,
    /// The guest has a log, written or read: its memory is tracked.
    pub logged: bool,
}

/// What the guest's machine depends on of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskFacts {
    /// Its size.
    pub size_bytes: u64,
    /// Digest of its content at power-on, where a log needs it.
    pub sha256: Option<[u8; 32]>,
}

impl GuestConfig {
    fn board(&self) -> BoardConfig {
        let disk_bytes = self.disk.map(|disk| disk.size_bytes);
        BoardConfig { rtc_epoch_s: self.rtc_epoch_s, net: self.net, disk_bytes }
    }
}

/// Why a guest cannot be made.
#[derive(Debug, Error)]
pub enum GuestError {
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The host has not the memory.
    #[error(transparent)]
    Memory(#[from] TooLittleMemory),
    /// The kernel file is no kernel.
    #[error("'{path}' {cause}", path = path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// The cause.
        cause: ImageError,
    },
    /// The memory size is out of range.
    #[error("--mem {got}: a guest has {} to {} MiB", MEMORY_MIB.start(), MEMORY_MIB.end())]
    MemorySize {
        /// What was asked for.
        got: u32,
    },
    /// The host's CPU does not do.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The template's XSAVE is not the same in every run on this host.
    #[error("the CPU template '{template}' cannot be used on this host: {cause}")]
    Xsave {
        /// The template.
        template: String,
        /// What the self-test found.
        cause: ProbeFailure,
    },
    /// Loading failed.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// KVM failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

impl From<CpuError> for GuestError {
    fn from(error: CpuError) -> Self {
        Self::Kvm(error.into())
    }
}

fn read_template(path: &Path) -> io::Result<String> {
    let text = user_file::read("CPU template", path, TEMPLATE_BYTES_MAX, "no template is so long");
    let text = text.map_err(|error| match error {
        FileError::Host { cause, .. } => cause,
        error => io::Error::other(error),
    })?;
    String::from_utf8(text).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))
}

/// A guest that is loaded but not switched on.
pub struct Guest {
    /// Of a guest with a log.
    pages: Option<PageTracker>,
    vcpu: Vcpu,
    memory: Rc<Memory>,
    msrs: MsrBank,
    /// What must be equal on two hosts, or in a recording and its replay.
    pub fingerprint: Fingerprint,
    image: BootImage,
}

impl Guest {
    /// Reads the files, makes the virtual machine and loads it.
    ///
    /// # Errors
    /// Says which file or which part of the host does not do.
    pub fn assemble(config: &GuestConfig) -> Result<Self, GuestError> {
        let GuestConfig { kernel, initramfs, cmdline, memory_mib, net, tsc, .. } = config;
        if !MEMORY_MIB.contains(memory_mib) {
            return Err(GuestError::MemorySize { got: *memory_mib });
        }
        let memory_bytes = u64::from(*memory_mib) << 20;
        check_memory(*memory_mib, config.logged)?;
        let kernel_file =
            user_file::read("kernel", kernel, UNPACKED_BYTES_MAX, "no kernel is so long")?;
        let read_initramfs = |path: &PathBuf| {
            let limit = "the guest has not so much memory; give more with --mem";
            user_file::read("initramfs", path, memory_bytes, limit)
        };
        let initramfs_file = initramfs.as_ref().map(read_initramfs).transpose()?;
        let kernel_sha256: [u8; 32] = Sha256::digest(&kernel_file).into();
        let image = KernelImage::parse(kernel_file)
            .map_err(|cause| GuestError::Image { path: kernel.clone(), cause })?;

        let vm = Vm::new(memory_bytes, config.logged)?;
        let template =
            CpuTemplate::for_host(&vm.supported_cpuid()?, &config.cpu_template, read_template)?;
        if template.shows_xsave() {
            xsave::is_deterministic(template.cpuid())
                .map_err(|cause| GuestError::Xsave { template: template.name().into(), cause })?;
        }
        let is_kept = |index, answer| answer == MsrAnswer::Kvm && index != EFER;
        let kept = template.msrs().filter(|(index, answer)| is_kept(*index, *answer));
        vm.serve_only_msrs(&kept.map(|(index, _)| index).collect::<Vec<_>>())?;
        let vcpu = vm.create_vcpu()?;
        vcpu.set_cpuid(template.cpuid())?;

        let fingerprint = Fingerprint {
            protocol_version: PROTOCOL_VERSION,
            kernel_sha256,
            initramfs_sha256: initramfs_file.as_deref().map(|f| Sha256::digest(f).into()),
            disk_bytes: config.disk.map(|disk| disk.size_bytes),
            disk_sha256: config.disk.and_then(|disk| disk.sha256),
            cmdline: cmdline.clone(),
            cpu_template: template.name().into(),
            cpu_template_sha256: template.digest(),
            tsc: *tsc,
            memory_mib: *memory_mib,
            net_mac: net.map(|net| net.mac),
            net_mtu: net.map(|net| net.mtu),
            on_reset: config.on_reset,
            on_panic: config.on_panic,
        };
        let plan = BootPlan {
            kernel: image,
            initramfs: initramfs_file,
            cmdline: cmdline.clone(),
            virtio_slots: virtio_slots(&config.board()),
        };
        let image = BootImage::new(plan);
        image.load(vm.memory(), &vcpu)?;
        let memory = vm.memory().clone();
        let msrs = MsrBank::new(template.msrs());
        // Allocated here, so that a host without the memory fails before anything has begun.
        let tracker = |vm: Vm| PageTracker::new(Box::new(vm.into_dirty_log()), memory.clone());
        let pages = config.logged.then(|| tracker(vm)).transpose()?;
        Ok(Self { pages, vcpu, memory, msrs, fingerprint, image })
    }

    /// Switches the guest on, at the time of day the configuration says.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn power_on(self, config: &GuestConfig) -> Result<Machine, CpuError> {
        let mut board = Board::new(&config.board());
        act_as_firmware(&mut board);
        let tsc = TscTrap::new(self.fingerprint.tsc, self.image.code().clone());
        let Fingerprint { on_reset, on_panic, .. } = self.fingerprint;
        let start = Start { image: self.image, vcpu: self.vcpu.state()?, on_reset, on_panic };
        Ok(Machine::new(self.vcpu, self.memory, board, tsc, self.msrs, self.pages, start))
    }
}

impl Guest {
    /// What a recording of this guest starts with.
    pub fn log_header(&self, config: &GuestConfig) -> LogHeader {
        let absolute = |path: &Path| {
            std::path::absolute(path).unwrap_or_else(|_| path.into()).to_string_lossy().into_owned()
        };
        LogHeader {
            build: ftvmm_runtime::build::own(),
            fingerprint: self.fingerprint.clone(),
            rtc_epoch_s: config.rtc_epoch_s,
            kernel_path: absolute(&config.kernel),
            initramfs_path: config.initramfs.as_deref().map(absolute),
            start: None,
        }
    }
}

/// A logged guest may need as much again for the copy of memory.
fn check_memory(memory_mib: u32, logged: bool) -> Result<(), TooLittleMemory> {
    let (times, why) = match logged {
        true => (2, ", logged (--record, --control, a pair or a replay: twice its memory),"),
        false => (1, ""),
    };
    let what = format!("a guest of {memory_mib} MiB{why}");
    memory::check(&what, (u64::from(memory_mib) << 20) * times)
}

/// The user's kernel command line with what the machine needs in front, so that the user's
/// parameters win where the kernel takes the last.
pub fn full_cmdline(user: &str, board: &BoardConfig) -> String {
    let net = board.net.map_or("", |_| NET_CMDLINE);
    let parts = [BASE_CMDLINE, net, user.trim()];
    parts.into_iter().filter(|p| !p.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A guest with this kernel, of 64 MiB.
    fn config(kernel: &Path) -> GuestConfig {
        GuestConfig {
            kernel: kernel.into(),
            initramfs: None,
            cmdline: String::new(),
            cpu_template: ftvmm_machine::cpu_template::DEFAULT_TEMPLATE.into(),
            memory_mib: 64,
            net: None,
            disk: None,
            tsc: TscMode::Trap,
            on_reset: OnReset::default(),
            on_panic: OnPanic::default(),
            rtc_epoch_s: 0,
            logged: false,
        }
    }

    fn refused(config: &GuestConfig) -> String {
        Guest::assemble(config).err().expect("it cannot be assembled").to_string()
    }

    #[test]
    fn files_that_do_not_do_are_named_before_kvm_is_asked() {
        let folder = tempfile::tempdir().unwrap();
        let [kernel, initramfs] = ["kernel", "initramfs"].map(|name| folder.path().join(name));
        let plain = config(&kernel);
        for memory_mib in [31, 512 * 1024 + 1] {
            let error = refused(&GuestConfig { memory_mib, ..plain.clone() });
            assert!(error.starts_with(&format!("--mem {memory_mib}: ")), "{error}");
        }
        assert!(refused(&plain).contains(&format!("kernel '{}'", kernel.display())));
        fs::write(&kernel, "no kernel").unwrap();
        let error = refused(&plain);
        assert!(error.starts_with(&format!("'{}'", kernel.display())), "{error}");
        // Longer than memory, and nothing in it.
        fs::File::create(&initramfs).unwrap().set_len((64 << 20) + 1).unwrap();
        let error = refused(&GuestConfig { initramfs: Some(initramfs), ..plain });
        assert!(error.contains("give more with --mem"), "{error}");
    }

    #[test]
    fn the_users_parameters_come_last() {
        let net = Some(NetConfig { mac: [2, 0, 0, 0, 0, 9], mtu: 1500 });
        let board = |net| BoardConfig { rtc_epoch_s: 0, net, disk_bytes: None };
        assert_eq!(full_cmdline(" quiet ", &board(None)), format!("{BASE_CMDLINE} quiet"));
        assert_eq!(full_cmdline("", &board(net)), format!("{BASE_CMDLINE} {NET_CMDLINE}"));
    }
}
