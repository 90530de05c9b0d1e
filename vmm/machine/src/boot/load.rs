//! Puts kernel, initramfs and boot parameters into guest memory and the vCPU into long mode.
//!
//! Layout, in guest-physical addresses (Linux Documentation/arch/x86/boot.rst, "64-bit boot
//! protocol"):
//!
//! | address | what |
//! |---|---|
//! | 0x500 | GDT: null, null, code, data |
//! | 0x7000 | `boot_params`, the zero page |
//! | 0x8000 | initial stack, downward |
//! | 0x9000 | page tables: the first 1 GiB mapped one to one in 2 MiB pages |
//! | 0x20000 | command line |
//! | 0xe0000 | ACPI tables, the RSDP first |
//! | 0xff000 | generation identifier, 16 bytes of zero |
//! | 0xffff0 | what a jump to the firmware's entry finds: a reset |
//! | the ELF's own | kernel |
//! | end of low memory, downward | initramfs |

use std::io::Cursor;

use ftvmm_devices::VirtioSlot;
use kvm_bindings::{kvm_regs, kvm_segment};
use linux_loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::cmdline::Cmdline;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader, load_cmdline};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::acpi;
use super::image::KernelImage;
use crate::cpu::{Cpu, CpuError};
use crate::memory::{DEVICE_HOLE_START, Memory};
use crate::tsc::{self, KernelCode};

const GDT: u64 = 0x500;
const ZERO_PAGE: u64 = 0x7000;
const STACK_TOP: u64 = 0x8000;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PD: u64 = 0xb000;
const CMDLINE: u64 = 0x2_0000;
/// Linux's COMMAND_LINE_SIZE on x86.
const CMDLINE_BYTES_MAX: usize = 2048;
const LOW_RAM_END: u64 = 0x9_fc00;
const HIGH_RAM_START: u64 = 0x10_0000;
const ACPI_TABLES: u64 = 0xe_0000;
/// Where a processor begins, and where `reboot=bios` jumps to. No firmware is there, so it asks for
/// a reset: mov dx, 0xcf9; mov al, 6; out dx, al; hlt; jmp to the hlt.
const FIRMWARE_ENTRY: u64 = 0xf_fff0;
const FIRMWARE_CODE: [u8; 9] = [0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xf4, 0xeb, 0xfd];
const E820_RAM: u32 = 1;
/// ACPI NVS: what the tables need, the FACS not to be reclaimed.
const E820_NVS: u32 = 4;
const PAGE_BYTES: u64 = 4096;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
/// GDT entries as AMD APM vol. 2 section 4.8 packs them: 64-bit code; flat data.
const GDT_CODE: u64 = 0x00af_9b00_0000_ffff;
const GDT_DATA: u64 = 0x00cf_9300_0000_ffff;

/// CR0: PE, MP, ET, NE, WP, AM, PG.
const CR0: u64 = 0x8005_0033;
/// CR4: PAE.
const CR4: u64 = 0x20;
/// EFER: LME, LMA.
const EFER: u64 = 0x500;
/// IA32_APIC_BASE: globally enabled. KVM shows the APIC feature bit while this is set.
const APIC_ENABLED: u64 = 1 << 11;

/// What to boot.
#[derive(Debug)]
pub struct BootPlan {
    /// The kernel.
    pub kernel: KernelImage,
    /// The initramfs file, if any.
    pub initramfs: Option<Vec<u8>>,
    /// The whole kernel command line.
    pub cmdline: String,
    /// The virtio devices.
    pub virtio_slots: Vec<VirtioSlot>,
}

/// What is booted, at power-on and after every reset: as it was read at first, whatever has become
/// of the files.
#[derive(Debug)]
pub struct BootImage {
    kernel: KernelImage,
    code: KernelCode,
    initramfs: Option<Vec<u8>>,
    cmdline: String,
    virtio_slots: Vec<VirtioSlot>,
}

/// Why a guest cannot be booted.
#[derive(Debug, Error)]
pub enum BootError {
    /// The kernel ELF is not loadable.
    #[error("the kernel cannot be loaded into {memory_bytes} bytes of guest memory: {cause}")]
    Kernel {
        /// Size of the guest's memory.
        memory_bytes: u64,
        /// The cause.
        cause: linux_loader::loader::Error,
    },
    /// Kernel and initramfs do not fit.
    #[error(
        "an initramfs of {initramfs_bytes} bytes does not fit behind the kernel (ends at \
         {kernel_end:#x}) in {memory_bytes} bytes of guest memory; give more with --mem"
    )]
    InitramfsTooBig {
        /// Its size.
        initramfs_bytes: usize,
        /// First free byte behind the kernel.
        kernel_end: u64,
        /// Size of the guest's memory.
        memory_bytes: u64,
    },
    /// The command line is too long or has characters a kernel does not take.
    #[error(
        "the kernel command line is not usable: {cause}; at most {CMDLINE_BYTES_MAX} bytes of \
         printable ASCII"
    )]
    Cmdline {
        /// The cause.
        cause: linux_loader::cmdline::Error,
    },
    /// Guest memory could not be written.
    #[error("boot data at {address:#x} does not fit into guest memory: {cause}")]
    Memory {
        /// Guest-physical address.
        address: u64,
        /// The cause.
        cause: vm_memory::GuestMemoryError,
    },
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] CpuError),
}

fn at<T>(address: u64, result: Result<T, vm_memory::GuestMemoryError>) -> Result<T, BootError> {
    result.map_err(|cause| BootError::Memory { address, cause })
}

impl BootImage {
    /// Puts the traps of the time stamp counter into the kernel.
    pub fn new(plan: BootPlan) -> Self {
        let BootPlan { mut kernel, initramfs, cmdline, virtio_slots } = plan;
        let code = tsc::patch(&mut kernel.elf);
        Self { kernel, code, initramfs, cmdline, virtio_slots }
    }

    /// The kernel's code and what was replaced in it.
    pub fn code(&self) -> &KernelCode {
        &self.code
    }

    /// Loads it into `memory`, which is zero, and sets `vcpu` to the kernel's 64-bit entry.
    ///
    /// # Errors
    /// When something does not fit or KVM refuses.
    pub fn load(&self, memory: &Memory, vcpu: &dyn Cpu) -> Result<(), BootError> {
        load(self, memory, vcpu)
    }
}

fn load(image: &BootImage, memory: &Memory, vcpu: &dyn Cpu) -> Result<(), BootError> {
    let kernel = &image.kernel;
    let memory_bytes = memory.iter().map(|r| r.len()).sum();
    let low_end = memory.iter().map(|r| r.len()).next().unwrap_or(0).min(DEVICE_HOLE_START);
    let loaded =
        Elf::load(memory, None, &mut Cursor::new(&kernel.elf), Some(GuestAddress(HIGH_RAM_START)))
            .map_err(|cause| BootError::Kernel { memory_bytes, cause })?;

    let mut params = boot_params { hdr: kernel.header, ..Default::default() };
    params.hdr.type_of_loader = 0xff;
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = 0x5372_6448;
    params.hdr.kernel_alignment = 0x100_0000;
    if let Some(initramfs) = &image.initramfs {
        let start = place_initramfs(initramfs.len(), loaded.kernel_end, low_end, memory_bytes)?;
        at(start, memory.write_slice(initramfs, GuestAddress(start)))?;
        params.hdr.ramdisk_image = start as u32;
        params.hdr.ramdisk_size = initramfs.len() as u32;
    }
    let cmdline = Cmdline::try_from(&image.cmdline, CMDLINE_BYTES_MAX)
        .map_err(|cause| BootError::Cmdline { cause })?;
    load_cmdline(memory, GuestAddress(CMDLINE), &cmdline)
        .map_err(|cause| BootError::Kernel { memory_bytes, cause })?;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = image.cmdline.len() as u32;

    let tables = acpi::tables(ACPI_TABLES as u32, &image.virtio_slots);
    at(ACPI_TABLES, memory.write_slice(&tables, GuestAddress(ACPI_TABLES)))?;
    params.acpi_rsdp_addr = ACPI_TABLES;
    at(FIRMWARE_ENTRY, memory.write_slice(&FIRMWARE_CODE, GuestAddress(FIRMWARE_ENTRY)))?;

    let mut e820 = vec![
        (0, LOW_RAM_END, E820_RAM),
        (ACPI_TABLES, HIGH_RAM_START - ACPI_TABLES, E820_NVS),
        (HIGH_RAM_START, low_end - HIGH_RAM_START, E820_RAM),
    ];
    e820.extend(memory.iter().skip(1).map(|r| (r.start_addr().0, r.len(), E820_RAM)));
    for (slot, &(addr, size, r#type)) in params.e820_table.iter_mut().zip(&e820) {
        *slot = boot_e820_entry { addr, size, r#type };
    }
    params.e820_entries = e820.len() as u8;
    at(ZERO_PAGE, memory.write_obj(params, GuestAddress(ZERO_PAGE)))?;

    write_page_tables(memory)?;
    enter_long_mode(memory, vcpu, loaded.kernel_load.0)
}

fn place_initramfs(
    initramfs_bytes: usize,
    kernel_end: u64,
    low_end: u64,
    memory_bytes: u64,
) -> Result<u64, BootError> {
    low_end
        .checked_sub(initramfs_bytes as u64)
        .map(|start| start & !(PAGE_BYTES - 1))
        .filter(|&start| start >= kernel_end)
        .ok_or(BootError::InitramfsTooBig { initramfs_bytes, kernel_end, memory_bytes })
}

fn write_page_tables(memory: &Memory) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    at(PML4, memory.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4)))?;
    at(PDPT, memory.write_obj(PD | PRESENT_WRITABLE, GuestAddress(PDPT)))?;
    for i in 0..512 {
        let entry = i << 21 | PRESENT_WRITABLE | LARGE;
        at(PD, memory.write_obj(entry, GuestAddress(PD + i * 8)))?;
    }
    Ok(())
}

fn enter_long_mode(memory: &Memory, vcpu: &dyn Cpu, entry: u64) -> Result<(), BootError> {
    for (i, descriptor) in [0, 0, GDT_CODE, GDT_DATA].into_iter().enumerate() {
        at(GDT, memory.write_obj(descriptor, GuestAddress(GDT + i as u64 * 8)))?;
    }
    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: CODE_SELECTOR,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: DATA_SELECTOR, type_: 3, l: 0, db: 1, ..code };
    let mut sregs = vcpu.sregs()?;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0;
    sregs.cr3 = PML4;
    sregs.cr4 = tsc::at_power_on(CR4);
    sregs.efer = EFER;
    sregs.apic_base &= !APIC_ENABLED;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: entry,
        rsi: ZERO_PAGE,
        rsp: STACK_TOP,
        rflags: 2,
        ..Default::default()
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_initramfs_that_would_reach_into_the_kernel_is_refused() {
        let answer = place_initramfs(48 << 20, 32 << 20, 64 << 20, 64 << 20);
        assert!(matches!(answer, Err(BootError::InitramfsTooBig { .. })));
        assert_eq!(place_initramfs(1, 32 << 20, 64 << 20, 64 << 20).unwrap(), (64 << 20) - 4096);
    }
}
