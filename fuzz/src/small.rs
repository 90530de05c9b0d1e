//! Decoders of small things: a slice's pages, parts of a state, a witness's entry, a disk's label,
//! a channel's key, accesses to the devices' registers.

use ftvmm_devices::{Board, BoardConfig, DiskOutcome, DiskRequest, Input, NetConfig, Output};
use ftvmm_host::channel::key_file;
use ftvmm_replication::{DiskLabel, PAGE_BYTES, slice, state, witness::Entry};
use vm_memory::{GuestAddress, GuestMemoryMmap};

const MEMORY_BYTES: usize = 1 << 20;
const DISK_BYTES: u64 = 64 * 512;
/// Where the virtio devices' registers begin; four devices' worth is reached.
const REGISTERS: u64 = 0xd000_0000;

/// The pages of a slice.
pub fn slice(bytes: &[u8]) {
    let _ = slice::for_each_run(bytes, |_, at, run| assert!(at + run.len() <= PAGE_BYTES));
}

/// Parts of a state: as they come, and as what unpacks to the bytes.
pub fn state_part(bytes: &[u8]) {
    let packed = state::pack([(1, bytes)].into_iter());
    for packed in [bytes, &packed] {
        let _ = state::unpack_pages(packed, |_, page| assert_eq!(page.len(), PAGE_BYTES));
        let _ = state::unpack_blocks(packed, |_, block| assert!(!block.is_empty()));
    }
}

/// What a witness holds, a file or a value in etcd: what is read is what would be written, and what
/// is no entry is shown in a line.
pub fn witness(bytes: &[u8]) {
    match Entry::from_stored(bytes) {
        Ok(entry) => assert_eq!(entry.to_line().as_bytes(), bytes),
        Err(shown) => assert!(!shown.contains('\n') && shown.len() < 500),
    }
}

/// A disk's label: as it comes, and with a checksum that holds.
pub fn disk_label(bytes: &[u8]) {
    let said = String::from_utf8_lossy(bytes);
    let summed = format!("{said}crc32c {:08x}\n", crc32c::crc32c(said.as_bytes()));
    for text in [&said, summed.as_str()] {
        if let Some(label) = DiskLabel::from_text(text) {
            assert_eq!(label.to_text(), text);
        }
    }
}

/// A channel's key file.
pub fn channel_key(bytes: &[u8]) {
    if let Some(key) = key_file::parse(bytes) {
        let digits: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = String::from_utf8_lossy(bytes).to_ascii_lowercase();
        assert!(text.trim_end().ends_with(&digits));
    }
}

/// Accesses of a guest to ports and registers, six bytes each: what, where (two), and data. All
/// devices are there, the serial console and the clocks among them.
pub fn registers(bytes: &[u8]) {
    let net = Some(NetConfig { mac: [2, 0, 0, 0, 0, 7], mtu: 1500 });
    let mut board = Board::new(&BoardConfig { rtc_epoch_s: 0, net, disk_bytes: Some(DISK_BYTES) });
    let Ok(memory) = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]) else {
        return;
    };
    let mut now_ns = 0;
    for access in bytes.as_chunks::<6>().0 {
        let [what, low, high, data @ ..] = *access;
        let at = u16::from_le_bytes([low, high]);
        let mut data = [data[0], data[1], data[2], 0];
        let size = 1 << (what >> 4 & 3).min(2);
        let data = &mut data[..size];
        match what & 0xf {
            0 => board.pio_read(at, data),
            1 => board.pio_write(at, data),
            2 => board.mmio_read(&memory, REGISTERS + u64::from(at), data),
            3 => board.mmio_write(&memory, REGISTERS + u64::from(at), data),
            4 => {
                now_ns += u64::from(at) << (data[0] & 0x1f);
                board.apply(&memory, Input::Time { now_ns });
            }
            5 => board.apply(&memory, Input::ConsoleRx { bytes: data.to_vec() }),
            6 => drop(board.acknowledge_interrupt()),
            7 => board.apply(&memory, Input::PowerButton),
            8 => board.reset(),
            _ => board.apply(&memory, Input::NetRx { frame: vec![low; 12 + usize::from(high)] }),
        }
        for output in board.take_outputs() {
            if let Output::Disk(DiskRequest { id, .. }) = output {
                let outcome = DiskOutcome::Done { data: Vec::new() };
                board.apply(&memory, Input::DiskDone { id, outcome });
            }
        }
    }
}
