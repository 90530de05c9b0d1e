//! `control-client SOCKET`: a client of an `ftvmm`'s control socket that stays connected. For each
//! path on a line of its standard input it sends a PUT without a body and prints its number and the
//! reply's status line.
//!
//! An operator's dashboard asks like this; `ftvmm switch` is a program that starts, which takes an
//! emulated CPU longer than what it asks for.

use std::error::Error;
use std::io::{BufRead, BufReader, Write, stdin};
use std::os::unix::net::UnixStream;

fn main() -> Result<(), Box<dyn Error>> {
    let socket = std::env::args().nth(1).ok_or("usage: control-client SOCKET")?;
    let mut stream = UnixStream::connect(socket)?;
    let mut replies = BufReader::new(stream.try_clone()?);
    println!("connected");
    for (number, path) in (1..).zip(stdin().lines()) {
        let path = path?;
        let request =
            format!("PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut status = String::new();
        replies.read_line(&mut status)?;
        println!("{number}: {}", status.trim_end());
        // A reply without content ends with its head.
        let mut line = status;
        while !line.trim_end().is_empty() {
            line.clear();
            replies.read_line(&mut line)?;
        }
    }
    Ok(())
}
