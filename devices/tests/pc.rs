//! The board as Linux drives it on a PC without APIC: the port sequences of
//! `arch/x86/kernel/i8259.c`, `drivers/clocksource/i8253.c` and `drivers/tty/serial/8250`.

#![allow(clippy::unwrap_used, reason = "the memory below is the test's own")]

use ftvmm_devices::{Board, BoardConfig, FLOATING_BUS, Input, Output, PowerEvent};
use vm_memory::{GuestAddress, GuestMemoryMmap};

const NS_PER_MS: u64 = 1_000_000;
const EPOCH_S: u64 = 1_700_000_000;
/// Vector of IRQ0 as Linux sets it up.
const VECTOR_BASE: u8 = 0x30;

struct Pc {
    board: Board,
    mem: GuestMemoryMmap,
}

impl Pc {
    fn new() -> Pc {
        let config = BoardConfig { rtc_epoch_s: EPOCH_S, net: None, disk_bytes: None };
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        Pc { board: Board::new(&config), mem }
    }

    fn inb(&mut self, port: u16) -> u8 {
        let mut data = [0];
        self.board.pio_read(port, &mut data);
        data[0]
    }

    fn outb(&mut self, value: u8, port: u16) {
        self.board.pio_write(port, &[value]);
    }

    fn at(&mut self, now_ns: u64) {
        self.board.apply(&self.mem, Input::Time { now_ns });
    }

    fn type_bytes(&mut self, bytes: &[u8]) {
        self.board.apply(&self.mem, Input::ConsoleRx { bytes: bytes.to_vec() });
    }

    /// init_8259A(0)
    fn init_pic(&mut self) {
        self.outb(0xff, 0x21);
        for (value, port) in [
            (0x11, 0x20),
            (VECTOR_BASE, 0x21),
            (0x04, 0x21),
            (0x01, 0x21),
            (0x11, 0xa0),
            (VECTOR_BASE + 8, 0xa1),
            (0x02, 0xa1),
            (0x01, 0xa1),
        ] {
            self.outb(value, port);
        }
        self.outb(0xfb, 0x21);
        self.outb(0xff, 0xa1);
    }

    fn unmask(&mut self, irq: u8) {
        let mask = self.inb(0x21) & !(1 << irq);
        self.outb(mask, 0x21);
    }

    /// pit_set_periodic() at `hz`
    fn init_pit(&mut self, hz: u32) {
        let latch = ((1_193_182 + hz / 2) / hz) as u16;
        self.outb(0x34, 0x43);
        self.outb(latch as u8, 0x40);
        self.outb((latch >> 8) as u8, 0x40);
    }

    /// handle_level_irq() around a handler: mask_and_ack_8259A, the handler, unmask.
    fn take_irq(&mut self, handler: impl FnOnce(&mut Pc)) -> Option<u8> {
        let irq = self.board.acknowledge_interrupt()? - VECTOR_BASE;
        let mask = self.inb(0x21);
        self.outb(mask | 1 << irq, 0x21);
        self.outb(0x60 + irq, 0x20);
        handler(self);
        self.outb(mask, 0x21);
        Some(irq)
    }

    fn take_outputs(&mut self) -> Vec<Output> {
        self.board.take_outputs()
    }
}

#[test]
fn every_jiffy_arrives_however_late_the_guest_looks() {
    for step_ns in [NS_PER_MS / 10, 3 * NS_PER_MS, 77 * NS_PER_MS, 900 * NS_PER_MS] {
        let mut pc = Pc::new();
        pc.init_pic();
        pc.unmask(0);
        pc.init_pit(250);
        let mut jiffies = 0;
        let mut now_ns = 0;
        while now_ns < 9_000 * NS_PER_MS {
            now_ns += step_ns;
            pc.at(now_ns);
            while let Some(irq) = pc.take_irq(|_| {}) {
                assert_eq!(irq, 0);
                jiffies += 1;
            }
        }
        // Linux's latch at 250 Hz is 4773, and the first count is loaded one clock after it was
        // written.
        let ticks = now_ns as u128 * 1_193_182 / 1_000_000_000;
        assert_eq!(jiffies, (ticks - 1) / 4773, "step of {step_ns} ns");
    }
}

#[test]
fn ticks_let_other_interrupts_go_first() {
    let mut pc = Pc::new();
    pc.init_pic();
    pc.unmask(0);
    pc.unmask(4);
    pc.outb(0x01, 0x3f9);
    pc.init_pit(100);
    pc.at(55 * NS_PER_MS);
    let mut typed = Vec::new();
    let mut take_all = |pc: &mut Pc| -> Vec<_> {
        std::iter::from_fn(|| pc.take_irq(|pc| serial_handler(pc, &mut typed))).collect()
    };
    assert_eq!(pc.take_irq(|_| {}), Some(0));
    pc.type_bytes(b"?");
    assert_eq!(take_all(&mut pc), [4, 0, 0, 0, 0], "the second tick had been raised before");
    pc.type_bytes(b"!");
    pc.at(65 * NS_PER_MS);
    assert_eq!(take_all(&mut pc), [4, 0]);
}

#[test]
fn deadline_is_the_exact_moment_of_the_next_tick() {
    let mut pc = Pc::new();
    pc.init_pic();
    pc.unmask(0);
    assert_eq!(pc.board.next_deadline_ns(), None);
    pc.init_pit(1000);
    for _ in 0..10_000 {
        let deadline_ns = pc.board.next_deadline_ns().unwrap();
        pc.at(deadline_ns - 1);
        assert!(!pc.board.interrupt_pending());
        pc.at(deadline_ns);
        assert_eq!(pc.take_irq(|_| {}), Some(0));
    }
    // 1193 clocks a tick, 10 000 ticks and the loading clock; rounded up once, not ten thousand
    // times.
    assert_eq!(pc.board.now_ns(), (11_930_001u64 * 1_000_000_000).div_ceil(1_193_182));
}

#[test]
fn printing_is_one_output_a_burst() {
    let mut pc = Pc::new();
    for byte in b"Linux version 6.1\n" {
        assert_eq!(pc.inb(0x3fd) & 0x60, 0x60);
        pc.outb(*byte, 0x3f8);
    }
    assert_eq!(pc.take_outputs(), [Output::Console(b"Linux version 6.1\n".to_vec())]);
    assert_eq!(pc.take_outputs(), []);
}

/// serial8250_interrupt() with serial8250_rx_chars(): at most 256 bytes a visit.
fn serial_handler(pc: &mut Pc, typed: &mut Vec<u8>) {
    while pc.inb(0x3fa) & 0x01 == 0 {
        for _ in 0..256 {
            if pc.inb(0x3fd) & 0x01 == 0 {
                break;
            }
            let byte = pc.inb(0x3f8);
            typed.push(byte);
        }
    }
}

#[test]
fn no_typed_byte_is_lost_or_forgotten() {
    for length in [1, 2, 63, 64, 65, 255, 256, 257, 1000, 5000] {
        let mut pc = Pc::new();
        pc.init_pic();
        pc.unmask(4);
        pc.outb(0x01, 0x3f9);
        let sent: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
        let mut typed = Vec::new();
        pc.type_bytes(&sent);
        while pc.take_irq(|pc| serial_handler(pc, &mut typed)).is_some() {}
        assert_eq!(typed, sent);
        pc.type_bytes(b"!");
        assert_eq!(pc.take_irq(|pc| serial_handler(pc, &mut typed)), Some(4));
        assert_eq!(typed.last(), Some(&b'!'));
    }
}

#[test]
fn transmit_interrupts_keep_coming_until_the_driver_stops_them() {
    let mut pc = Pc::new();
    pc.init_pic();
    pc.unmask(4);
    let mut left: Vec<u8> = (0..100).rev().collect();
    // serial8250_start_tx() enables the THR interrupt; serial8250_tx_chars() sends one burst a
    // visit.
    pc.outb(0x02, 0x3f9);
    let mut visits = 0;
    while pc
        .take_irq(|pc| {
            visits += 1;
            while pc.inb(0x3fa) & 0x01 == 0 {
                for _ in 0..16 {
                    if let Some(byte) = left.pop() {
                        pc.outb(byte, 0x3f8);
                    }
                }
                if left.is_empty() {
                    pc.outb(0x00, 0x3f9);
                }
            }
        })
        .is_some()
    {}
    assert!(left.is_empty(), "stopped after {visits} visits");
    assert_eq!(pc.take_outputs(), [Output::Console((0..100).collect())]);
}

#[test]
fn absent_ports_and_wrong_widths_float() {
    let mut pc = Pc::new();
    for port in [0x60, 0x80, 0x2f8, 0x3e8, 0x2e8, 0xcf8, 0xcfc, 0x500, 0xffff] {
        pc.outb(0, port);
        assert_eq!(pc.inb(port), FLOATING_BUS, "port {port:#x}");
    }
    for port in [0x21, 0x3fb, 0x71, 0xcf8, 0x1234] {
        for width in [2, 4] {
            let mut data = [0; 4];
            pc.board.pio_read(port, &mut data[..width]);
            assert!(data[..width].iter().all(|byte| *byte == FLOATING_BUS), "port {port:#x}");
            pc.board.pio_write(port, &data[..width]);
        }
    }
    assert_eq!(pc.inb(0x21), 0xff);
    assert_eq!(pc.inb(0x3fb), 0x03);
    pc.board.mmio_write(&pc.mem, 0xfee0_0000, &[0; 4]);
    let mut data = [0; 8];
    pc.board.mmio_read(&pc.mem, 0xfee0_0000, &mut data);
    assert_eq!(data, [FLOATING_BUS; 8]);
    assert_eq!(pc.take_outputs(), []);
}

#[test]
fn linux_reboots_through_the_keyboard_controller() {
    let mut pc = Pc::new();
    assert_eq!(pc.inb(0x64) & 0x02, 0);
    assert_eq!(pc.board.power_event(), None);
    pc.outb(0xfe, 0x64);
    assert_eq!(pc.board.power_event(), Some(PowerEvent::Reset));
}

/// acpi_hw_legacy_sleep() with the type of S5.
#[test]
fn linux_switches_off_through_the_pm1_control_register() {
    let mut pc = Pc::new();
    let mut control = [0; 2];
    pc.board.pio_read(0x604, &mut control);
    assert_eq!(control, [1, 0], "SCI_EN: ACPI mode from the start");
    pc.board.pio_write(0x604, &[1, 0x14]);
    assert_eq!(pc.board.power_event(), None);
    pc.board.pio_write(0x604, &[1, 0x34]);
    assert_eq!(pc.board.power_event(), Some(PowerEvent::PowerOff));
}

/// acpi_pm_read(): one 32-bit read.
#[test]
fn the_pm_timer_shows_the_time_of_the_last_sample() {
    let mut pc = Pc::new();
    let mut count = [0; 4];
    for seconds in [0u64, 1, 2, 3600, 1_000_000] {
        pc.at(seconds * 1_000_000_000);
        pc.board.pio_read(0x608, &mut count);
        assert_eq!(u32::from_le_bytes(count), (seconds * 3_579_545) as u32);
    }
}

#[test]
fn only_the_timer_and_the_clock_data_read_the_time() {
    let reading: Vec<u16> = (0..=u16::MAX).filter(|port| Board::reads_clock(*port)).collect();
    let timers = [0x40, 0x41, 0x42, 0x43, 0x61, 0x71];
    assert_eq!(reading, [&timers[..], &[0x608, 0x609, 0x60a, 0x60b]].concat());
}

#[test]
fn time_never_goes_back() {
    let mut pc = Pc::new();
    pc.at(5_000);
    pc.at(4_000);
    assert_eq!(pc.board.now_ns(), 5_000);
}

/// What a driver left in the devices is gone, what belongs to the machine goes on.
#[test]
fn a_reset_is_power_on_but_for_time() {
    let mut pc = Pc::new();
    pc.init_pic();
    pc.unmask(0);
    pc.init_pit(100);
    pc.at(25 * NS_PER_MS);
    assert!(pc.board.interrupt_pending());
    pc.outb(0x01, 0x3f9);
    pc.type_bytes(b"typed before");
    pc.outb(0xfe, 0x64);
    assert_eq!(pc.board.power_event(), Some(PowerEvent::Reset));
    pc.board.reset();
    assert_eq!(pc.board.power_event(), None);
    assert!(!pc.board.interrupt_pending());
    assert_eq!(pc.board.now_ns(), 25 * NS_PER_MS);
    assert_eq!(pc.board.resets(), 1);
    assert_eq!(pc.inb(0x3fd), 0x60, "nothing to read on the line");
    let restored = Board::restore(pc.board.save()).unwrap();
    assert_eq!(restored.save(), pc.board.save());
    // The same accesses have the same effects as at first.
    pc.init_pic();
    pc.unmask(0);
    pc.init_pit(100);
    pc.at(36 * NS_PER_MS);
    assert_eq!(pc.board.acknowledge_interrupt(), Some(VECTOR_BASE));
}

#[test]
fn an_alarm_of_the_clock_is_irq_8_and_a_deadline() {
    const ALARM: u8 = 0x22;
    let mut pc = Pc::new();
    pc.init_pic();
    pc.outb(pc.board.now_ns() as u8, 0x80);
    let slave = pc.inb(0xa1) & !1;
    pc.outb(slave, 0xa1);
    // 22:13:25, five seconds from power-on.
    for (register, value) in [(0x05, 0x22), (0x03, 0x13), (0x01, 0x25), (0x0b, ALARM)] {
        pc.outb(register, 0x70);
        pc.outb(value, 0x71);
    }
    assert_eq!(pc.board.next_deadline_ns(), Some(5000 * NS_PER_MS));
    pc.at(4999 * NS_PER_MS);
    assert!(!pc.board.interrupt_pending());
    pc.at(5000 * NS_PER_MS);
    assert_eq!(pc.board.acknowledge_interrupt(), Some(VECTOR_BASE + 8));
}

#[test]
fn a_panic_the_guest_tells_its_device_of_is_an_event() {
    let mut pc = Pc::new();
    assert_eq!(pc.inb(0x505), 3);
    pc.outb(1, 0x505);
    assert_eq!(pc.board.power_event(), Some(PowerEvent::Panic));
    for byte in b"Kernel panic - not syncing: oops\n" {
        pc.outb(*byte, 0x3f8);
    }
    assert_eq!(pc.board.panic_reason(), b": oops");
    pc.board.reset();
    assert_eq!(pc.board.power_event(), None);
    assert!(!pc.board.panic_was_printed());
}

/// The button of a machine whose driver listens: the SCI, until the driver has cleared the status.
#[test]
fn the_power_button_is_the_sci_until_it_is_served() {
    let mut pc = Pc::new();
    pc.init_pic();
    let slave = pc.inb(0xa1) & !2;
    pc.outb(slave, 0xa1);
    pc.outb(0x02, 0x4d1);
    pc.board.apply(&pc.mem, Input::PowerButton);
    assert!(!pc.board.interrupt_pending() && !pc.board.hears_power_button());
    pc.board.pio_write(0x602, &0x0100u16.to_le_bytes());
    assert!(pc.board.hears_power_button());
    assert_eq!(pc.board.acknowledge_interrupt(), Some(VECTOR_BASE + 9));
    pc.board.pio_write(0x600, &0x0100u16.to_le_bytes());
    pc.outb(0x20, 0xa0);
    pc.outb(0x20, 0x20);
    assert!(!pc.board.interrupt_pending());
}
