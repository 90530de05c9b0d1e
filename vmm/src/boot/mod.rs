//! Boot: from a kernel file and an initramfs to a vCPU that stands at the kernel's first 64-bit instruction.

mod image;
mod load;
mod rdtsc;

pub use image::{ImageError, KernelImage};
pub use load::{BootError, BootPlan, Loaded, prepare};
pub use rdtsc::{RDTSC_PORT, RDTSCP_PORT};
