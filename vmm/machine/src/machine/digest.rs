//! Digest of the whole guest, for how a run ended.

use ftvmm_replication::encoding::encode;
use sha2::{Digest, Sha256};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use xxhash_rust::xxh3::xxh3_128;

use super::Machine;
use crate::cpu::{Cpu, CpuError};
use crate::cpu_state::CpuState;
use crate::memory::Memory;

/// Bytes of memory hashed at a time.
const DIGEST_CHUNK_BYTES: usize = 1 << 20;

impl<C: Cpu> Machine<C> {
    /// Digest of the whole guest: every register, all memory, all device state, every exit and
    /// output before.
    ///
    /// # Errors
    /// When KVM fails.
    pub fn state_digest(&self) -> Result<[u8; 32], CpuError> {
        let mut hash = Sha256::new();
        for (name, bytes) in CpuState::of(&self.vcpu.state()?).parts() {
            hash.update(name);
            hash.update(bytes);
        }
        hash.update(memory_digest(&self.memory));
        hash.update(encode(&self.board.save()));
        hash.update(encode(&self.tsc.save()));
        hash.update(self.chain.digest().to_le_bytes());
        hash.update(self.outputs.digest().to_le_bytes());
        Ok(hash.finalize().into())
    }
}

fn memory_digest(memory: &Memory) -> [u8; 16] {
    let mut digests = Vec::new();
    for region in memory.iter() {
        let bytes = region.len() as usize;
        for start in (0..bytes).step_by(DIGEST_CHUNK_BYTES) {
            let length = DIGEST_CHUNK_BYTES.min(bytes - start);
            // SAFETY: the range lies inside the region's mapping, which lives as long as `memory`.
            // Memory is on this thread alone (see Memory), the guest writes to it only inside a
            // method of its processor (see Cpu), and while the slice lives nothing is called but
            // the hash.
            let chunk = unsafe { std::slice::from_raw_parts(region.as_ptr().add(start), length) };
            digests.extend(xxh3_128(chunk).to_le_bytes());
        }
    }
    xxh3_128(&digests).to_le_bytes()
}
