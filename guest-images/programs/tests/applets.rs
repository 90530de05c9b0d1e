//! The applets as processes, on the machine that builds them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::process::{Child, Command, Output};

use ftvmm_guest_programs::stream::{DEFAULT_SEED, hex, reader_sha256, stream_sha256};

fn ftguest(arguments: &[&str]) -> Command {
    #[allow(clippy::disallowed_methods, reason = "the program under test")]
    let mut command = Command::new(env!("CARGO_BIN_EXE_ftguest"));
    command.args(arguments);
    command
}

fn output(arguments: &[&str]) -> Output {
    ftguest(arguments).output().unwrap()
}

/// A server under test, ended with the test.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    fn start(applet: &str, more: &[&str]) -> Self {
        let port = free_port();
        let port_word = port.to_string();
        let arguments = [&[applet, "--port", &port_word], more].concat();
        let mut server = Self { child: ftguest(&arguments).spawn().unwrap(), port };
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert_eq!(server.child.try_wait().unwrap(), None, "{applet} on port {port} ended");
            std::thread::yield_now();
        }
        server
    }

    fn connect(&self) -> BufReader<TcpStream> {
        BufReader::new(TcpStream::connect(("127.0.0.1", self.port)).unwrap())
    }
}

/// A port nobody listens on, below those that connections take for their own end: one of them, or
/// one that a client of this very server was given while it tried, would be in its way. It is not
/// tried by listening: a child that another test forks at that moment would go on listening until
/// it executes its program.
fn free_port() -> u16 {
    let free = |port: &u16| TcpStream::connect(("127.0.0.1", *port)).is_err();
    std::iter::repeat_with(|| fastrand::u16(20_000..30_000)).find(free).unwrap()
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Sends one request and reads the head of its answer: status line and length of the body.
fn ask(client: &mut BufReader<TcpStream>, request: &str) -> (String, u64) {
    client.get_mut().write_all(request.as_bytes()).unwrap();
    let mut lines = client.by_ref().lines().map(Result::unwrap);
    let status = lines.next().unwrap();
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let length = headers.iter().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap();
    (status, length.parse().unwrap())
}

#[test]
fn selfcheck_passes_and_tells_work_from_chance() {
    let lines = [(); 2].map(|()| {
        let said = output(&["selfcheck", "2"]);
        assert!(said.status.success(), "{said:?}");
        String::from_utf8(said.stdout).unwrap()
    });
    let [first, second] = lines.each_ref().map(|line| line.split_whitespace().collect::<Vec<_>>());
    assert_eq!(first[..2], ["SELFCHECK", "ok"]);
    assert_ne!(first[2], second[2], "two runs saw the same random bytes and clocks");
    assert_eq!(first[3..], second[3..], "the work itself differs");
    assert_eq!(first[3], "rounds=2");
}

#[test]
fn one_connection_serves_whole_parts_heads_and_errors() {
    let root = tempfile_root();
    let server = Server::start("httpd", &["--root", root.to_str().unwrap()]);
    let mut client = server.connect();

    let length = 3_000_001;
    let get = format!("GET /bytes/{length} HTTP/1.1\r\n\r\n");
    assert_eq!(ask(&mut client, &get), ("HTTP/1.1 200 OK".into(), length));
    let body = reader_sha256(client.by_ref().take(length)).unwrap();
    assert_eq!(body, stream_sha256(DEFAULT_SEED, length));

    let range = "GET /hello HTTP/1.1\r\nRange: bytes=1-3\r\n\r\n";
    assert_eq!(ask(&mut client, range), ("HTTP/1.1 206 Partial Content".into(), 3));
    let mut part = [0; 3];
    client.read_exact(&mut part).unwrap();
    assert_eq!(&part, b"ell");

    let head = "HEAD /bytes/77 HTTP/1.1\r\n\r\n";
    assert_eq!(ask(&mut client, head), ("HTTP/1.1 200 OK".into(), 77));
    let missing = "GET /missing HTTP/1.1\r\n\r\n";
    assert_eq!(ask(&mut client, missing), ("HTTP/1.1 404 Not Found".into(), 0));
    let last = "DELETE /hello HTTP/1.1\r\nConnection: close\r\n\r\n";
    assert_eq!(ask(&mut client, last), ("HTTP/1.1 405 Method Not Allowed".into(), 0));
    assert_eq!(client.read(&mut part).unwrap(), 0, "the connection should be closed");
    std::fs::remove_dir_all(root).unwrap();
}

fn tempfile_root() -> std::path::PathBuf {
    let root = std::env::temp_dir().join(format!("ftguest-root-{}", std::process::id()));
    std::fs::create_dir(&root).unwrap();
    std::fs::write(root.join("hello"), "hello\n").unwrap();
    root
}

#[test]
fn echod_answers_on_both_protocols() {
    let server = Server::start("echod", &[]);
    let mut client = server.connect();
    client.get_mut().write_all(b"over TCP\n").unwrap();
    let mut line = String::new();
    client.read_line(&mut line).unwrap();
    assert_eq!(line, "over TCP\n");

    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.send_to(b"over UDP", ("127.0.0.1", server.port)).unwrap();
    let mut datagram = [0; 16];
    let count = socket.recv(&mut datagram).unwrap();
    assert_eq!(&datagram[..count], b"over UDP");
}

#[test]
fn the_digest_and_counter_applets_answer() {
    let said = output(&["streamsum", "1000", "5"]);
    assert_eq!(String::from_utf8_lossy(&said.stdout).trim(), hex(&stream_sha256(5, 1000)));
    let said = output(&["tsccheck", "--faults", "50"]);
    let text = String::from_utf8_lossy(&said.stdout);
    assert!(text.contains("TSCCHECK ok "), "{text}{}", String::from_utf8_lossy(&said.stderr));
    assert!(String::from_utf8_lossy(&output(&["rdtsc", "10"]).stdout).starts_with("RDTSC ok "));
    assert!(String::from_utf8_lossy(&output(&["compute", "0s"]).stdout).ends_with("rounds=0\n"));
}

#[test]
fn misuse_exits_with_2_and_shows_the_usage() {
    for arguments in [&[][..], &["no-such-applet"], &["compute", "x"], &["httpd", "--port", "x"]] {
        let said = output(arguments);
        assert_eq!(said.status.code(), Some(2), "{arguments:?}");
        assert!(String::from_utf8_lossy(&said.stderr).contains("ftguest selfcheck"));
    }
}
