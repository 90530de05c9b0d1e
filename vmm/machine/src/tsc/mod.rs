//! The time stamp counter: traps RDTSC and RDTSCP wherever they are executed, since KVM makes no
//! exit for them.
//!
//! - **Kernel**: the instructions are port accesses ([`code`]), patched before the kernel is loaded
//!   ([`kernel`]), when the guest makes other code executable ([`hook`]), when it starts another
//!   kernel ([`Self::at_efer`](TscTrap::at_efer)), and, for what comes in no such way, where code
//!   appears later ([`late`]).
//! - **User mode**: CR4.TSD is kept set, so the instruction is a #GP. The first bytes of the
//!   guest's #GP handler are a port read ([`entry`]); there the exception frame is looked at and
//!   the instruction emulated ([`user`]). Any other #GP goes on as if the handler's own bytes stood
//!   there: what they do is done ([`displaced`]), or they are put back, stepped over and displaced
//!   again, while the guest stands at the exit.
//! - **CR4**: the guest's moves from and to CR4 are port accesses too, so that it sees the TSD bit
//!   it wrote itself ([`cr4`]). When it set that bit (`prctl(PR_SET_TSC)`), the #GP is genuine.
//!
//! The counter is guest time in nanoseconds, so it runs at 1 GHz, never goes back and is in the
//! log. CPUID keeps the TSC hidden all the same: a kernel that sees it would calibrate it against
//! the 8254 and read it in every `clock_gettime`, at the price of an exit each.
//!
//! Everything here is a function of the guest and of the exits: what it writes into guest memory is
//! the same on the primary, the backup and in a replay. What it remembers is machine state
//! ([`TscTrapState`]).
//!
//! What remains: `RDTSCP`, which CPUID hides, is #UD for a user on CPUs that check that before TSD
//! (Intel) and answered on those that do not (AMD); [`late`] says what its decoding cannot know.

mod code;
mod cr4;
mod displaced;
mod entry;
mod hook;
mod kernel;
mod late;
mod paging;
mod segment;
mod symbols;
mod user;

use ftvmm_replication::{Ordinal, TscMode};
use kvm_bindings::kvm_sregs;
use serde::{Deserialize, Serialize};

use crate::cpu::{Cpu, CpuError};
use crate::exit::{Direction, Exit};
use crate::memory::Memory;
use code::{CR4_PORTS, GP_PORT, HOOK_PORT, RDTSC_PORT, RDTSCP_PORT, Trapped};
use entry::Entry;
use hook::Hook;
use paging::AddressSpace;

pub use cr4::at_power_on;
pub use kernel::{KernelCode, patch};

const DB_VECTOR: u8 = 1;
/// DR6: the trap of a single step, and the hit breakpoints (AMD APM vol. 2, 13.1.1.3).
const DR6_BS: u64 = 1 << 14;
const DR6_BREAKPOINTS: u64 = 0xf;
const EFER_LMA: u64 = 1 << 10;
/// So many addresses of instructions that were found late are named.
const LATE_ADDRESSES_MAX: usize = 64;
/// How often to look at the #GP handler's page tables, beside its bytes.
const THOROUGH_EVERY_EXITS: u64 = 256;
/// No two bytes hold more instructions.
const DISPLACED_INSTRUCTIONS_MAX: usize = code::GP_ENTRY.len();

/// The part of the machine's state that lies here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TscTrapState {
    /// CR4.TSD as the guest wrote it.
    guest_tsd: bool,
    entry: Option<Entry>,
    seen: late::Seen,
    /// The functions that make memory executable, in the kernel that runs.
    hooks: Vec<Hook>,
    /// The kernel that runs, where it is not the one the guest was started with.
    other_kernel: Option<KernelCode>,
}

/// What was trapped so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TscCounters {
    /// RDTSC and RDTSCP replaced in the kernel's file.
    pub sites: usize,
    /// Instructions trapped in code that came later, before it ran.
    pub new_sites: usize,
    /// Kernels the guest started itself, and that were patched before they ran on.
    pub other_kernels: u64,
    /// Trapped instructions that were found after they may have run.
    pub late_sites: u64,
    /// The addresses of the first of them.
    pub late_addresses: Vec<u64>,
    /// RDTSC and RDTSCP answered in user mode.
    pub user_reads: u64,
    /// Other #GPs, handed on to the guest.
    pub passed_gps: u64,
}

/// An exit that was one of ours, for the exit chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    /// The port.
    pub port: u16,
    /// What was read or written.
    pub data: u64,
}

/// What the searches do with whatever a guest has laid out as page tables, code and handlers,
/// without a processor: for the fuzz targets.
#[doc(hidden)]
pub fn look_at(memory: &Memory, sregs: &kvm_sregs, rip: u64) {
    let space = AddressSpace::new(memory, sregs);
    let kernel = late::patch_kernel(&space, memory, rip).unwrap_or_default();
    late::Seen::default().look(&space, memory, &kernel);
    Entry::keep(&mut None, true, sregs, memory);
}

/// The traps of one guest.
pub struct TscTrap {
    mode: TscMode,
    kernel: KernelCode,
    state: TscTrapState,
    counters: TscCounters,
}

impl TscTrap {
    /// The traps of a guest whose kernel was patched as `kernel` says.
    pub fn new(mode: TscMode, kernel: KernelCode) -> Self {
        let counters = TscCounters { sites: kernel.rdtsc_sites, ..Default::default() };
        let state = TscTrapState { hooks: kernel.hooks.clone(), ..Default::default() };
        Self { mode, kernel, state, counters }
    }

    /// The kernel the guest was started with is in memory again, as it was at first. What was
    /// counted stays.
    pub fn reset(&mut self) {
        self.state = TscTrapState { hooks: self.kernel.hooks.clone(), ..Default::default() };
    }

    /// What was trapped so far.
    pub fn counters(&self) -> &TscCounters {
        &self.counters
    }

    /// Says what may have escaped the traps. For live roles: a replay finds what its recording
    /// found.
    pub fn warn_of_late_sites(&self) {
        let TscCounters { late_sites, late_addresses, .. } = &self.counters;
        if *late_sites > 0 {
            tracing::warn!(
                "{late_sites} kernel instructions, the first at {late_addresses:#x?}, were trapped \
                 late and may have run \
                 before"
            );
        }
    }

    /// The state a machine is saved with.
    pub fn save(&self) -> TscTrapState {
        self.state.clone()
    }

    /// Goes on from a saved state.
    pub fn restore(&mut self, state: TscTrapState) {
        self.state = state;
    }

    /// Whether an exit may read the counter, so that the clock should be sampled at it.
    pub fn reads_clock(exit: Exit) -> bool {
        matches!(exit, Exit::Pio { port: RDTSC_PORT | RDTSCP_PORT | GP_PORT, .. })
    }

    /// To be called at every synchronous exit, before the devices: keeps the traps in place, and
    /// answers the exit when it is one of them. The counter is `tsc`.
    ///
    /// # Errors
    /// When KVM fails.
    pub fn at_exit(
        &mut self,
        at: Ordinal,
        exit: Exit,
        tsc: u64,
        vcpu: &mut dyn Cpu,
        memory: &Memory,
    ) -> Result<Option<Trap>, CpuError> {
        let sregs = vcpu.exit_sregs()?;
        if self.mode == TscMode::Trap {
            let thoroughly = at.0.is_multiple_of(THOROUGH_EVERY_EXITS);
            Entry::keep(&mut self.state.entry, thoroughly, &sregs, memory);
        }
        let data = match exit {
            Exit::Pio { port: GP_PORT, direction: Direction::Read, size_bytes: 1, count: 1 } => {
                return self.at_gp_port(tsc, &sregs, vcpu, memory);
            }
            Exit::Pio { port: HOOK_PORT, direction: Direction::Read, size_bytes: 1, count: 1 } => {
                return self.at_hook(&sregs, vcpu, memory);
            }
            Exit::Pio { port, direction, size_bytes, count: 1 } => {
                self.look_for_code(at, &sregs, memory);
                self.replaced_instruction(port, direction, size_bytes, tsc, &sregs, vcpu, memory)?
            }
            _ => {
                self.look_for_code(at, &sregs, memory);
                None
            }
        };
        Ok(data)
    }

    /// Whether the guest stands between two instructions of which the second is there only for it:
    /// until it has executed that, no interrupt may lead it elsewhere.
    pub fn holds_interrupts(&self) -> bool {
        self.state.hooks.iter().any(Hook::is_halfway)
    }

    /// To be called at an access to EFER, which every Linux makes when its own page tables are in
    /// use and before it could read the counter. A kernel that is not the one that was patched
    /// is patched now.
    ///
    /// # Errors
    /// When KVM fails.
    pub fn at_efer(&mut self, vcpu: &mut dyn Cpu, memory: &Memory) -> Result<(), CpuError> {
        let mut sregs = vcpu.sregs()?;
        if sregs.cr4 & cr4::TSD == 0 {
            // CR4 was written by code that is not patched.
            self.state.guest_tsd = false;
            sregs.cr4 |= cr4::TSD;
            vcpu.set_sregs(&sregs)?;
        }
        let rip = vcpu.regs()?.rip;
        if privilege(&sregs) != 0 || !kernel::is_kernel_address(rip) || sregs.efer & EFER_LMA == 0 {
            return Ok(());
        }
        let space = AddressSpace::new(memory, &sregs);
        let known = self.state.other_kernel.as_ref().unwrap_or(&self.kernel);
        if known.is_there(|address| space.read(address)) {
            return Ok(());
        }
        let found = late::patch_kernel(&space, memory, rip);
        if found.is_none() && !known.is_marked() {
            return Ok(());
        }
        let kernel = found.unwrap_or_default();
        self.counters.other_kernels += 1;
        self.state.hooks = kernel.hooks.clone();
        self.state.seen = late::Seen::default();
        self.state.other_kernel = Some(kernel);
        Ok(())
    }

    fn look_for_code(&mut self, at: Ordinal, sregs: &kvm_sregs, memory: &Memory) {
        let space = AddressSpace::new(memory, sregs);
        if self.state.seen.due(at, &space) {
            let kernel = self.state.other_kernel.as_ref().unwrap_or(&self.kernel);
            let found = self.state.seen.look(&space, memory, kernel);
            let TscCounters { late_sites, late_addresses, .. } = &mut self.counters;
            *late_sites += found.len() as u64;
            let named = LATE_ADDRESSES_MAX - late_addresses.len();
            late_addresses.extend(found.into_iter().take(named));
            self.state.hooks.iter_mut().for_each(|hook| hook.keep(&space, memory));
        }
    }

    /// The guest stands at a hook: searches what it is about to make executable, and lets it go on
    /// as if nothing had been there.
    fn at_hook(
        &mut self,
        sregs: &kvm_sregs,
        vcpu: &mut dyn Cpu,
        memory: &Memory,
    ) -> Result<Option<Trap>, CpuError> {
        let regs = vcpu.regs()?;
        let is_there = |hook: &&mut Hook| hook.stands_at(regs.rip) && privilege(sregs) == 0;
        let Some(hook) = self.state.hooks.iter_mut().find(is_there) else { return Ok(None) };
        let space = AddressSpace::new(memory, sregs);
        if !hook.is_halfway() {
            let code = hook::new_code(regs.rdi, regs.rsi);
            self.counters.new_sites += late::search(&space, memory, code).len();
        }
        vcpu.pio_data()[0] = regs.rax as u8;
        // The port read must be over before RIP is set to where it stood.
        vcpu.complete_io()?;
        vcpu.set_regs(&regs)?;
        hook.hop(&space, memory);
        Ok(Some(Trap { port: HOOK_PORT, data: regs.rip }))
    }

    #[expect(clippy::too_many_arguments, reason = "one exit and the machine it belongs to")]
    fn replaced_instruction(
        &mut self,
        port: u16,
        direction: Direction,
        size_bytes: u8,
        tsc: u64,
        sregs: &kvm_sregs,
        vcpu: &mut dyn Cpu,
        memory: &Memory,
    ) -> Result<Option<Trap>, CpuError> {
        let data = match (port, direction, size_bytes) {
            (RDTSC_PORT, Direction::Read, 4) => kernel_read(vcpu, tsc, false)?,
            (RDTSCP_PORT, Direction::Read, 4) => kernel_read(vcpu, tsc, true)?,
            (port, direction, 1) if CR4_PORTS.contains(&port) => {
                let number = (port - CR4_PORTS.start) as u8;
                let trapped = match direction {
                    Direction::Read => Trapped::ReadCr4(number),
                    Direction::Write => Trapped::WriteCr4(number),
                };
                if !stands_at(trapped, sregs, vcpu, memory)? {
                    return Ok(None);
                }
                match direction {
                    Direction::Read => cr4::read(vcpu, number, self.state.guest_tsd)?,
                    Direction::Write => {
                        let (value, taken) = cr4::write(vcpu, number)?;
                        if taken {
                            self.state.guest_tsd = value & cr4::TSD != 0;
                        }
                        value
                    }
                }
            }
            _ => return Ok(None),
        };
        Ok(Some(Trap { port, data }))
    }

    fn at_gp_port(
        &mut self,
        tsc: u64,
        sregs: &kvm_sregs,
        vcpu: &mut dyn Cpu,
        memory: &Memory,
    ) -> Result<Option<Trap>, CpuError> {
        let regs = vcpu.regs()?;
        let at_handler = |entry: &&Entry| entry.handler == regs.rip && privilege(sregs) == 0;
        let Some(entry) = self.state.entry.as_ref().filter(at_handler) else { return Ok(None) };
        let emulated = if cr4::answers_users(self.mode, self.state.guest_tsd) {
            user::emulate(&AddressSpace::new(memory, sregs), &regs, sregs, tsc)
        } else {
            None
        };
        let data = match emulated {
            Some(done) => {
                self.counters.user_reads += 1;
                resume_user(vcpu, &done)?;
                tsc
            }
            None => {
                self.counters.passed_gps += 1;
                pass_on(vcpu, sregs, memory, entry)?;
                0
            }
        };
        Ok(Some(Trap { port: GP_PORT, data }))
    }
}

fn privilege(sregs: &kvm_sregs) -> u16 {
    sregs.cs.selector & 3
}

/// Whether the kernel stands at what `trapped` was replaced with, and not at a port access of its
/// own.
fn stands_at(
    trapped: Trapped,
    sregs: &kvm_sregs,
    vcpu: &dyn Cpu,
    memory: &Memory,
) -> Result<bool, CpuError> {
    let rip = vcpu.regs()?.rip;
    let code = AddressSpace::new(memory, sregs).read(rip);
    Ok(privilege(sregs) == 0 && code == Some(trapped.replacement()))
}

/// The kernel's RDTSC: the counter in EDX:EAX; RDTSCP also clears ECX (IA32_TSC_AUX).
fn kernel_read(vcpu: &mut dyn Cpu, tsc: u64, with_aux: bool) -> Result<u64, CpuError> {
    vcpu.pio_data().copy_from_slice(&(tsc as u32).to_le_bytes());
    let mut regs = vcpu.regs()?;
    regs.rdx = tsc >> 32;
    if with_aux {
        regs.rcx = 0;
    }
    vcpu.set_regs(&regs)?;
    Ok(tsc)
}

/// Leaves the #GP handler for the instruction behind the emulated one.
fn resume_user(vcpu: &mut dyn Cpu, done: &user::Emulated) -> Result<(), CpuError> {
    vcpu.set_sregs(&done.sregs)?;
    vcpu.set_regs(&done.regs)?;
    if done.single_stepped {
        let mut debug = vcpu.debug_regs()?;
        debug.dr6 = debug.dr6 & !DR6_BREAKPOINTS | DR6_BS;
        vcpu.set_debug_regs(&debug)?;
        vcpu.raise(DB_VECTOR, None)?;
    }
    // RIP has changed, so the port read is dropped. The call brings the state of IF up to date.
    vcpu.complete_io()
}

/// Lets the handler run as if its own first bytes stood there.
fn pass_on(
    vcpu: &mut dyn Cpu,
    sregs: &kvm_sregs,
    memory: &Memory,
    entry: &Entry,
) -> Result<(), CpuError> {
    let mut regs = vcpu.regs()?;
    vcpu.pio_data()[0] = regs.rax as u8;
    // The port read must be over before RIP is set to where it stood.
    vcpu.complete_io()?;
    let space = AddressSpace::new(memory, sregs);
    let handler = entry.handler_bytes(&space);
    if handler.is_some_and(|bytes| displaced::execute(&bytes, &mut regs, &space, memory)) {
        vcpu.set_regs(&regs)?;
        // The call brings the state of IF up to date.
        return vcpu.complete_io();
    }
    vcpu.set_regs(&regs)?;
    entry.put_back(memory);
    for _ in 0..DISPLACED_INSTRUCTIONS_MAX {
        vcpu.step()?;
        if !entry.holds(vcpu.regs()?.rip) {
            break;
        }
    }
    entry.put(memory);
    Ok(())
}

#[cfg(test)]
mod tests;
