//! Whether XSAVE writes the same image in every run.
//!
//! XSAVE shows in XSTATE_BV which components the CPU tracks as in use (SDM vol. 1, 13.6: for a
//! component in its initial configuration it may say either), and KVM moves the guest's components
//! with the host's own XSAVES and XRSTORS whenever the vCPU's thread is switched or goes to user
//! space. Where the two together do not give the same bits every time, a guest's memory differs
//! from run to run.

use ftvmm_machine::Cpu;
use kvm_bindings::{CpuId, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, kvm_guest_debug};

use super::failure::{Findings, ProbeFailure, same_bytes};
use super::programs::{self, layout};
use super::stop::Stop;
use super::{CR4_OSXSAVE, MicroGuest, Ring};
use crate::call;

/// Of each kind.
const RUNS: usize = 10;
/// Images the program stores, and their distance in bytes.
const IMAGES: usize = 9;
const IMAGE_STRIDE_BYTES: usize = 0x400;
/// How a run is disturbed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Not at all.
    Straight,
    /// After every instruction the vCPU's thread goes to user space, where the registers are the
    /// host's.
    Stepped,
}

/// Runs a program that stores its state with XSAVE in many situations, straight and stopped after
/// every instruction, and compares all images.
///
/// # Errors
/// [`ProbeFailure::Differs`] with the first difference; what KVM said when it cannot run the
/// program.
pub fn is_deterministic(cpuid: &CpuId) -> Findings {
    let first = run(cpuid, Way::Straight)?;
    for number in 1..=RUNS {
        for (way, name) in [(Way::Straight, "straight"), (Way::Stepped, "stepped")] {
            let images = run(cpuid, way)?;
            let place = |at| {
                let (image, byte) = (at / IMAGE_STRIDE_BYTES, at % IMAGE_STRIDE_BYTES);
                format!("byte {byte} of XSAVE image {image}, {name} run {number}")
            };
            same_bytes(place, &first, &images)?;
        }
    }
    Ok(format!("{IMAGES} XSAVE images the same in {RUNS} straight and {RUNS} stepped runs"))
}

fn run(cpuid: &CpuId, way: Way) -> Result<Vec<u8>, ProbeFailure> {
    let mut guest = MicroGuest::new(programs::xsave_images(), Ring::Kernel, CR4_OSXSAVE, cpuid)?;
    if way == Way::Stepped {
        let control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
        let debug = kvm_guest_debug { control, ..Default::default() };
        guest.vcpu.fd().set_guest_debug(&debug).map_err(call("KVM_SET_GUEST_DEBUG"))?;
    }
    loop {
        match guest.run()? {
            Stop::Report => break,
            Stop::Debug if way == Way::Stepped => {}
            Stop::Interrupted => {}
            got => {
                let regs = guest.vcpu.regs()?;
                // The handler has pushed nothing: where it was called from lies on top of the
                // stack.
                let is_fault = matches!(got, Stop::Exception { .. });
                let rip = if is_fault { guest.read_u64(regs.rsp)? } else { regs.rip };
                return Err(ProbeFailure::WrongStop { got, rip, expected: Stop::Report });
            }
        }
    }
    guest.read(layout::DATA, IMAGES * IMAGE_STRIDE_BYTES)
}
