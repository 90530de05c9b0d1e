//! The KVM adapter: one virtual machine with one virtual CPU and plain memory.
//!
//! Nothing of KVM that acts by itself is switched on: no in-kernel interrupt controller or timer,
//! no ioeventfd, no coalesced MMIO. Whatever the guest does to a device is therefore a synchronous
//! exit, and nothing reaches the guest but what [`Vcpu::inject`] and the answers to its exits put
//! there.

mod dirty;
mod exit;
mod kick_target;
mod kicker;
mod msr;
mod snapshot;
mod state;
mod vcpu;

use std::rc::Rc;

use kvm_bindings::{
    KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use thiserror::Error;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

pub use dirty::{DirtyLog, WriteLog};
pub use exit::{Direction, Exit};
pub use kick_target::install_kick_handler;
pub use kicker::Kicker;
pub use snapshot::VcpuState;
pub use state::CpuState;
pub use vcpu::Vcpu;

use crate::sync;
use vcpu::VcpuCaps;

/// Guest memory as ftvmm maps it. The bitmap has the pages this program wrote; those the guest
/// wrote are in KVM's [`DirtyLog`].
///
/// It is shared by `Rc` and the [`Vcpu`] has a share, so the guest and all that touch its memory
/// are on one thread: while one of them is at work, the guest stands still.
pub type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Three pages Intel's VMX needs in the guest's address space, out of its sight
/// (KVM api.rst, KVM_SET_TSS_ADDR).
const TSS_ADDRESS: usize = 0xfffb_d000;

/// First guest-physical address that is kept free for devices; memory above goes beyond 4 GiB.
pub const DEVICE_HOLE_START: u64 = 0xd000_0000;
const HIGH_MEMORY_START: u64 = 0x1_0000_0000;

/// A failure of KVM or of the host's memory.
#[derive(Debug, Error)]
pub enum KvmError {
    /// The device node is not there.
    #[error(
        "/dev/kvm does not exist: load kvm_intel or kvm_amd, or run in the lab (cargo xtask lab)"
    )]
    Absent,
    /// The device node may not be opened.
    #[error(
        "no permission on /dev/kvm: run as root or join the group that owns it (usually 'kvm')"
    )]
    NoPermission,
    /// The KVM is not one this program can speak with.
    #[error("KVM speaks API version {got}, needed is {KVM_API_VERSION}")]
    ApiVersion {
        /// What the kernel answered.
        got: i32,
    },
    /// The KVM lacks something this program cannot do without.
    #[error("this KVM lacks the capability {name}")]
    MissingCapability {
        /// The capability, by its name in KVM api.rst.
        name: &'static str,
    },
    /// The host has not enough memory for the guest's.
    #[error("cannot map {bytes} bytes of guest memory: {cause}")]
    Memory {
        /// Size asked for.
        bytes: u64,
        /// The cause.
        cause: vm_memory::mmap::FromRangesError,
    },
    /// The host has not enough memory for the copy of a logged guest's.
    #[error("cannot map {bytes} bytes for the copy of a logged guest's memory: {cause}")]
    Copy {
        /// Size asked for.
        bytes: u64,
        /// The cause.
        cause: vm_memory::mmap::MmapRegionError,
    },
    /// A call to KVM failed.
    #[error("{call} failed: {cause}")]
    Call {
        /// The ioctl, by its name in KVM api.rst.
        call: &'static str,
        /// The cause.
        cause: kvm_ioctls::Error,
    },
    /// KVM keeps shadows of the guest's page tables.
    #[error(
        "nested paging is off ({parameter} is N) or this CPU has none: a guest with a log, in lockstep or recorded, \
         needs EPT or NPT"
    )]
    NoNestedPaging {
        /// The parameter of the KVM module.
        parameter: &'static str,
    },
    /// The state is of a guest that uses XSAVE.
    #[error(
        "the guest's state has XCR0 {xcr0:#x}, but this host's CPU has no XSAVE: it can go on only on a host whose CPU has"
    )]
    NoXsave {
        /// What the guest had set.
        xcr0: u64,
    },
    /// KVM stopped for a reason this program does not know; no guest can be carried on past it.
    #[error(
        "KVM stopped the guest with exit reason {reason} (sub-error {suberror}) at rip {rip:#x}"
    )]
    UnknownExit {
        /// `kvm_run.exit_reason`.
        reason: u32,
        /// `kvm_run.internal.suberror` where it applies.
        suberror: u32,
        /// Where the guest stood.
        rip: u64,
    },
}

impl KvmError {
    /// KVM does not take the value it was given, and has changed nothing.
    pub fn is_of_value(&self) -> bool {
        matches!(self, Self::Call { cause, .. } if cause.errno() == libc::EINVAL)
    }
}

/// Names the ioctl that failed.
pub(crate) fn call(name: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |cause| KvmError::Call { call: name, cause }
}

/// Where the KVM modules say whether they use nested paging.
const NESTED_PAGING: [&str; 2] =
    ["/sys/module/kvm_intel/parameters/ept", "/sys/module/kvm_amd/parameters/npt"];

/// The parameter that says that KVM works without nested paging, on a host that tells. KVM then
/// keeps shadows of the guest's page tables, and does not see when a slice or a state changes those
/// behind the guest's back.
pub fn nested_paging_is_off() -> Option<&'static str> {
    let is_off = |parameter: &&str| {
        std::fs::read(parameter).is_ok_and(|said| matches!(said.first(), Some(b'N' | b'0')))
    };
    NESTED_PAGING.into_iter().find(is_off)
}

/// A virtual machine: its memory and what makes vCPUs.
pub struct Vm {
    kvm: Kvm,
    fd: VmFd,
    memory: Rc<Memory>,
}

impl Vm {
    /// Opens KVM and makes a virtual machine with `memory_bytes` of zeroed memory; `logs_writes`
    /// switches on the dirty log.
    ///
    /// # Errors
    /// When KVM cannot be opened, lacks something, or the host has not the memory.
    pub fn new(memory_bytes: u64, logs_writes: bool) -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|cause| match cause.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Absent,
            libc::EACCES | libc::EPERM => KvmError::NoPermission,
            _ => KvmError::Call { call: "open(/dev/kvm)", cause },
        })?;
        let got = kvm.get_api_version();
        if got != KVM_API_VERSION as i32 {
            return Err(KvmError::ApiVersion { got });
        }
        for (cap, name) in [
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
            (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(KvmError::MissingCapability { name });
            }
        }
        let fd = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        msr::hide_counters(&fd)?;
        fd.set_tss_address(TSS_ADDRESS).map_err(call("KVM_SET_TSS_ADDR"))?;
        let memory = map_memory(memory_bytes)?;
        if logs_writes {
            if let Some(parameter) = nested_paging_is_off() {
                return Err(KvmError::NoNestedPaging { parameter });
            }
            DirtyLog::enable(&fd)?;
        }
        for (slot, region) in memory.iter().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: if logs_writes { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the guest writes to the region only while it runs, and what runs it, a Vcpu,
            // keeps `memory` and with it the mapping; slots and addresses do not overlap because
            // vm-memory checked the ranges.
            unsafe { fd.set_user_memory_region(region) }
                .map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(Self { kvm, fd, memory: Rc::new(memory) })
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Rc<Memory> {
        &self.memory
    }

    /// Makes the only vCPU. The machine stays alive as long as the vCPU does.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn create_vcpu(&self) -> Result<Vcpu, KvmError> {
        let fd = self.fd.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
        let has = VcpuCaps {
            sync_regs: self.kvm.check_extension(Cap::SyncRegs),
            xcrs: self.kvm.check_extension(Cap::Xcrs),
        };
        Ok(Vcpu::new(fd, has, self.memory.clone()))
    }

    /// Has KVM serve these MSRs; an access to any other is an exit. For all guests of a user.
    ///
    /// # Errors
    /// When KVM cannot do this: it came with Linux 5.10.
    pub fn serve_only_msrs(&self, served: &[u32]) -> Result<(), KvmError> {
        msr::serve_only(&self.fd, served)
    }

    /// The dirty log, for a machine that was made with it; slots are the regions of the memory in
    /// order.
    pub fn into_dirty_log(self) -> DirtyLog {
        DirtyLog::new(self.fd)
    }

    /// Every CPUID leaf this host's KVM could show a guest.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn supported_cpuid(&self) -> Result<kvm_bindings::CpuId, KvmError> {
        self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_SUPPORTED_CPUID"))
    }
}

/// Makes guest memory zero, and gives it back to the host. Every page is marked as written by this
/// program.
///
/// # Errors
/// When the host refuses.
pub fn forget_memory(memory: &Memory) -> Result<(), KvmError> {
    for region in memory.iter() {
        let bytes = region.len() as usize;
        // SAFETY: the range is a mapping of anonymous private memory that lives as long as
        // `memory`. It is on this thread alone (see Memory): the guest stands still, and no slice
        // of it is held, because the page tracker and the digest of memory call nothing that comes
        // here. The next access finds zeroes (madvise(2), MADV_DONTNEED).
        let answer = unsafe { libc::madvise(region.as_ptr().cast(), bytes, libc::MADV_DONTNEED) };
        if answer != 0 {
            let cause = kvm_ioctls::Error::last();
            return Err(KvmError::Call { call: "madvise", cause });
        }
        let region: &vm_memory::MmapRegion<_> = region;
        region.bitmap().mark_dirty(0, bytes);
    }
    Ok(())
}

fn map_memory(bytes: u64) -> Result<Memory, KvmError> {
    let low = bytes.min(DEVICE_HOLE_START);
    let mut ranges = vec![(vm_memory::GuestAddress(0), low as usize)];
    if bytes > low {
        ranges.push((vm_memory::GuestAddress(HIGH_MEMORY_START), (bytes - low) as usize));
    }
    Memory::from_ranges(&ranges).map_err(|cause| KvmError::Memory { bytes, cause })
}
