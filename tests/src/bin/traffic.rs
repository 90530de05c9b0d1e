//! `traffic udp|http|from|to ADDRESS COUNT`: so many small datagrams that are echoed, small HTTP
//! requests, or MiB from or to the guest at this address.
//!
//! Runs on a lab host, beside the `ftvmm` whose instructions are counted.

use std::error::Error;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};

use ftvmm_tests::measure::{http_requests, udp_echoes};

/// Where the guest echoes (RFC 862), discards (RFC 863) and serves.
const ECHO_PORT: u16 = 7;
const DISCARD_PORT: u16 = 9;
const HTTP_PORT: u16 = 80;
const SMALL_BYTES: usize = 1000;
const MIB: usize = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [what, guest, count] = arguments.as_slice() else {
        return Err("usage: traffic udp|http|from|to ADDRESS COUNT".into());
    };
    let (guest, count): (IpAddr, usize) = (guest.parse()?, count.parse()?);
    match what.as_str() {
        "udp" => {
            let lost = udp_echoes((guest, ECHO_PORT).into(), count)?.lost;
            if lost > 0 {
                return Err(format!("{lost} of {count} datagrams were lost").into());
            }
        }
        "http" => {
            let path = format!("/bytes/{SMALL_BYTES}");
            http_requests((guest, HTTP_PORT).into(), &path, SMALL_BYTES, count)?;
        }
        "from" => receive(guest, count * MIB)?,
        "to" => send(guest, count)?,
        other => return Err(format!("no traffic is called '{other}'").into()),
    }
    Ok(())
}

fn receive(guest: IpAddr, bytes: usize) -> Result<(), Box<dyn Error>> {
    let mut stream = TcpStream::connect((guest, HTTP_PORT))?;
    stream.write_all(format!("GET /bytes/{bytes} HTTP/1.0\r\n\r\n").as_bytes())?;
    let (mut buffer, mut got) = (vec![0; 64 << 10], 0);
    loop {
        match stream.read(&mut buffer)? {
            0 if got > bytes => return Ok(()),
            0 => return Err(format!("{got} bytes, wanted {bytes} and a head").into()),
            count => got += count,
        }
    }
}

fn send(guest: IpAddr, mib: usize) -> Result<(), Box<dyn Error>> {
    let mut stream = TcpStream::connect((guest, DISCARD_PORT))?;
    let chunk = vec![7; MIB];
    for _ in 0..mib {
        stream.write_all(&chunk)?;
    }
    // The guest hangs up when it has read everything.
    stream.shutdown(Shutdown::Write)?;
    match stream.read(&mut [0])? {
        0 => Ok(()),
        _ => Err("the guest answers what it was to discard".into()),
    }
}
