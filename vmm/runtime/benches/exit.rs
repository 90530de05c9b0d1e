//! The user-space cost of an exit: what the run loop does between two `KVM_RUN`, without KVM and
//! without I/O.
//!
//! One iteration applies the exit's inputs and appends their records, lets the board answer, links
//! the exit chain and leaves the exit in a log whose groups go nowhere, as [`FileLog`] does for a
//! recording. Aim: below 2 µs for each exit.

#![allow(clippy::expect_used, reason = "a sink takes everything")]

#[path = "../../../devices/tests/common/mod.rs"]
mod common;

use std::io::Sink;
use std::path::Path;

use criterion::{Criterion, criterion_group, criterion_main};
use ftvmm_devices::{Input, Output, VIRTIO_NET_SLOT};
use ftvmm_machine::exit_chain::ExitChain;
use ftvmm_replication::{Event, LogWriter, Ordinal, Record};
use ftvmm_runtime::input::{FileLog, LogSink, OnRecordError};
use ftvmm_runtime::testing::header;

use common::{Driver, FEATURES, QUEUE_SIZE, RX, TX, buffer};

const PIC_COMMAND: u16 = 0x20;
const PIC_EOI: u8 = 0x20;
const PIT_COMMAND: u16 = 0x43;
const PIT_COUNTER_0: u16 = 0x40;
const UART_DATA: u16 = 0x3f8;
const QUEUE_NOTIFY: u64 = VIRTIO_NET_SLOT.base + 0x50;
/// `virtio_net_hdr_v1` and an Ethernet frame of full size.
const FRAME_BYTES: usize = 12 + 1514;
/// Guest time between two exits.
const EXIT_NS: u64 = 20_000;

/// A machine without a CPU.
struct Bench {
    driver: Driver,
    chain: ExitChain,
    log: FileLog<Sink>,
    at: Ordinal,
    now_ns: u64,
}

impl Bench {
    fn new() -> Self {
        let writer = LogWriter::new(std::io::sink(), &header()).expect("a sink takes everything");
        let mut driver = Driver::up(FEATURES);
        for index in 0..QUEUE_SIZE {
            driver.set_descriptor(TX, index, (buffer(TX, index), FRAME_BYTES as u32, 0, 0));
        }
        driver.board.pio_write(PIT_COMMAND, &[0x36]);
        driver.board.pio_write(PIT_COUNTER_0, &[0]);
        driver.board.pio_write(PIT_COUNTER_0, &[0]);
        let chain = ExitChain::default();
        Self {
            driver,
            chain,
            log: FileLog::new(writer, Ordinal(0), Path::new(""), OnRecordError::Stop),
            at: Ordinal(0),
            now_ns: 0,
        }
    }

    fn apply(&mut self, input: Input) {
        let record = Record { at: self.at, event: Event::Input(input) };
        self.log.append(&record).expect("a sink takes everything");
        let Event::Input(input) = record.event else { unreachable!("made two lines above") };
        self.driver.board.apply(&self.driver.mem, input);
    }

    fn apply_time(&mut self) {
        self.now_ns += EXIT_NS;
        self.apply(Input::Time { now_ns: self.now_ns });
    }

    fn arrive(&mut self) {
        self.at = self.at.next();
    }

    fn leave(&mut self, address: u64, data: &[u8]) -> Vec<Output> {
        self.chain.link(self.at, address, data);
        self.log.exit_complete(self.at).expect("a sink takes everything");
        self.driver.board.take_outputs()
    }

    fn write_port(&mut self, port: u16, value: u8) -> Vec<Output> {
        self.arrive();
        self.driver.board.pio_write(port, &[value]);
        self.leave(port.into(), &[value])
    }

    fn read_clock_port(&mut self, port: u16) -> u8 {
        self.arrive();
        self.apply_time();
        let mut data = [0];
        self.driver.board.pio_read(port, &mut data);
        self.leave(port.into(), &data);
        data[0]
    }

    /// The driver's part, one descriptor, comes with it: some memory writes of the guest.
    fn transmit(&mut self) -> Vec<Output> {
        self.driver.make_available(TX, self.driver.next_avail[TX as usize] % QUEUE_SIZE);
        self.arrive();
        let queue = TX.to_le_bytes();
        self.driver.board.mmio_write(&self.driver.mem, QUEUE_NOTIFY, &queue);
        self.leave(QUEUE_NOTIFY, &queue)
    }

    /// A frame that has come from the tap reaches the guest at some other exit.
    fn receive(&mut self, frame: Vec<u8>) -> Vec<Output> {
        self.driver.add_receive_buffers(1);
        self.arrive();
        self.apply(Input::NetRx { frame });
        self.driver.board.pio_write(PIC_COMMAND, &[PIC_EOI]);
        self.leave(PIC_COMMAND.into(), &[PIC_EOI])
    }
}

fn exits(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("exit");
    let mut bench = Bench::new();
    group.bench_function("pic_eoi", |b| b.iter(|| bench.write_port(PIC_COMMAND, PIC_EOI)));
    let mut bench = Bench::new();
    group.bench_function("pit_read_with_time", |b| b.iter(|| bench.read_clock_port(PIT_COUNTER_0)));
    let mut bench = Bench::new();
    group.bench_function("uart_write", |b| b.iter(|| bench.write_port(UART_DATA, b'x')));
    let mut bench = Bench::new();
    assert_eq!(bench.transmit().len(), 1, "a frame is sent");
    group.bench_function("net_transmit_1500", |b| b.iter(|| bench.transmit()));
    let mut bench = Bench::new();
    let mut frame = vec![0; FRAME_BYTES];
    frame[12..].copy_from_slice(&std::array::from_fn::<u8, 1514, _>(|i| (i * 167) as u8));
    bench.receive(frame.clone());
    let received = bench.driver.bytes(buffer(RX, 0), FRAME_BYTES);
    assert_eq!(received[12..], frame[12..], "a frame is received");
    group.bench_function("net_receive_1500", |b| b.iter(|| bench.receive(frame.clone())));
    group.finish();
}

criterion_group!(benches, exits);
criterion_main!(benches);
