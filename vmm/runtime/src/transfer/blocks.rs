//! The disk's part of a transfer: every block once, and again those the guest changes meanwhile.

use std::io;

use ftvmm_host::disk::{Disk, block_count};
use ftvmm_machine::machine_state::MachineState;
use ftvmm_replication::StatePart;
use ftvmm_replication::state::{BLOCK_BYTES, PART_BLOCKS_MAX, pack, unpack_blocks};

use super::BlockImage;

/// Packs blocks into parts. A last block that is shorter is filled up with zeroes.
pub fn block_parts(blocks: &[BlockImage]) -> impl Iterator<Item = StatePart> {
    blocks.chunks(PART_BLOCKS_MAX).map(|blocks| {
        StatePart::Blocks(pack(blocks.iter().map(|(block, content)| (*block, content.as_slice()))))
    })
}

/// Reads blocks, each between two requests of the guest.
///
/// # Errors
/// What the host says.
pub fn read_blocks(disk: &Disk, blocks: &[u64]) -> io::Result<Vec<BlockImage>> {
    let read = |block: &u64| {
        let mut content = disk.read_block(*block)?;
        content.resize(BLOCK_BYTES, 0);
        Ok((*block, content))
    };
    blocks.iter().map(read).collect()
}

/// Numbers of all blocks of the disk.
pub fn all_blocks(disk: &Disk) -> Vec<u64> {
    (0..block_count(disk.size_bytes())).collect()
}

/// Writes the disk blocks of a part of a state. They come before the machine, so that the guest
/// finds them.
///
/// # Errors
/// What the host says, or that the part is none of this disk.
pub fn put_on_disk(disk: &Disk, part: &StatePart) -> io::Result<()> {
    match part {
        // No request of this host's guest from before may complete later.
        StatePart::Outline { .. } => {
            drop(disk.drain());
            disk.begin_copy().map_err(io::Error::other)?;
        }
        StatePart::Blocks(packed) => put_blocks(disk, packed)?,
        StatePart::Machine(bytes) => {
            let state = MachineState::decode(bytes).map_err(io::Error::other)?;
            disk.sync()?;
            disk.end_copy().map_err(io::Error::other)?;
            disk.resume_with(state.disk_answers);
        }
        StatePart::Pages(_) => {}
    }
    Ok(())
}

/// Puts a part of a state on this host's disk.
///
/// # Errors
/// What the host says, or that the part is none of this disk.
fn put_blocks(disk: &Disk, packed: &[u8]) -> io::Result<()> {
    let mut done = Ok(());
    unpack_blocks(packed, |block, content| {
        let length = disk.size_bytes().saturating_sub(block * BLOCK_BYTES as u64);
        let content = &content[..content.len().min(length as usize)];
        if done.is_ok() {
            done = disk.write_block(block, content);
        }
    })
    .map_err(io::Error::other)?;
    done
}
