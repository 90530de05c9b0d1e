//! KVM's dirty log: the pages the guest wrote (KVM api.rst 4.8 KVM_GET_DIRTY_LOG, 4.117
//! KVM_CLEAR_DIRTY_LOG, 7.18 KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
//!
//! Reading does not reset it. A bit that is left set costs one look at the page; a bit that is
//! cleared costs a fault at the page's next write. So hot pages are left set.

use ftvmm_machine::{CpuError, DirtyLog};
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::{KvmError, call};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.
const MANUAL_PROTECT: u64 = 1;

/// The dirty log of a virtual machine whose slots have it switched on.
pub struct KvmDirtyLog {
    fd: VmFd,
}

impl KvmDirtyLog {
    /// Makes reading the log leave it as it is.
    pub(super) fn enable(fd: &VmFd) -> Result<(), KvmError> {
        let mut cap =
            kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
        cap.args[0] = MANUAL_PROTECT;
        fd.enable_cap(&cap)
            .map_err(|_| KvmError::MissingCapability { name: "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2" })
    }

    pub(super) fn new(fd: VmFd) -> Self {
        Self { fd }
    }
}

impl DirtyLog for KvmDirtyLog {
    fn read(&self, slot: u32, memory_bytes: usize) -> Result<Vec<u64>, CpuError> {
        self.fd.get_dirty_log(slot, memory_bytes).map_err(call("KVM_GET_DIRTY_LOG"))
    }

    fn clear(&self, slot: u32, pages: u32, bits: &[u64]) -> Result<(), CpuError> {
        let bitmap = kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_ptr() as *mut _ };
        let clear =
            kvm_clear_dirty_log { slot, num_pages: pages, first_page: 0, __bindgen_anon_1: bitmap };
        assert!(bits.len() * 64 >= pages as usize, "a bit for every page");
        // SAFETY: KVM reads the structure and one bit for each of `pages`, which `bits` has; it
        // writes neither.
        let answer = unsafe { ioctl_with_ref(&self.fd, KVM_CLEAR_DIRTY_LOG(), &clear) };
        if answer < 0 {
            let cause = std::io::Error::last_os_error();
            return Err(CpuError::Call { call: "KVM_CLEAR_DIRTY_LOG", cause });
        }
        Ok(())
    }
}
