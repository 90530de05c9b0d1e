//! The guest in plain QEMU, without our VMM: what fails here is the guest's own fault.
//!
//! QEMU's `microvm` has what the tiny kernel drives: 8259, 8254, 8250, RTC and virtio-mmio named on
//! the command line. Ignored by default because the first run builds a kernel; `cargo xtask test`
//! runs it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use ftvmm_guest_images::{Guest, GuestKernel};
use ftvmm_guest_programs::stream::{DEFAULT_SEED, reader_sha256, stream_sha256};
use ftvmm_host_programs::{Program, built};

/// No guest of this test is silent nearly so long unless it hangs.
const SILENCE: Duration = Duration::from_secs(120);
const COMMAND_LINE: &str = "console=ttyS0 panic=-1 reboot=t mitigations=off lpj=1000000";

/// The guest as a user gets it.
fn guest() -> Guest {
    let output = Program::Cargo
        .command()
        .unwrap()
        .args(["xtask", "guest"])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."))
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success(), "cargo xtask guest: {}", output.status);
    Guest::in_folder(&PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()))
}

struct Machine {
    qemu: Child,
    console: Receiver<String>,
}

impl Machine {
    fn boot(kernel: &Path, initramfs: &Path, parameters: &str, network: &[String]) -> Self {
        let mut qemu = Program::Qemu
            .command()
            .unwrap()
            .args(["-accel", "tcg", "-cpu", "qemu64,-apic,-tsc", "-m", "192", "-no-reboot"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"])
            .args(["-M", "microvm,pit=on,pic=on,rtc=on,isa-serial=on,x-option-roms=off,acpi=off"])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-device", "virtio-rng-device"])
            .args(["-append", &format!("{COMMAND_LINE} {parameters}")])
            .args(network)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(qemu.stdout.take().unwrap());
        let (line, console) = mpsc::channel();
        thread::spawn(move || {
            output.split(b'\n').map_while(Result::ok).try_for_each(|bytes| {
                line.send(String::from_utf8_lossy(&bytes).trim_end().to_owned())
            })
        });
        Self { qemu, console }
    }

    /// Reads the console up to a line that contains `wanted`.
    fn expect(&mut self, wanted: &str) -> String {
        let mut seen = String::new();
        loop {
            match self.console.recv_timeout(SILENCE) {
                Ok(line) if line.contains(wanted) => return line,
                Ok(line) => seen.extend([line.as_str(), "\n"]),
                Err(end) => panic!("the console never said {wanted:?} ({end}):\n{seen}"),
            }
        }
    }

    fn type_line(&mut self, text: &str) {
        writeln!(self.qemu.stdin.as_ref().unwrap(), "{text}").unwrap();
    }

    /// Waits until the guest has restarted, which ends this QEMU.
    fn expect_end(mut self) {
        let end = loop {
            if let Err(end) = self.console.recv_timeout(SILENCE) {
                break end;
            }
        };
        assert_eq!(end, RecvTimeoutError::Disconnected, "the guest goes on");
        let status = self.qemu.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It has ended already when all went well.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// The two hashes of a `SELFCHECK ok` line: of the run and of the work.
fn hashes(line: &str) -> (String, String) {
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = words.iter().position(|&word| word == "ok").unwrap();
    (words[at + 1].to_owned(), words[at + 3].to_owned())
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn download(port: u16, request: &str, length: u64) -> [u8; 32] {
    let mut server = BufReader::new(TcpStream::connect(("127.0.0.1", port)).unwrap());
    write!(server.get_mut(), "GET {request}\r\nConnection: close\r\n\r\n").unwrap();
    let lines = server.by_ref().lines().map(Result::unwrap);
    let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    assert!(head.contains(&format!("Content-Length: {length}")), "{head:?}");
    reader_sha256(server).unwrap()
}

#[test]
#[ignore = "builds a kernel and boots it; `cargo xtask test` runs it"]
fn the_tiny_guest_serves_the_network_and_its_console() {
    let guest = guest();
    let (http, echo) = (free_port(), free_port());
    let forward = format!(
        "user,id=n,hostfwd=tcp:127.0.0.1:{http}-:80,hostfwd=tcp:127.0.0.1:{echo}-:7,\
         hostfwd=udp:127.0.0.1:{echo}-:7"
    );
    let network = ["-netdev", &forward, "-device", "virtio-net-device,netdev=n"].map(str::to_owned);
    let address = "ftguest.ip=10.0.2.15/24";
    let mut machine = Machine::boot(&guest.kernel, &guest.initramfs, address, &network);
    machine.expect("FTGUEST READY");

    let length = 4_000_003;
    let whole = download(http, &format!("/bytes/{length} HTTP/1.1"), length);
    assert_eq!(whole, stream_sha256(DEFAULT_SEED, length));
    let part = download(http, "/bytes/100 HTTP/1.1\r\nRange: bytes=0-9", 10);
    assert_eq!(part, stream_sha256(DEFAULT_SEED, 10));

    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    socket.send_to(b"over UDP", ("127.0.0.1", echo)).unwrap();
    let mut datagram = [0; 16];
    let count = socket.recv(&mut datagram).unwrap();
    assert_eq!(&datagram[..count], b"over UDP");
    let mut stream = TcpStream::connect(("127.0.0.1", echo)).unwrap();
    stream.write_all(b"over TCP").unwrap();
    stream.read_exact(&mut datagram[..8]).unwrap();
    assert_eq!(&datagram[..8], b"over TCP");

    machine.type_line("echo typed $((6 * 7)) at $(tty)");
    machine.expect("typed 42 at /dev/ttyS0");
    machine.type_line("reboot -f");
    machine.expect_end();
}

#[test]
#[ignore = "builds a kernel and boots it; `cargo xtask test` runs it"]
fn both_kernels_pass_the_same_selfcheck_and_no_two_boots_are_alike() {
    let guest = guest();
    let here = built(&guest.programs).args(["selfcheck", "2"]).output().unwrap();
    let (_, work) = hashes(&String::from_utf8(here.stdout).unwrap());
    let script = "ftguest.run=selfcheck:2,reboot:-f";
    let mut runs = Vec::new();
    for which in [GuestKernel::Tiny, GuestKernel::Tiny, GuestKernel::Cloud] {
        let [kernel, initramfs] = guest.boot_files(which);
        let mut machine = Machine::boot(&kernel, &initramfs, script, &[]);
        let (run, work_there) = hashes(&machine.expect("SELFCHECK ok"));
        machine.expect_end();
        assert_eq!(work_there, work, "{}", kernel.display());
        assert!(!runs.contains(&run), "{run} came twice");
        runs.push(run);
    }
}
