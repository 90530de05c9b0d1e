//! KVM's dirty log: the pages the guest wrote (KVM api.rst 4.8 KVM_GET_DIRTY_LOG, 4.117
//! KVM_CLEAR_DIRTY_LOG, 7.18 KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
//!
//! Reading does not reset it. A bit that is left set costs one look at the page; a bit that is
//! cleared costs a fault at the page's next write. So hot pages are left set.

use std::os::fd::AsRawFd;

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

/// Names the pages the guest wrote.
pub trait WriteLog {
    /// One bit for each page of the slot, page 0 in bit 0 of the first word.
    ///
    /// # Errors
    /// When KVM refuses.
    fn read(&self, slot: u32, memory_bytes: usize) -> Result<Vec<u64>, KvmError>;

    /// Clears the bits that are set in `bits`: the next write to such a page sets it again.
    ///
    /// # Errors
    /// When KVM refuses.
    fn clear(&self, slot: u32, pages: u32, bits: &[u64]) -> Result<(), KvmError>;
}

/// The dirty log of a virtual machine whose slots have it switched on.
pub struct DirtyLog {
    fd: VmFd,
}

impl DirtyLog {
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

impl WriteLog for DirtyLog {
    fn read(&self, slot: u32, memory_bytes: usize) -> Result<Vec<u64>, KvmError> {
        self.fd.get_dirty_log(slot, memory_bytes).map_err(call("KVM_GET_DIRTY_LOG"))
    }

    fn clear(&self, slot: u32, pages: u32, bits: &[u64]) -> Result<(), KvmError> {
        let bitmap = kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_ptr() as *mut _ };
        let clear =
            kvm_clear_dirty_log { slot, num_pages: pages, first_page: 0, __bindgen_anon_1: bitmap };
        assert!(bits.len() * 64 >= pages as usize, "a bit for every page");
        // SAFETY: KVM reads the structure and one bit for each of `pages`, which `bits` has; it
        // writes neither.
        let answer = unsafe { ioctl_with_ref(&self.fd, KVM_CLEAR_DIRTY_LOG(), &clear) };
        if answer < 0 {
            let cause = kvm_ioctls::Error::last();
            return Err(KvmError::Call { call: "KVM_CLEAR_DIRTY_LOG", cause });
        }
        Ok(())
    }
}

impl AsRawFd for DirtyLog {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}
