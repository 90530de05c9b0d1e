//! The micro-guests, assembled by the compiler and copied from this program's image into guest
//! memory.
//!
//! Every program is position-independent apart from the fixed addresses in [`layout`], runs in ring
//! 0 and in ring 3 (with IOPL 3, so that port I/O is allowed there) and tells its result in
//! registers at an `out REPORT, al`. Programs are data here: they are never executed by this
//! process.

use std::arch::global_asm;

/// Where things lie in the guest, and the ports it speaks on. The first 4 MiB of addresses are
/// mapped one to one, readable and writable in both rings; the lowest part of them is memory.
pub mod layout {
    /// All the guest's memory.
    pub const MEMORY_BYTES: u64 = 0x8_0000;
    /// Global descriptor table.
    pub const GDT: u64 = 0x1000;
    /// Interrupt descriptor table.
    pub const IDT: u64 = 0x2000;
    /// Task state segment: only RSP0 is used.
    pub const TSS: u64 = 0x3000;
    /// First of three page-table pages: PML4, PDPT, PD.
    pub const PAGE_TABLES: u64 = 0x4000;
    /// Entry stubs of the 32 exceptions.
    pub const EXCEPTION_STUBS: u64 = 0x7000;
    /// The handler of [`INTERRUPT_VECTOR`].
    pub const INTERRUPT_HANDLER: u64 = 0x7800;
    /// Stack the CPU switches to when ring 3 is interrupted.
    pub const KERNEL_STACK_TOP: u64 = 0x9000;
    /// Stack a program starts with.
    pub const STACK_TOP: u64 = 0xb000;
    /// Where a program is loaded and starts.
    pub const CODE: u64 = 0x1_0000;
    /// Memory for programs to work on.
    pub const DATA: u64 = 0x2_0000;
    /// Counters of the interrupt handler: interrupts taken, and the sum of the RIPs it interrupted.
    pub const TICKS: u64 = 0x1_f000;
    /// An address without memory: every access is an MMIO exit.
    pub const MMIO: u64 = 0x20_0000;

    /// Written when a program has its result.
    pub const REPORT: u8 = 0x10;
    /// Read when a program wants a value.
    pub const ASK: u8 = 0x11;
    /// `EXCEPTION + vector` is written when the guest takes an exception.
    pub const EXCEPTION: u8 = 0x80;
    /// The interrupt the host injects.
    pub const INTERRUPT_VECTOR: u8 = 0x40;
}

/// `program!(name, "line"… , operand = value…)`: assembles the lines (Intel syntax) into this
/// program's read-only data and defines `fn name() -> &'static [u8]` that gives the machine code.
macro_rules! program {
    ($(#[$doc:meta])* $name:ident: $($line:literal)+ $(; $($operand:ident = $value:expr),+)?) => {
        global_asm!(
            ".pushsection .rodata.ftvmm_doctor,\"a\",@progbits",
            concat!("ftvmm_doctor_", stringify!($name), ":"),
            $($line,)+
            concat!("ftvmm_doctor_", stringify!($name), "_end:"),
            concat!(".globl ftvmm_doctor_", stringify!($name)),
            concat!(".globl ftvmm_doctor_", stringify!($name), "_end"),
            ".popsection",
            $($($operand = const $value,)+)?
        );
        $(#[$doc])*
        pub fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("ftvmm_doctor_", stringify!($name))]
                static START: u8;
                #[link_name = concat!("ftvmm_doctor_", stringify!($name), "_end")]
                static END: u8;
            }
            let (start, end) = (&raw const START, &raw const END);
            // SAFETY: the two labels enclose the bytes assembled above, in read-only data that
            // lives as long as the process.
            unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
        }
    };
}

program!(
    /// CPUID of the leaf in EAX and subleaf in ECX; for ever.
    cpuid:
    "2:"
    "cpuid"
    "out {report}, al"
    "jmp 2b";
    report = layout::REPORT
);

program!(
    /// Reads the time-stamp counter.
    rdtsc:
    "rdtsc"
    "out {report}, al";
    report = layout::REPORT
);

program!(
    /// Straight-line code for single steps: register, stack, memory, jump, an instruction KVM
    /// intercepts and one of two operands. Leaves 5 in RBX, 5 at DATA and 7 in RSI.
    steps:
    "mov eax, 1"
    "lea rbx, [rax + rax*4]"
    "push rbx"
    "pop rsi"
    "mov qword ptr [{data}], rsi"
    "xor edi, edi"
    "jmp 2f"
    "2:"
    "push rbx"
    "cpuid"
    "pop rbx"
    "nop"
    "add rsi, 2"
    "out {report}, al";
    data = layout::DATA,
    report = layout::REPORT
);

program!(
    /// Writes to four pages and reads a fifth, reports; then writes to one of them again, reads the
    /// others and reports.
    dirty_pages:
    "mov edi, {data}"
    "mov byte ptr [rdi], 1"
    "mov qword ptr [rdi + 0x3ff8], 2"
    "mov dword ptr [rdi + 0x10ffe], 3" // crosses from page 0x10 into page 0x11
    "mov rax, [rdi + 0x20000]"
    "out {report}, al"
    "mov byte ptr [rdi + 0x3000], 4"
    "mov rax, [rdi]"
    "mov rax, [rdi + 0x10ffe]"
    "mov rax, [rdi + 0x20000]"
    "out {report}, al";
    data = layout::DATA,
    report = layout::REPORT
);

program!(
    /// What a kernel's RDTSC becomes: a port read whose answer comes in EAX and RDX.
    ask:
    "in eax, {ask}"
    "out {report}, al";
    ask = layout::ASK,
    report = layout::REPORT
);

program!(
    /// Halts, then reports.
    halt:
    "hlt"
    "out {report}, al";
    report = layout::REPORT
);

program!(
    /// Reads a doubleword where there is no memory, adds one and writes it eight bytes further.
    mmio:
    "mov edi, {mmio}"
    "mov eax, [rdi]"
    "add eax, 1"
    "mov [rdi + 8], eax"
    "out {report}, al";
    mmio = layout::MMIO,
    report = layout::REPORT
);

program!(
    /// Loads x87 and SSE registers, halts; then stores them at DATA and reports.
    fpu:
    "fninit"
    "fldpi"
    "fld1"
    "mov rax, 0x0123456789abcdef"
    "movq xmm0, rax"
    "pshufd xmm15, xmm0, 0x11"
    "mov dword ptr [{data}], 0x7f80" // all exceptions masked, round towards zero
    "ldmxcsr [{data}]"
    "hlt"
    "mov edi, {data}"
    "fstp tbyte ptr [rdi]"
    "fstp tbyte ptr [rdi + 16]"
    "movdqu [rdi + 32], xmm0"
    "movdqu [rdi + 48], xmm15"
    "stmxcsr [rdi + 64]"
    "out {report}, al";
    data = layout::DATA,
    report = layout::REPORT
);

program!(
    /// Loads an integer into an x87 register, stores the x87 environment, reports; stores it again
    /// behind the first and reports.
    x87_environments:
    "fninit"
    "mov edi, {data}"
    "fild dword ptr [rdi]"
    "fnstenv [rdi + 0x40]"
    "out {report}, al"
    "mov edi, {data}"
    "fnstenv [rdi + 0x80]"
    "out {report}, al";
    data = layout::DATA,
    report = layout::REPORT
);

program!(
    /// Asks for a value, mixes it into a state in RBX and scatters the state over 256 KiB at DATA,
    /// reports; for ever.
    mix:
    "mov edi, {data}"
    "mov ebx, 1"
    "2:"
    "in eax, {ask}"
    "add rbx, rax"
    "mov ecx, 32"
    "3:"
    "imul rbx, rbx, 0x5851f42d"
    "add rbx, 12345"
    "mov rdx, rbx"
    "shr rdx, 40"
    "and edx, 0x3fff8"
    "xor [rdi + rdx], rbx"
    "dec ecx"
    "jnz 3b"
    "out {report}, al"
    "jmp 2b";
    data = layout::DATA,
    ask = layout::ASK,
    report = layout::REPORT
);

program!(
    /// The interrupt handler: counts, adds up the interrupted RIPs, returns.
    interrupt_handler:
    "push rax"
    "mov rax, [rsp + 8]"
    "add qword ptr [{ticks}], 1"
    "add qword ptr [{ticks} + 8], rax"
    "pop rax"
    "iretq";
    ticks = layout::TICKS
);

program!(
    /// Counts RCX down to zero, two instructions a round; then reports.
    count_down:
    "2:"
    "dec rcx"
    "jnz 2b"
    "out {report}, al";
    report = layout::REPORT
);

program!(
    /// Reports for ever.
    report_for_ever:
    "2:"
    "out {report}, al"
    "jmp 2b";
    report = layout::REPORT
);

program!(
    /// INT3; the guest's own handler of vector 3 reports.
    int3:
    "int3"
    "hlt"
);

program!(
    /// POPCNT of 0xff00ff: 16 in RAX.
    popcnt:
    "mov ecx, 0xff00ff"
    "popcnt rax, rcx"
    "out {report}, al";
    report = layout::REPORT
);

program!(
    /// CMPXCHG16B of zero against zeroed memory at DATA; leaves 16, the low half of the new value,
    /// in RAX.
    cmpxchg16b:
    "xor eax, eax"
    "xor edx, edx"
    "mov ebx, 16"
    "mov ecx, 17"
    "mov edi, {data}"
    "lock cmpxchg16b [rdi]"
    "mov rax, [rdi]"
    "out {report}, al";
    data = layout::DATA,
    report = layout::REPORT
);

program!(
    /// FXSAVE, spoil, FXRSTOR: 16, the value before, in RAX.
    fxrstor:
    "mov eax, 16"
    "movq xmm3, rax"
    "mov edi, {data}"
    "fxsave64 [rdi]"
    "pxor xmm3, xmm3"
    "fxrstor64 [rdi]"
    "movq rax, xmm3"
    "out {report}, al";
    data = layout::DATA,
    report = layout::REPORT
);

program!(
    /// XSAVE, spoil, XRSTOR of x87 and SSE state: 16, the value before, in RAX. Wants CR4.OSXSAVE.
    xrstor:
    "mov eax, 16"
    "movq xmm3, rax"
    "mov edi, {data}"
    "mov eax, 3"
    "xor edx, edx"
    "xsave64 [rdi]"
    "pxor xmm3, xmm3"
    "xrstor64 [rdi]"
    "movq rax, xmm3"
    "out {report}, al";
    data = layout::DATA,
    report = layout::REPORT
);

program!(
    /// Stores its state with XSAVE at DATA in nine situations: fresh; x87 used; SSE used; AVX used;
    /// after VZEROUPPER; all registers back at their initial values; after XRSTOR of the first
    /// image; of the fourth; x87 alone. Wants CR4.OSXSAVE.
    xsave_images:
    "xor ecx, ecx"
    "xor edx, edx"
    "mov eax, 7"
    "xsetbv"
    "mov edi, {data}"
    "xsave64 [rdi]"
    "fninit"
    "fld1"
    "xsave64 [rdi + 0x400]"
    "mov esi, 0x12345678"
    "movq xmm5, rsi"
    "xsave64 [rdi + 0x800]"
    "vpcmpeqd ymm6, ymm6, ymm6"
    "xsave64 [rdi + 0xc00]"
    "vzeroupper"
    "xsave64 [rdi + 0x1000]"
    "vzeroall"
    "fninit"
    "xsave64 [rdi + 0x1400]"
    "xrstor64 [rdi]"
    "xsave64 [rdi + 0x1800]"
    "xrstor64 [rdi + 0xc00]"
    "xsave64 [rdi + 0x1c00]"
    "mov eax, 1"
    "xsave64 [rdi + 0x2000]"
    "out {report}, al";
    data = layout::DATA,
    report = layout::REPORT
);

program!(
    /// Reads the MSR in ECX; reports with it in EDX:EAX.
    rdmsr:
    "rdmsr"
    "out {report}, al";
    report = layout::REPORT
);

program!(
    /// RDRAND.
    rdrand:
    "rdrand rax"
    "out {report}, al";
    report = layout::REPORT
);

program!(
    /// RDSEED.
    rdseed:
    "rdseed rax"
    "out {report}, al";
    report = layout::REPORT
);

program!(
    /// RDPID.
    rdpid:
    "rdpid rax"
    "out {report}, al";
    report = layout::REPORT
);

program!(
    /// RDPMC of counter 0.
    rdpmc:
    "xor ecx, ecx"
    "rdpmc"
    "out {report}, al";
    report = layout::REPORT
);
