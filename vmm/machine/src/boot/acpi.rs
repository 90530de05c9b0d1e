//! ACPI tables: how a stock Linux finds its devices, its clock and its power switch (ACPI
//! specification 6.5, §5.2).
//!
//! RSDP → XSDT → FADT → FACS and DSDT. The FADT describes the fixed hardware of
//! [`ftvmm_devices::acpi`]; the DSDT names each virtio-mmio device ("LNRO0005", as Linux's
//! `virtio_mmio.c` wants it) and the value that enters S5. There is no MADT because there is no
//! APIC: Linux then drives the 8259. The tables are a function of the list of devices
//! alone, so that both hosts and every replay write the same bytes.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, IO, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path, ResourceTemplate,
    Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use ftvmm_devices::acpi::{
    GENERATION_EVENT, GENERATION_ID_ADDRESS, GPE0_BYTES, GPE0_PORT, PM_TIMER_BYTES, PM_TIMER_PORT,
    PM1A_CONTROL_BYTES, PM1A_CONTROL_PORT, PM1A_EVENT_BYTES, PM1A_EVENT_PORT, S5_SLEEP_TYPE,
    SCI_IRQ,
};
use ftvmm_devices::{PVPANIC_PORT, VirtioSlot};

const OEM_ID: [u8; 6] = *b"FTVMM ";
const OEM_TABLE_ID: [u8; 8] = *b"FTVMM   ";
const OEM_REVISION: u32 = 1;
/// ACPI 2.0 and later: 64-bit integers in AML.
const DSDT_REVISION: u8 = 2;
const HEADER_BYTES: u32 = 36;
/// §5.2.10: the FACS lies on a 64-byte boundary; the other tables may.
const ALIGNMENT_BYTES: usize = 64;

/// The reset control register and the value that resets ([`ftvmm_devices`]' port 0xcf9).
const RESET_PORT: u64 = 0xcf9;
const RESET_VALUE: u8 = 0x06;
/// The generation counter's only notification.
const GENERATION_CHANGED: u8 = 0x80;
/// CMOS index of the century.
const RTC_CENTURY: u8 = 0x32;
/// IAPC_BOOT_ARCH (§5.2.9.3): there are legacy devices, no VGA, no MSI; bit 1 clear: no keyboard
/// controller.
const IAPC_BOOT_ARCH: u16 = 1 | 1 << 2 | 1 << 3;
/// §5.2.9: latencies that say there is neither C2 nor C3.
const NO_C2_LATENCY_US: u16 = 101;
const NO_C3_LATENCY_US: u16 = 1001;

/// The flags of §5.2.9: sleep button and RTC wake-up are no fixed hardware; the power button is.
const FADT_FLAGS: [Flags; 6] = [
    Flags::Wbinvd,
    Flags::ProcC1,
    Flags::SlpButton,
    Flags::FixRtc,
    Flags::TmrValExt,
    Flags::ResetRegSup,
];

/// All tables for a guest with the devices in `slots`, to be written to `base` (a multiple of 64);
/// the RSDP is first.
pub fn tables(base: u32, slots: &[VirtioSlot]) -> Vec<u8> {
    let mut area = Area { base, bytes: vec![0; Rsdp::len()] };
    let facs = area.add(&FACS::new());
    let dsdt = area.add(&dsdt(slots));
    let fadt = area.add(&fadt(facs, dsdt));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt.into());
    let xsdt = area.add(&xsdt);
    area.bytes[..Rsdp::len()].copy_from_slice(&bytes(&Rsdp::new(OEM_ID, xsdt.into())));
    area.bytes
}

/// Tables one after the other in guest memory.
struct Area {
    base: u32,
    bytes: Vec<u8>,
}

impl Area {
    /// Appends a table and returns its guest-physical address.
    fn add(&mut self, table: &dyn Aml) -> u32 {
        let offset = self.bytes.len().next_multiple_of(ALIGNMENT_BYTES);
        self.bytes.resize(offset, 0);
        table.to_aml_bytes(&mut self.bytes);
        self.base + offset as u32
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(facs: u32, dsdt: u32) -> FADT {
    let mut table =
        FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION).firmware_ctrl_32(facs).dsdt_32(dsdt);
    table.sci_int = u16::from(SCI_IRQ).into();
    table.pm1a_evt_blk = u32::from(PM1A_EVENT_PORT).into();
    table.pm1_evt_len = PM1A_EVENT_BYTES;
    table.pm1a_cnt_blk = u32::from(PM1A_CONTROL_PORT).into();
    table.pm1_cnt_len = PM1A_CONTROL_BYTES;
    table.pm_tmr_blk = u32::from(PM_TIMER_PORT).into();
    table.pm_tmr_len = PM_TIMER_BYTES;
    table.gpe0_blk = u32::from(GPE0_PORT).into();
    table.gpe0_blk_len = GPE0_BYTES;
    table.p_lvl2_lat = NO_C2_LATENCY_US.into();
    table.p_lvl3_lat = NO_C3_LATENCY_US.into();
    table.century = RTC_CENTURY;
    table.iapc_boot_arch = IAPC_BOOT_ARCH.into();
    table.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, RESET_PORT);
    table.reset_value = RESET_VALUE;
    FADT_FLAGS.into_iter().fold(table, FADTBuilder::flag).finalize()
}

fn dsdt(slots: &[VirtioSlot]) -> Sdt {
    let mut table =
        Sdt::new(*b"DSDT", HEADER_BYTES, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let zero = 0u8;
    let s5 = Package::new(vec![&S5_SLEEP_TYPE, &zero, &zero, &zero]);
    table.append_slice(&bytes(&Name::new(Path::new("\\_S5_"), &s5)));
    let mut devices: Vec<u8> =
        (0..).zip(slots).flat_map(|(number, slot)| virtio(number, slot)).collect();
    devices.extend(pvpanic());
    devices.extend(generation_counter());
    table.append_slice(&Scope::raw(Path::new("\\_SB_"), devices));
    let counter = Path::new("\\_SB_.VGEN");
    let changed = Notify::new(&counter, &GENERATION_CHANGED);
    let event =
        Method::new(format!("_E{GENERATION_EVENT:02X}").as_str().into(), 0, false, vec![&changed]);
    table.append_slice(&Scope::raw(Path::new("\\_GPE"), bytes(&event)));
    table
}

/// QEMU's pvpanic device.
fn pvpanic() -> Vec<u8> {
    let port = IO::new(PVPANIC_PORT, PVPANIC_PORT, 1, 1);
    let resources = ResourceTemplate::new(vec![&port]);
    let names =
        [Name::new(Path::new("_HID"), &"QEMU0001"), Name::new(Path::new("_CRS"), &resources)];
    let names = names.iter().map(|name| name as &dyn Aml).collect();
    bytes(&Device::new(Path::new("PEVT"), names))
}

/// The generation counter, as "Virtual Machine Generation ID" (Microsoft 2012) has it; Linux'
/// `vmgenid` knows both names.
fn generation_counter() -> Vec<u8> {
    let compatible = Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"]);
    let (low, high) = (GENERATION_ID_ADDRESS as u32, (GENERATION_ID_ADDRESS >> 32) as u32);
    let address = Package::new(vec![&low, &high]);
    let names = [
        Name::new(Path::new("_HID"), &"FTVM0001"),
        Name::new(Path::new("_CID"), &compatible),
        Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
        Name::new(Path::new("ADDR"), &address),
    ];
    let names = names.iter().map(|name| name as &dyn Aml).collect();
    bytes(&Device::new(Path::new("VGEN"), names))
}

/// The AML of one virtio device.
fn virtio(number: u8, slot: &VirtioSlot) -> Vec<u8> {
    let registers = Memory32Fixed::new(true, slot.base as u32, slot.bytes as u32);
    let interrupt = Interrupt::new(true, false, false, false, slot.irq.into());
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    let names = [
        Name::new(Path::new("_HID"), &"LNRO0005"),
        Name::new(Path::new("_UID"), &number),
        Name::new(Path::new("_CRS"), &resources),
    ];
    let path = Path::new(&format!("VR{number:02}"));
    bytes(&Device::new(path, names.iter().map(|name| name as &dyn Aml).collect()))
}

#[cfg(test)]
mod tests {
    use ftvmm_devices::VIRTIO_NET_SLOT;

    use super::*;

    const BASE: u32 = 0xe_0000;

    struct Found {
        signature: [u8; 4],
        bytes: Vec<u8>,
    }

    fn at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
        bytes[offset..offset + N].try_into().unwrap()
    }

    /// The table at a guest-physical address, as an operating system reads it.
    fn table(area: &[u8], address: u64) -> Found {
        let start = (address - u64::from(BASE)) as usize;
        let length = u32::from_le_bytes(at(area, start + 4)) as usize;
        Found { signature: at(area, start), bytes: area[start..start + length].to_vec() }
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_with_a_right_checksum() {
        let area = tables(BASE, &[VIRTIO_NET_SLOT]);
        assert_eq!(&area[..8], b"RSD PTR ");
        assert_eq!((sum(&area[..20]), sum(&area[..36])), (0, 0));
        let xsdt = table(&area, u64::from_le_bytes(at(&area, 24)));
        let fadt = table(&area, u64::from_le_bytes(at(&xsdt.bytes, 36)));
        let facs = table(&area, u32::from_le_bytes(at(&fadt.bytes, 36)).into());
        let dsdt = table(&area, u32::from_le_bytes(at(&fadt.bytes, 40)).into());
        for (found, signature) in [(&xsdt, b"XSDT"), (&fadt, b"FACP"), (&dsdt, b"DSDT")] {
            assert_eq!(&found.signature, signature);
            assert_eq!(sum(&found.bytes), 0, "{}", signature.escape_ascii());
        }
        assert_eq!(&facs.signature, b"FACS");
        assert_eq!(xsdt.bytes.len(), 36 + 8, "no MADT");
    }

    /// Offsets of §5.2.9, table 5.9.
    #[test]
    fn the_fadt_says_where_the_fixed_hardware_is() {
        let fadt = bytes(&fadt(0, 0));
        assert_eq!(u16::from_le_bytes(at(&fadt, 46)), 9, "SCI_INT");
        assert_eq!(u32::from_le_bytes(at(&fadt, 48)), 0, "SMI_CMD: in ACPI mode already");
        assert_eq!(u32::from_le_bytes(at(&fadt, 56)), 0x600, "PM1a_EVT_BLK");
        assert_eq!(u32::from_le_bytes(at(&fadt, 64)), 0x604, "PM1a_CNT_BLK");
        assert_eq!(u32::from_le_bytes(at(&fadt, 76)), 0x608, "PM_TMR_BLK");
        assert_eq!(fadt[88..94], [4, 2, 0, 4, 2, 0], "lengths");
        assert_eq!(u32::from_le_bytes(at(&fadt, 80)), 0x60c, "GPE0_BLK");
        let flags = u32::from_le_bytes(at(&fadt, 112));
        assert_eq!(flags & (1 << 4), 0, "the power button is fixed hardware");
        assert_eq!(flags & (1 << 8), 1 << 8, "TMR_VAL_EXT");
        assert_eq!(flags & (1 << 10), 1 << 10, "RESET_REG_SUP");
        assert_eq!(flags & (1 << 20), 0, "not hardware-reduced");
        assert_eq!(fadt[116..129], [1, 8, 0, 1, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0, 6], "reset register");
    }

    #[test]
    fn each_slot_is_a_device_with_its_registers_and_its_interrupt() {
        let second = VirtioSlot { base: 0xd000_1000, bytes: 0x1000, irq: 10 };
        let aml = dsdt(&[VIRTIO_NET_SLOT, second]).as_slice().to_vec();
        let has = |part: &[u8]| aml.windows(part.len()).any(|window| window == part);
        for (name, base, irq) in [(b"VR00", 0xd000_0000u32, 5u8), (b"VR01", 0xd000_1000, 10)] {
            assert!(has(name));
            let registers = [&[0x86, 9, 0, 1][..], &base.to_le_bytes(), &[0, 0x10, 0, 0]].concat();
            // §6.4.3.6: a consumer's, level triggered, active high, exclusive.
            assert!(has(&[&registers[..], &[0x89, 6, 0, 1, 1, irq, 0, 0, 0]].concat()));
        }
        assert!(has(b"_HID\x0dLNRO0005\0"));
        assert!(has(b"_HID\x0dQEMU0001\0"));
        // §6.4.2.5: 16 bits decoded, port 0x505, one.
        assert!(has(&[0x47, 1, 0x05, 0x05, 0x05, 0x05, 1, 1]));
        assert!(has(b"_CID\x12\x1c\x02\x0dVM_Gen_Counter\0\x0dVMGENCTR\0"));
        assert!(has(b"_E00\0\x86\\.\x5f_SB_VGEN\x0a\x80") || has(b"VGEN\x0a\x80"));
        assert!(has(b"_S5_\x12\x07\x04\x0a\x05\0\0\0"));
        assert!(!dsdt(&[]).as_slice().windows(4).any(|window| window == b"LNRO"));
    }
}
