//! Where things lie in a bare guest, and the tables its CPU reads.
//!
//! Virtual addresses equal physical ones, but for [`GAMES`].
//!
//! | address | what | ring 3 |
//! |---|---|---|
//! | 0x10_0000 | `.text`: handlers and blocks, one after the other | |
//! | 0x20_0000 | `.streams`: ring-0 streams | |
//! | 0x40_0000 | the run's state, IDT, GDT, TSS, page tables, stacks | |
//! | 0x60_0000 | scratch memory and user stack, no-execute | read, write |
//! | 0x80_0000 | `.user`: ring-3 streams | execute |
//! | 0xa0_0000 | frames of the page-table games | |
//! | 0xc0_0000 | code that modifies itself | |
//! | 0x4000_0000 | the games' window on those frames | as mapped |

/// Where `.text` begins; the ELF's entry.
pub const TEXT: u64 = 0x10_0000;
/// Where ring-0 streams lie.
pub const STREAMS: u64 = 0x20_0000;
/// State of the run, first of the data.
pub const STATE: u64 = 0x40_0000;
/// Scratch memory of all streams.
pub const SCRATCH: u64 = 0x60_0000;
/// Its size; ring 3 has all of it.
pub const SCRATCH_BYTES: u64 = 0x1_0000;
/// Where ring-3 streams lie.
pub const USER: u64 = 0x80_0000;
/// Frames for the page-table games.
pub const FRAMES: u64 = 0xa0_0000;
/// Self-modifying code.
pub const SMC: u64 = 0xc0_0000;
/// Virtual window of the page-table games.
pub const GAMES: u64 = 0x4000_0000;
/// Pages of the games' window in play.
pub const GAME_PAGES: u64 = 16;
/// Added to [`SCRATCH`], an address that is never mapped.
pub const UNMAPPED: u64 = 0x6000_0000;

const IDT: u64 = STATE + 0x1000;
const GDT: u64 = STATE + 0x2000;
const TSS: u64 = STATE + 0x2100;
/// Page tables.
pub const PML4: u64 = STATE + 0x3000;
const PDPT: u64 = STATE + 0x4000;
const PD_LOW: u64 = STATE + 0x5000;
const PD_GAMES: u64 = STATE + 0x6000;
/// The page table of the games' window.
pub const GAMES_PT: u64 = STATE + 0x7000;
const SCRATCH_PT: u64 = STATE + 0x8000;
const TABLES_END: u64 = STATE + 0x9000;
/// Stack of ring 0, downward.
pub const KERNEL_STACK: u64 = STATE + 0x2_0000;
const INTERRUPT_STACK: u64 = STATE + 0x4_0000;
const DOUBLE_FAULT_STACK: u64 = STATE + 0x3_0000;
/// Stack of ring 3, downward, the upper half of the scratch memory.
pub const USER_STACK: u64 = SCRATCH + SCRATCH_BYTES - 64;

/// Where LGDT and LIDT find their operands.
pub const GDT_POINTER: u64 = STATE + 0xf00;
/// See [`GDT_POINTER`].
pub const IDT_POINTER: u64 = STATE + 0xf10;

/// Fields of the state, as offsets from [`STATE`].
pub mod field {
    /// The running hash of all the guest sees.
    pub const STIR: u64 = 0;
    /// First address of the running stream.
    pub const START: u64 = 0x8;
    /// Its length in bytes.
    pub const LENGTH: u64 = 0x10;
    /// Where to go when the stream is over or given up.
    pub const AFTER: u64 = 0x18;
    /// Faults the stream may still have.
    pub const PATIENCE: u64 = 0x20;
    /// Timer interrupts.
    pub const TICKS: u64 = 0x28;
    /// Bytes to print at the end.
    pub const TEXT: u64 = 0x40;
    /// How often each vector came, 8 bytes each.
    pub const COUNTS: u64 = 0x100;
}

/// Kernel code, as at entry (`vmm/machine/src/boot/load.rs`).
pub const KERNEL_CODE: u16 = 0x10;
/// Kernel data.
pub const KERNEL_DATA: u16 = 0x18;
/// User data with its RPL.
pub const USER_DATA: u16 = 0x23;
/// User code with its RPL.
pub const USER_CODE: u16 = 0x2b;
/// The task state segment.
pub const TASK: u16 = 0x30;
/// IA32_STAR for SYSCALL (AMD APM vol. 2 section 6.1.1): kernel code in bits 47:32, what SYSRET
/// would load in 63:48.
pub const STAR: u64 = (KERNEL_CODE as u64) << 32 | (KERNEL_DATA as u64 | 3) << 48;

/// The vector with which ring 3 ends a stream.
pub const LEAVE: u8 = 0x80;
const DOUBLE_FAULT: u8 = 8;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER_PAGE: u64 = 4;
const LARGE: u64 = 1 << 7;
/// Not to be executed from.
pub const NO_EXECUTE: u64 = 1 << 63;

const PAGE_BYTES: u64 = 0x1000;
const LARGE_BYTES: u64 = 0x20_0000;
const MEMORY_BYTES: u64 = 32 << 20;

/// Builds the data segment at [`STATE`]: descriptor tables, TSS and page tables; `vectors` are the
/// handlers' addresses.
pub fn tables(vectors: &[u64; 256]) -> Vec<u8> {
    let mut data = vec![0; (TABLES_END - STATE) as usize];
    let mut put = |address: u64, bytes: &[u8]| {
        let at = (address - STATE) as usize;
        data[at..at + bytes.len()].copy_from_slice(bytes);
    };
    for (address, base, limit) in [(GDT_POINTER, GDT, 0x3f_u16), (IDT_POINTER, IDT, 0xfff)] {
        put(address, &limit.to_le_bytes());
        put(address + 2, &base.to_le_bytes());
    }
    for (vector, &handler) in (0_u8..=255).zip(vectors) {
        put(IDT + u64::from(vector) * 16, &gate(vector, handler));
    }
    // Descriptors as AMD APM vol. 2 section 4.8 packs them.
    let task = 0x0000_8900_0000_0067 | (TSS & 0xff_ffff) << 16;
    let user_data = 0x00cf_f300_0000_ffff;
    let user_code = 0x00af_fb00_0000_ffff;
    let descriptors =
        [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, user_data, user_code, task, 0];
    for (at, descriptor) in (GDT..).step_by(8).zip(descriptors) {
        put(at, &u64::to_le_bytes(descriptor));
    }
    put(TSS + 4, &INTERRUPT_STACK.to_le_bytes());
    put(TSS + 0x24, &DOUBLE_FAULT_STACK.to_le_bytes());
    // No I/O permission map: ring 3 has no port.
    put(TSS + 0x66, &0x68_u16.to_le_bytes());
    put(PML4, &(PDPT | PRESENT | WRITABLE | USER_PAGE).to_le_bytes());
    for (at, directory) in [(PDPT, PD_LOW), (PDPT + 8, PD_GAMES)] {
        put(at, &(directory | PRESENT | WRITABLE | USER_PAGE).to_le_bytes());
    }
    put(PD_GAMES, &(GAMES_PT | PRESENT | WRITABLE | USER_PAGE).to_le_bytes());
    for page in (0..MEMORY_BYTES).step_by(LARGE_BYTES as usize) {
        let entry = match page {
            SCRATCH => SCRATCH_PT | PRESENT | WRITABLE | USER_PAGE,
            USER => page | PRESENT | LARGE | USER_PAGE,
            _ => page | PRESENT | LARGE | WRITABLE,
        };
        put(PD_LOW + page / LARGE_BYTES * 8, &entry.to_le_bytes());
    }
    for page in (SCRATCH..SCRATCH + SCRATCH_BYTES).step_by(PAGE_BYTES as usize) {
        let entry = page | PRESENT | WRITABLE | USER_PAGE | NO_EXECUTE;
        put(SCRATCH_PT + (page - SCRATCH) / PAGE_BYTES * 8, &entry.to_le_bytes());
    }
    data
}

/// An interrupt gate (AMD APM vol. 2 section 4.8.4); ring 3 may call [`LEAVE`], breakpoint and
/// overflow.
fn gate(vector: u8, handler: u64) -> [u8; 16] {
    let privilege = if matches!(vector, LEAVE | 3 | 4) { 0x60 } else { 0 };
    let stack = u8::from(vector == DOUBLE_FAULT);
    let mut gate = [0; 16];
    gate[..2].copy_from_slice(&(handler as u16).to_le_bytes());
    gate[2..4].copy_from_slice(&KERNEL_CODE.to_le_bytes());
    gate[4] = stack;
    gate[5] = 0x8e | privilege;
    gate[6..8].copy_from_slice(&((handler >> 16) as u16).to_le_bytes());
    gate
}
