//! The machine: processor, memory and devices as one deterministic function of the guest image and
//! its inputs. What executes the processor is behind [`cpu::Cpu`]; here is no KVM, no descriptor,
//! no clock and no thread of its own.

pub mod boot;
pub mod cpu;
pub mod cpu_state;
pub mod cpu_template;
pub mod disk_completion;
pub mod efer;
pub mod exit;
pub mod exit_chain;
pub mod fault;
pub mod machine;
pub mod machine_state;
pub mod memory;
pub mod msr;
pub mod net_watch;
pub mod page_tracker;
pub mod situation;
pub mod sync;
pub mod tsc;
pub mod vcpu_state;
pub mod virtual_machine;

pub use cpu::{Cpu, CpuError, DirtyLog, Kick};
pub use machine::Machine;
pub use virtual_machine::VirtualMachine;

#[cfg(test)]
mod tests;
