//! What the table of slots promises to the bus, the interrupt controller and the ACPI tables.

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::config::NetConfig;

const NET: NetConfig = NetConfig { mac: [2, 0, 0, 0, 0, 1], mtu: 1500 };

fn devices(net: Option<NetConfig>, disk_bytes: Option<u64>) -> VirtioDevices {
    VirtioDevices::new(&BoardConfig { rtc_epoch_s: 0, net, disk_bytes })
}

#[test]
fn slots_rise_and_share_neither_addresses_nor_interrupts() {
    let full = devices(Some(NET), Some(512));
    let slots: Vec<VirtioSlot> = full.transports().map(|(slot, _)| slot).collect();
    for (index, slot) in slots.iter().enumerate() {
        for later in &slots[index + 1..] {
            assert!(slot.base + slot.bytes <= later.base);
            assert_ne!(slot.irq, later.irq);
        }
    }
}

#[test]
fn guests_find_the_devices_where_they_have_always_been() {
    let config = BoardConfig { rtc_epoch_s: 0, net: Some(NET), disk_bytes: Some(512) };
    let slots: Vec<(u64, u64, u8)> =
        virtio_slots(&config).iter().map(|slot| (slot.base, slot.bytes, slot.irq)).collect();
    let expected = [(0xd000_0000, 0x1000, 5), (0xd000_1000, 0x1000, 10), (0xd000_2000, 0x1000, 11)];
    assert_eq!(slots, expected);
}

#[test]
fn an_access_reaches_the_device_at_its_address_if_it_is_there() {
    let id_at = |devices: &mut VirtioDevices, addr: u64| {
        let (slot, offset, device) = devices.at::<GuestMemoryMmap>(addr, 4)?;
        assert_eq!(slot.base + u64::from(offset), addr);
        let mut id = [0; 4];
        device.read(offset, &mut id);
        Some(u32::from_le_bytes(id))
    };
    let mut full = devices(Some(NET), Some(512));
    let mut bare = devices(None, None);
    for (addr, in_full, in_bare) in [
        (0xd000_0008, Some(VirtioNet::ID), None),
        (0xd000_1008, Some(VirtioEntropy::ID), Some(VirtioEntropy::ID)),
        (0xd000_2008, Some(VirtioBlk::ID), None),
        (0xe000_0008, None, None),
        (0xcfff_fffe, None, None),
    ] {
        assert_eq!(id_at(&mut full, addr), in_full, "{addr:#x}");
        assert_eq!(id_at(&mut bare, addr), in_bare, "{addr:#x}");
    }
}

#[test]
fn each_device_is_saved_restored_and_powered_on() {
    let mem: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    for (net, disk_bytes) in [(None, None), (Some(NET), None), (None, Some(512))] {
        let mut devices = devices(net, disk_bytes);
        let at_power_on = devices.save();
        let slots: Vec<VirtioSlot> = devices.transports().map(|(slot, _)| slot).collect();
        for slot in &slots {
            let (_, offset, device) = devices.at(slot.base + 0x70, 4).unwrap();
            device.write(&mem, offset, &[3, 0, 0, 0], &mut vec![]);
            // Notified before it is ready.
            let (_, offset, device) = devices.at(slot.base + 0x50, 4).unwrap();
            device.write(&mem, offset, &[0; 4], &mut vec![]);
        }
        assert_eq!(devices.faults().count, slots.len() as u64);
        let state = devices.save();
        assert_ne!(state, at_power_on);
        let mut restored = VirtioDevices::restore(state.clone()).unwrap();
        assert_eq!(restored.save(), state);
        restored.power_on();
        assert_eq!(restored.faults(), devices.faults());
        assert!(restored.transports().all(|(_, transport)| transport.read(0x70) == 0));
    }
}
