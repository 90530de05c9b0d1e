//! Pages to put machine code into, and the signals it ends in.

use std::arch::asm;
use std::cell::RefCell;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
const PAGES: usize = 3;
/// Offsets in the first page for [`CodePages::call_narrow`]: its stack's top, the saved RSP and the
/// far pointer.
const STACK_TOP: usize = 0xf00;
const SAVED_RSP: usize = 0xf00;
const FAR_POINTER: usize = 0xf10;

/// The registers RDTSC and RDTSCP write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
}

/// Executable pages in the first 2 GiB; they stay mapped.
#[derive(Clone, Copy)]
pub struct CodePages {
    start: NonNull<u8>,
}

impl CodePages {
    pub fn map() -> std::io::Result<Self> {
        let length = NonZeroUsize::new(PAGES * PAGE_BYTES).unwrap_or(NonZeroUsize::MIN);
        let all = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE | ProtFlags::PROT_EXEC;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_32BIT;
        // SAFETY: a new mapping wherever the kernel likes overlaps nothing.
        let start = unsafe { mmap_anonymous(None, length, all, flags) }?;
        Ok(Self { start: start.cast() })
    }

    /// The address of a byte.
    pub fn address(&self, offset: usize) -> u64 {
        self.start.as_ptr() as u64 + offset as u64
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= PAGES * PAGE_BYTES);
        // SAFETY: the range lies in the mapping, which nothing else points into.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.start.as_ptr().add(offset),
                bytes.len(),
            );
        }
    }

    /// Puts `code`, which ends with a return, at `offset` and calls it with RAX, RCX and RDX all
    /// ones.
    pub fn call(&self, offset: usize, code: &[u8]) -> Registers {
        self.write(offset, code);
        let (mut rax, mut rcx, mut rdx) = (u64::MAX, u64::MAX, u64::MAX);
        // SAFETY: the callers' code returns, keeps the stack, and touches no registers but these
        // and RBX.
        unsafe {
            asm!(
                "push rbx",
                "call {code}",
                "pop rbx",
                code = in(reg) self.address(offset),
                inout("rax") rax,
                inout("rcx") rcx,
                inout("rdx") rdx,
            );
        }
        Registers { rax, rcx, rdx }
    }

    /// Lets the local descriptor table's first entry be 16-bit code that starts with these pages;
    /// false when the kernel has no such thing.
    pub fn make_16_bit_segment(&self) -> bool {
        // struct user_desc (arch/x86/include/uapi/asm/ldt.h): entry, base, limit, and contents 2
        // (code) in bits 1 and 2 of the flags.
        let descriptor = [0u32, self.address(0) as u32, 0xffff, 2 << 1];
        const WRITE: libc::c_long = 0x11;
        // SAFETY: the call reads the sixteen bytes given.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_modify_ldt,
                WRITE,
                descriptor.as_ptr(),
                size_of_val(&descriptor),
            )
        };
        answer == 0
    }

    /// Runs `code`, which neither ends nor uses the stack, in the segment `selector`, `bits` wide,
    /// and comes back through `home`.
    pub fn call_narrow(&self, selector: u16, bits: u32, home: u16, code: &[u8]) -> Registers {
        let low = |offset: usize| (self.address(offset) as u32).to_le_bytes();
        let mut program = vec![0x48, 0x89, 0x24, 0x25]; // mov [saved], rsp
        program.extend(low(SAVED_RSP));
        program.push(0xbc); // mov esp, stack
        program.extend(low(STACK_TOP));
        program.extend([0xff, 0x2c, 0x25]); // jmp far [pointer]
        program.extend(low(FAR_POINTER));
        let target =
            if bits == 16 { program.len() as u32 } else { self.address(program.len()) as u32 };
        program.extend(code);
        if bits == 16 {
            program.push(0x66);
        }
        program.push(0xea); // jmp far home:back
        let back = program.len() + 6;
        program.extend(low(back));
        program.extend(home.to_le_bytes());
        program.extend([0x48, 0x8b, 0x24, 0x25]); // mov rsp, [saved]
        program.extend(low(SAVED_RSP));
        program.push(0xc3);
        self.write(FAR_POINTER, &[&target.to_le_bytes()[..], &selector.to_le_bytes()].concat());
        self.call(0, &program)
    }
}

thread_local! {
    static STOPS: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
    static SKIP_BYTES: RefCell<usize> = const { RefCell::new(0) };
}

/// Notes where the signal came and, after a fault, goes on behind the instruction. It runs on the
/// thread whose code raised it, at an instruction of that code, never within a borrow.
extern "C" fn on_stop(signal: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: a handler with SA_SIGINFO gets a ucontext_t that is its own until it returns.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let rip = &mut context.uc_mcontext.gregs[libc::REG_RIP as usize];
    STOPS.with_borrow_mut(|stops| stops.push(*rip as u64));
    if signal == libc::SIGSEGV {
        SKIP_BYTES.with_borrow(|bytes| *rip += *bytes as i64);
    }
}

fn stops_during(signal: Signal, run: impl FnOnce() -> Registers) -> Vec<u64> {
    let action =
        SigAction::new(SigHandler::SigAction(on_stop), SaFlags::SA_SIGINFO, SigSet::empty());
    STOPS.with_borrow_mut(|stops| {
        stops.clear();
        // The handler must not allocate.
        stops.reserve(64);
    });
    // SAFETY: the handler touches only this thread's list and the context it is given.
    if unsafe { sigaction(signal, &action) }.is_err() {
        return Vec::new();
    }
    run();
    STOPS.take()
}

/// Where the program stopped after each instruction it executed with the trap flag set.
pub fn steps_during(run: impl FnOnce() -> Registers) -> Vec<u64> {
    stops_during(Signal::SIGTRAP, run)
}

/// Where the program faulted; each time it goes on `skip_bytes` further.
pub fn faults_during(skip_bytes: usize, run: impl FnOnce() -> Registers) -> Vec<u64> {
    SKIP_BYTES.set(skip_bytes);
    stops_during(Signal::SIGSEGV, run)
}
