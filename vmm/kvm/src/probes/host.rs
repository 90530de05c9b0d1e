//! What every check is given: KVM, and the CPUID leaves every guest gets.

use std::path::Path;

use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;

use crate::call;
use crate::micro_guest::{MicroGuest, ProbeFailure, Ring, template_cpuid};

/// KVM as found on this machine.
pub struct Host {
    /// `/dev/kvm`.
    pub(crate) kvm: Kvm,
    /// The leaves every guest of ftvmm gets.
    pub(crate) cpuid: CpuId,
    /// A clock that never goes back, in nanoseconds.
    pub(crate) now_ns: Box<dyn Fn() -> u64>,
}

impl Host {
    /// Opens KVM and makes a first machine as ftvmm would; `now_ns` is the host's clock.
    ///
    /// # Errors
    /// When `/dev/kvm` cannot be used at all.
    pub fn open(now_ns: Box<dyn Fn() -> u64>) -> Result<Self, ProbeFailure> {
        let cpuid = template_cpuid()?;
        Ok(Self { kvm: Kvm::new().map_err(call("open(/dev/kvm)"))?, cpuid, now_ns })
    }

    /// What KVM this is.
    pub fn describe(&self) -> String {
        let provider = ["kvm_intel", "kvm_amd", "kvm_pvm"]
            .into_iter()
            .find(|module| Path::new("/sys/module").join(module).exists())
            .unwrap_or("an unknown module");
        format!("API version {}, provided by {provider}", self.kvm.get_api_version())
    }

    /// A machine with `program` in it and the template's CPUID.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn guest(&self, program: &[u8], ring: Ring) -> Result<MicroGuest, ProbeFailure> {
        MicroGuest::new(program, ring, 0, &self.cpuid)
    }
}
