//! What the tests of this crate share: a processor that executes nothing, a log of dirty pages that
//! is written by hand, and a small guest to run on them.

mod fake_cpu;
mod guest;

pub use fake_cpu::{Did, FakeCpu, FakeLog, copied};
pub use guest::{ENTRY, Guest, MEMORY_BYTES, elf, elf_with, guest_writes};
