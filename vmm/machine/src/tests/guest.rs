//! A guest of a few pages of memory whose kernel is a few bytes.

use std::rc::Rc;

use ftvmm_devices::{Board, BoardConfig, NetConfig, virtio_slots};
use ftvmm_replication::{OnPanic, OnReset, Ordinal, TscMode};
use linux_loader::bootparam::setup_header;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Did, FakeCpu, FakeLog, copied};
use crate::boot::{BootImage, BootPlan, KernelImage};
use crate::cpu::Cpu;
use crate::exit::{Direction, Exit};
use crate::machine::{Machine, Start, act_as_firmware};
use crate::memory::Memory;
use crate::msr::{MsrAnswer, MsrBank};
use crate::page_tracker::PageTracker;
use crate::tsc::TscTrap;
use crate::vcpu_state::VcpuState;
use crate::virtual_machine::{Handled, VirtualMachine};

/// The guest's memory.
pub const MEMORY_BYTES: usize = 4 << 20;
/// Where its kernel is loaded and entered.
pub const ENTRY: u64 = 0x20_0000;
/// Where its code lies in the file of [`elf`].
const CODE_OFFSET: usize = 0x1000;

/// An ELF file of one executable segment and section that is loaded at [`ENTRY`].
pub fn elf(code: &[u8]) -> Vec<u8> {
    elf_with(code, ENTRY, 6, 1)
}

/// As [`elf`], with this address and these flags and type of the section.
pub fn elf_with(code: &[u8], address: u64, flags: u64, kind: u32) -> Vec<u8> {
    let names = b"\0.text\0";
    let (names_offset, sections) = (CODE_OFFSET + code.len(), CODE_OFFSET + code.len() + 16);
    let mut file = vec![0; CODE_OFFSET];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    // ELF64, little-endian; an executable for x86-64.
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &ENTRY.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(40, &(sections as u64).to_le_bytes());
    // Header 64 bytes; one program header of 56; three section headers of 64, names in the third.
    put(52, &[64, 0, 56, 0, 1, 0, 64, 0, 3, 0, 2, 0]);
    let length = code.len() as u64;
    let segment = [1 | 5 << 32, CODE_OFFSET as u64, ENTRY, ENTRY, length, length, 0x1000];
    put(64, &segment.map(u64::to_le_bytes).concat());
    file.extend(code);
    file.extend(names);
    file.resize(sections + 64, 0);
    let section = |name: u64, kind: u64, flags: u64, address: u64, offset: u64, bytes: u64| {
        [name | kind << 32, flags, address, offset, bytes, 0, 0, 0].map(u64::to_le_bytes).concat()
    };
    file.extend(section(1, kind.into(), flags, address, CODE_OFFSET as u64, length));
    file.extend(section(0, 3, 0, 0, names_offset as u64, names.len() as u64));
    file
}

/// The guest writes to its memory: this program's own bitmap does not see it, the log does.
pub fn guest_writes(memory: &Memory, log: &FakeLog, address: u64, bytes: &[u8]) {
    for (at, byte) in (address..).zip(bytes) {
        let mut regions = memory.iter().enumerate();
        let (slot, region) = regions.find(|(_, region)| region.last_addr().0 >= at).unwrap();
        let place = memory.get_host_address(GuestAddress(at)).unwrap();
        // SAFETY: the byte lies in a mapping that `memory` keeps, and this test has no other
        // thread and no slice of it.
        unsafe { place.write(*byte) };
        log.mark(slot as u32, ((at - region.start_addr().0) / 4096) as usize);
    }
}

/// A machine and what the test does with it.
pub struct Guest {
    pub machine: Machine<FakeCpu>,
    pub memory: Rc<Memory>,
    pub log: FakeLog,
    at: u64,
}

impl Guest {
    /// A guest with a log that ends when it resets or panics.
    pub fn new() -> Self {
        Self::with(OnReset::End, OnPanic::End)
    }

    /// A guest with a log.
    pub fn with(on_reset: OnReset, on_panic: OnPanic) -> Self {
        Self::made(on_reset, on_panic, true)
    }

    /// A guest whose memory nobody tracks.
    pub fn without_log() -> Self {
        Self::made(OnReset::End, OnPanic::End, false)
    }

    fn made(on_reset: OnReset, on_panic: OnPanic, tracked: bool) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        let memory = Rc::new(memory);
        let cpu = FakeCpu { memory: Some(memory.clone()), ..Default::default() };
        // rdtsc ; hlt
        let kernel = KernelImage { elf: elf(&[0x0f, 0x31, 0xf4]), header: setup_header::default() };
        let net = NetConfig { mac: [2, 0, 0, 0, 0, 1], mtu: 1500 };
        let config =
            BoardConfig { rtc_epoch_s: 1_000_000_000, net: Some(net), disk_bytes: Some(1 << 20) };
        let image = BootImage::new(BootPlan {
            kernel,
            initramfs: None,
            cmdline: "console=ttyS0".into(),
            virtio_slots: virtio_slots(&config),
        });
        let power_on = VcpuState { msrs: vec![0; 9], ..Default::default() };
        *cpu.state.borrow_mut() = copied(&power_on);
        image.load(&memory, &cpu).unwrap();
        let mut board = Board::new(&config);
        act_as_firmware(&mut board);
        let tsc = TscTrap::new(TscMode::Trap, image.code().clone());
        let log = FakeLog::default();
        let pages =
            tracked.then(|| PageTracker::new(Box::new(log.clone()), memory.clone()).unwrap());
        let msrs =
            MsrBank::new([(0x10, MsrAnswer::Clock), (0x1b, MsrAnswer::Value(7))].into_iter());
        let start = Start { image, vcpu: power_on, on_reset, on_panic };
        let machine = Machine::new(cpu, memory.clone(), board, tsc, msrs, pages, start);
        Self { machine, memory, log, at: 0 }
    }

    /// The ordinal of the last exit.
    pub fn at(&self) -> Ordinal {
        Ordinal(self.at)
    }

    /// The guest stops for `exit` with this data, and is answered.
    pub fn exit_with(&mut self, exit: Exit, data: &[u8]) -> Handled {
        self.at += 1;
        self.machine.vcpu().stand_at(exit, data);
        self.machine.handle(Ordinal(self.at), exit).unwrap()
    }

    /// As [`Self::exit_with`], without data.
    pub fn exit(&mut self, exit: Exit) -> Handled {
        self.exit_with(exit, &[])
    }

    /// `OUT` of one byte.
    pub fn out(&mut self, port: u16, byte: u8) -> Handled {
        let exit = Exit::Pio { port, direction: Direction::Write, size_bytes: 1, count: 1 };
        self.exit_with(exit, &[byte])
    }

    /// `IN` of one byte.
    pub fn read(&mut self, port: u16) -> u8 {
        let exit = Exit::Pio { port, direction: Direction::Read, size_bytes: 1, count: 1 };
        self.exit_with(exit, &[0]);
        self.machine.vcpu().data[0]
    }

    /// A write of 32 bits to a device.
    pub fn mmio_out(&mut self, addr: u64, value: u32) -> Handled {
        let exit = Exit::Mmio { addr, direction: Direction::Write, size_bytes: 4 };
        self.exit_with(exit, &value.to_le_bytes())
    }

    /// A read of 32 bits from a device.
    pub fn mmio_read(&mut self, addr: u64) -> u32 {
        let exit = Exit::Mmio { addr, direction: Direction::Read, size_bytes: 4 };
        self.exit_with(exit, &[0; 4]);
        u32::from_le_bytes(self.machine.vcpu().data[..].try_into().unwrap())
    }

    /// Sets or clears the guest's interrupt flag.
    pub fn enable_interrupts(&mut self, enabled: bool) {
        let cpu = self.machine.vcpu();
        let mut regs = cpu.regs().unwrap();
        regs.rflags = if enabled { 0x202 } else { 2 };
        cpu.set_regs(&regs).unwrap();
    }

    /// What was done to the processor since the last call.
    pub fn take_did(&mut self) -> Vec<Did> {
        self.machine.vcpu().take_did()
    }

    /// Eight bytes of memory.
    pub fn memory_bytes(&self, address: u64) -> [u8; 8] {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    /// The guest writes to its memory.
    pub fn writes(&self, address: u64, bytes: &[u8]) {
        guest_writes(&self.memory, &self.log, address, bytes);
    }
}
