//! The KVM adapter: one virtual machine with one virtual CPU and plain memory.
//!
//! No part of KVM that acts by itself is switched on: no in-kernel interrupt controller or timer,
//! no ioeventfd, no coalesced MMIO. So every access to a device is a synchronous exit, and nothing
//! reaches the guest but what `Vcpu::inject` and the answers to its exits put there.

mod dirty;
mod kick_target;
mod kicker;
pub mod micro_guest;
mod msr;
pub mod probes;
mod state;
mod vcpu;

use std::rc::Rc;

use ftvmm_machine::CpuError;
use ftvmm_machine::memory::{DEVICE_HOLE_START, HIGH_MEMORY_START, Memory};
use kvm_bindings::{
    KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use thiserror::Error;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

pub use dirty::KvmDirtyLog;
pub use kick_target::install_kick_handler;
pub use kicker::Kicker;
pub use vcpu::Vcpu;

use ftvmm_machine::sync;

use vcpu::VcpuCaps;

/// Three pages Intel's VMX needs in the guest's address space, out of its sight
/// (KVM api.rst, KVM_SET_TSS_ADDR).
const TSS_ADDRESS: usize = 0xfffb_d000;

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
    /// KVM has another API version.
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
    /// KVM keeps shadows of the guest's page tables.
    #[error(
        "nested paging is off ({parameter} is N) or this CPU has none: a guest with a log, in \
         lockstep or recorded, \
         needs EPT or NPT"
    )]
    NoNestedPaging {
        /// The parameter of the KVM module.
        parameter: &'static str,
    },
    /// The processor, or a call to KVM, failed.
    #[error(transparent)]
    Cpu(#[from] CpuError),
}

/// Names the ioctl that failed.
pub(crate) fn call(name: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> CpuError {
    move |cause| CpuError::Call { call: name, cause: cause.into() }
}

/// Where the KVM modules say whether they use nested paging.
const NESTED_PAGING: [&str; 2] =
    ["/sys/module/kvm_intel/parameters/ept", "/sys/module/kvm_amd/parameters/npt"];

/// The module parameter that says that KVM works without nested paging, if the host has it. KVM
/// then keeps shadow page tables, and does not notice when a slice or a restored state changes the
/// guest's tables.
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
            _ => call("open(/dev/kvm)")(cause).into(),
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
            KvmDirtyLog::enable(&fd)?;
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

    /// Makes KVM serve these MSRs; an access to any other is an exit.
    ///
    /// # Errors
    /// When KVM cannot do this: it came with Linux 5.10.
    pub fn serve_only_msrs(&self, served: &[u32]) -> Result<(), KvmError> {
        msr::serve_only(&self.fd, served)
    }

    /// The dirty log, for a machine that was made with it; slots are the regions of the memory in
    /// order.
    pub fn into_dirty_log(self) -> KvmDirtyLog {
        KvmDirtyLog::new(self.fd)
    }

    /// Every CPUID leaf this host's KVM could show a guest.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn supported_cpuid(&self) -> Result<kvm_bindings::CpuId, KvmError> {
        let supported = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        Ok(supported.map_err(call("KVM_GET_SUPPORTED_CPUID"))?)
    }
}

/// Makes guest memory zero, and gives it back to the host. Every page is marked as written by this
/// program.
///
/// # Errors
/// When the host refuses.
fn forget_memory(memory: &Memory) -> Result<(), CpuError> {
    for region in memory.iter() {
        let bytes = region.len() as usize;
        // SAFETY: the range is a mapping of anonymous private memory that lives as long as
        // `memory`. It is on this thread alone (see Memory), so the guest stands still. This is
        // part of a method of the processor, and whoever holds a slice of memory calls none (see
        // Cpu). The next access finds zeroes (madvise(2), MADV_DONTNEED).
        let answer = unsafe { libc::madvise(region.as_ptr().cast(), bytes, libc::MADV_DONTNEED) };
        if answer != 0 {
            let cause = std::io::Error::last_os_error();
            return Err(CpuError::Call { call: "madvise", cause });
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
