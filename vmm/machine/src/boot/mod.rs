//! Boot: from a kernel file and an initramfs to a vCPU that stands at the kernel's first 64-bit
//! instruction.

mod acpi;
mod image;
mod load;

pub use image::{ImageError, KernelImage, UNPACKED_BYTES_MAX};
pub use load::{BootError, BootImage, BootPlan};

#[cfg(test)]
mod tests;
