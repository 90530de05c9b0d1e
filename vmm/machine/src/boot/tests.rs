//! What is in memory and in the processor when the guest's first instruction is executed.

use ftvmm_devices::VIRTIO_NET_SLOT;
use linux_loader::bootparam::{boot_params, setup_header};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{BootError, BootImage, BootPlan, KernelImage};
use crate::cpu::Cpu;
use crate::memory::{HIGH_MEMORY_START, Memory};
use crate::tests::{ENTRY, FakeCpu, MEMORY_BYTES, elf};

const ZERO_PAGE: u64 = 0x7000;
/// rdtsc ; hlt
const CODE: [u8; 3] = [0x0f, 0x31, 0xf4];

fn plan() -> BootPlan {
    BootPlan {
        kernel: KernelImage::parse(elf(&CODE)).unwrap(),
        initramfs: None,
        cmdline: "console=ttyS0".into(),
        virtio_slots: vec![VIRTIO_NET_SLOT],
    }
}

struct Booted {
    memory: Memory,
    cpu: FakeCpu,
    params: boot_params,
}

impl Booted {
    fn bytes<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn word(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.bytes(address))
    }
}

fn load(plan: BootPlan, ranges: &[(GuestAddress, usize)]) -> Result<Booted, BootError> {
    let (memory, cpu) = (Memory::from_ranges(ranges).unwrap(), FakeCpu::default());
    // KVM's processor shows its APIC at power-on.
    cpu.state.borrow_mut().sregs.apic_base = 0xfee0_0900;
    BootImage::new(plan).load(&memory, &cpu)?;
    let mut params = boot_params::default();
    memory.read_slice(params.as_mut_slice(), GuestAddress(ZERO_PAGE)).unwrap();
    Ok(Booted { memory, cpu, params })
}

fn boot(plan: BootPlan) -> Result<Booted, BootError> {
    load(plan, &[(GuestAddress(0), MEMORY_BYTES)])
}

#[test]
fn the_kernel_is_loaded_with_its_traps_and_entered_in_long_mode() {
    let booted = boot(plan()).unwrap();
    assert_eq!(booted.bytes(ENTRY), [0xe5, 0x55, 0xf4]);
    let (regs, sregs) = (booted.cpu.regs().unwrap(), booted.cpu.sregs().unwrap());
    assert_eq!((regs.rip, regs.rsi, regs.rsp, regs.rflags), (ENTRY, ZERO_PAGE, 0x8000, 2));
    // PE and PG; PAE and TSD; LME and LMA.
    assert_eq!((sregs.cr0 & 0x8000_0001, sregs.cr4, sregs.efer), (0x8000_0001, 0x24, 0x500));
    assert_eq!(sregs.apic_base, 0xfee0_0100, "there is no APIC");
    assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.ss.selector, sregs.ss.db), (0x10, 1, 0x18, 1));
    assert_eq!((sregs.gdt.base, sregs.gdt.limit, sregs.idt.limit), (0x500, 31, 0));
    assert_eq!(booted.word(0x510), 0x00af_9b00_0000_ffff);
    // The first GiB is mapped one to one.
    assert_eq!((booted.word(sregs.cr3), booted.word(0xa000)), (0xa003, 0xb003));
    assert_eq!((booted.word(0xb000), booted.word(0xb000 + 8 * 511)), (0x83, 511 << 21 | 0x83));
}

#[test]
fn the_zero_page_says_what_there_is() {
    let Booted { params, .. } = boot(plan()).unwrap();
    let header = params.hdr;
    assert_eq!((header.type_of_loader, { header.cmd_line_ptr }), (0xff, 0x2_0000));
    assert_eq!(({ header.header }, { header.boot_flag }), (0x5372_6448, 0xaa55));
    assert_eq!(({ header.ramdisk_image }, { header.ramdisk_size }), (0, 0));
    assert_eq!({ params.acpi_rsdp_addr }, 0xe_0000);
    let entries = params.e820_table;
    let map: Vec<_> = entries[..usize::from(params.e820_entries)]
        .iter()
        .map(|entry| ({ entry.addr }, { entry.size }, { entry.r#type }))
        .collect();
    let high = MEMORY_BYTES as u64 - 0x10_0000;
    assert_eq!(map, [(0, 0x9_fc00, 1), (0xe_0000, 0x2_0000, 4), (0x10_0000, high, 1)]);
}

#[test]
fn the_command_line_the_tables_and_the_firmware_are_in_their_places() {
    let booted = boot(plan()).unwrap();
    assert_eq!(&booted.bytes::<14>(0x2_0000), b"console=ttyS0\0");
    assert_eq!({ booted.params.hdr.cmdline_size }, 13);
    assert_eq!(&booted.bytes::<8>(0xe_0000), b"RSD PTR ");
    // mov dx, 0xcf9 ; mov al, 6 ; out dx, al
    assert_eq!(booted.bytes(0xf_fff0), [0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee]);
}

#[test]
fn an_initramfs_lies_at_the_end_of_low_memory() {
    let plan = BootPlan { initramfs: Some(vec![7; 5000]), ..plan() };
    let booted = boot(plan).unwrap();
    let start = MEMORY_BYTES as u64 - 0x2000;
    let header = booted.params.hdr;
    assert_eq!((u64::from(header.ramdisk_image), { header.ramdisk_size }), (start, 5000));
    assert_eq!((booted.bytes(start), booted.bytes(start + 4999)), ([7], [7, 0]));
}

#[test]
fn memory_behind_the_devices_is_in_the_map() {
    let ranges = [(GuestAddress(0), MEMORY_BYTES), (GuestAddress(HIGH_MEMORY_START), 1 << 20)];
    let Booted { params, .. } = load(plan(), &ranges).unwrap();
    let last = params.e820_table[3];
    assert_eq!(params.e820_entries, 4);
    assert_eq!(({ last.addr }, { last.size }, { last.r#type }), (HIGH_MEMORY_START, 1 << 20, 1));
}

#[test]
fn the_header_a_bzimage_came_with_is_kept() {
    let header = setup_header { loadflags: 1, type_of_loader: 3, ..Default::default() };
    let kernel = KernelImage { elf: elf(&CODE), header };
    let Booted { params, .. } = boot(BootPlan { kernel, ..plan() }).unwrap();
    assert_eq!((params.hdr.loadflags, params.hdr.type_of_loader), (1, 0xff));
}

#[test]
fn what_does_not_fit_is_named() {
    let told = |answer: Result<Booted, BootError>| answer.map(drop).unwrap_err().to_string();
    let small = told(load(plan(), &[(GuestAddress(0), 0x20_0000)]));
    assert!(small.contains("cannot be loaded into 2097152 bytes"), "{small}");
    let initramfs = Some(vec![0; MEMORY_BYTES - ENTRY as usize]);
    let big = told(boot(BootPlan { initramfs, ..plan() }));
    assert!(big.contains("an initramfs of 2097152 bytes does not fit"), "{big}");
    assert!(big.contains("ends at 0x200003"), "{big}");
    let initramfs = Some(vec![0; MEMORY_BYTES + 1]);
    assert!(told(boot(BootPlan { initramfs, ..plan() })).contains("does not fit"));
    let long = told(boot(BootPlan { cmdline: "x".repeat(2048), ..plan() }));
    assert!(long.contains("command line is not usable"), "{long}");
    assert!(boot(BootPlan { cmdline: "x".repeat(2047), ..plan() }).is_ok());
    let cut = KernelImage { elf: elf(&CODE)[..100].to_vec(), header: setup_header::default() };
    assert!(told(boot(BootPlan { kernel: cut, ..plan() })).contains("the kernel cannot be loaded"));
}

#[test]
fn a_processor_that_does_not_take_its_registers_is_told() {
    let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
    for call in ["sregs", "set_sregs", "set_regs"] {
        let cpu = FakeCpu::default();
        cpu.fails.set(Some(call));
        let error = BootImage::new(plan()).load(&memory, &cpu).unwrap_err();
        assert!(matches!(error, BootError::Kvm(_)) && error.to_string().contains(call), "{error}");
    }
}
