//! The guest's memory.

use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::AtomicBitmap;

/// Guest memory as ftvmm maps it. The bitmap has the pages this program wrote; those the guest
/// wrote are in the [`DirtyLog`](crate::cpu::DirtyLog).
///
/// It is shared by `Rc` and the [`Cpu`](crate::cpu::Cpu) has a share, so the guest and all that
/// touch its memory are on one thread: while one of them is at work, the guest stands still.
pub type Memory = GuestMemoryMmap<AtomicBitmap>;

/// First guest-physical address that is kept free for devices; memory above goes beyond 4 GiB.
pub const DEVICE_HOLE_START: u64 = 0xd000_0000;
/// Where memory goes on behind the devices.
pub const HIGH_MEMORY_START: u64 = 0x1_0000_0000;
