//! The dirty log: the pages a guest wrote since the log was last read.
//!
//! KVM may report more than that, which costs a copy and nothing else, and does so in two cases:
//! - A page read for the first time is mapped writable where the host can do so at no cost, and
//!   counts as written. So the first reading of the log may show every page the guest has touched;
//!   after it, reading adds nothing.
//! - A CPU with nested paging may count its own walks of the guest's page tables as writes (AMD APM
//!   vol. 2, 15.25.5; Intel SDM vol. 3C, "Accessed and Dirty Flags for EPT"). They are left out.
//!
//! A page too few is a failure always, and so is a page the guest never touched.

use std::collections::BTreeSet;

use ftvmm_machine::CpuError;
use ftvmm_machine::exit::Direction;
use ftvmm_machine::memory::Memory;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::host::Host;
use crate::micro_guest::programs::{self, layout};
use crate::micro_guest::{
    Findings, KICKS_PER_RUN_MAX, ProbeFailure, Ring, Stop, decode_port, load, set_registers,
    uninterrupted,
};
use crate::{KvmError, call};

const PAGE_BYTES: u64 = 4096;
const SLOT: u32 = 0;
const PAGE_TABLES: std::ops::Range<u64> =
    layout::PAGE_TABLES / PAGE_BYTES..layout::PAGE_TABLES / PAGE_BYTES + 3;
/// The page of the program.
const CODE: u64 = layout::CODE / PAGE_BYTES;
/// First page of the programs' data.
const DATA: u64 = layout::DATA / PAGE_BYTES;

/// The log reports the pages written, then, once read, only those written after.
pub fn complete(host: &Host) -> Findings {
    let memory = Memory::from_ranges(&[(GuestAddress(0), layout::MEMORY_BYTES as usize)])
        .map_err(|cause| KvmError::Memory { bytes: layout::MEMORY_BYTES, cause })?;
    load(&memory, programs::dirty_pages())?;
    let vm = create_logged_vm(host, &memory)?;
    let mut vcpu = vm.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
    set_registers(&vcpu, Ring::Kernel, 0, &host.cpuid)?;
    let written = BTreeSet::from([DATA, DATA + 3, DATA + 0x10, DATA + 0x11]);
    let touched = BTreeSet::from([CODE, DATA, DATA + 3, DATA + 0x10, DATA + 0x11, DATA + 0x20]);
    let first = dirty_after_run(&vm, &mut vcpu)?;
    expect_between("since the start", &first, &written, &touched)?;
    let again = BTreeSet::from([DATA + 3]);
    let second = dirty_after_run(&vm, &mut vcpu)?;
    expect_between("since the log was read", &second, &again, &again)?;
    let extra = first.len() - written.len();
    Ok(format!("no page missing, {extra} only read in the first reading, none in the second"))
}

/// The guest's log after it has run to its next report.
fn dirty_after_run(vm: &VmFd, vcpu: &mut VcpuFd) -> Result<BTreeSet<u64>, ProbeFailure> {
    run_to_report(vcpu)?;
    let log = vm.get_dirty_log(SLOT, layout::MEMORY_BYTES as usize);
    Ok(pages(&log.map_err(call("KVM_GET_DIRTY_LOG"))?))
}

/// All of `least` and nothing beyond `most`.
fn expect_between(
    when: &str,
    got: &BTreeSet<u64>,
    least: &BTreeSet<u64>,
    most: &BTreeSet<u64>,
) -> Result<(), ProbeFailure> {
    if got.is_superset(least) && got.is_subset(most) {
        return Ok(());
    }
    let words = |pages: &BTreeSet<u64>| {
        pages.iter().map(|page| format!("{page:#x}")).collect::<Vec<_>>().join(" ")
    };
    Err(ProbeFailure::Differs {
        what: format!("pages dirty {when}"),
        got: words(got),
        expected: format!("{} and at most {}", words(least), words(most)),
    })
}

fn create_logged_vm(host: &Host, memory: &Memory) -> Result<VmFd, KvmError> {
    let vm = uninterrupted(|| Ok(host.kvm.create_vm().map_err(call("KVM_CREATE_VM"))?))?;
    let start = memory.get_host_address(GuestAddress(0)).map_err(|_| CpuError::Call {
        call: "KVM_SET_USER_MEMORY_REGION",
        cause: std::io::Error::from_raw_os_error(libc::EFAULT),
    })?;
    let region = kvm_userspace_memory_region {
        slot: SLOT,
        flags: KVM_MEM_LOG_DIRTY_PAGES,
        guest_phys_addr: 0,
        memory_size: layout::MEMORY_BYTES,
        userspace_addr: start as u64,
    };
    // SAFETY: the region is mapped as long as `memory` lives, which its owner keeps while the
    // machine runs.
    unsafe { vm.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
    Ok(vm)
}

/// The pages of a dirty bitmap, without the page tables.
fn pages(log: &[u64]) -> BTreeSet<u64> {
    (0..64 * log.len() as u64)
        .filter(|page| log[(page / 64) as usize] >> (page % 64) & 1 == 1)
        .filter(|page| !PAGE_TABLES.contains(page))
        .collect()
}

fn run_to_report(vcpu: &mut VcpuFd) -> Result<(), ProbeFailure> {
    let expected = Stop::Report;
    let rip = |vcpu: &VcpuFd| vcpu.get_regs().map(|regs| regs.rip).map_err(call("KVM_GET_REGS"));
    for _ in 0..KICKS_PER_RUN_MAX {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, _)) if port == u16::from(layout::REPORT) => return Ok(()),
            Ok(VcpuExit::IoOut(port, _)) => {
                let got = decode_port(port, Direction::Write);
                return Err(ProbeFailure::WrongStop { got, rip: rip(vcpu)?, expected });
            }
            Ok(_) => return Err(ProbeFailure::EmulationFailure { rip: rip(vcpu)? }),
            Err(e) if e.errno() == libc::EINTR => {}
            Err(cause) => return Err(call("KVM_RUN")(cause).into()),
        }
    }
    Err(ProbeFailure::NoStop { rip: rip(vcpu)?, expected })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_missing_or_never_touched_is_a_failure() {
        let [one, two, three] = [1, 2, 3].map(|n| (0..n).collect::<BTreeSet<u64>>());
        assert!(expect_between("", &two, &one, &two).is_ok());
        assert!(expect_between("", &one, &two, &two).is_err());
        assert!(expect_between("", &three, &one, &two).is_err());
    }

    #[test]
    fn a_bitmap_is_a_set_of_pages_without_the_page_tables() {
        assert_eq!(pages(&[1 << 63 | 0b111_0001, 0b10]), BTreeSet::from([0, 63, 65]));
    }
}
