//! `round-trips ADDRESS COUNT`: round trips over TCP to an echo server, one per line in
//! nanoseconds.
//!
//! Runs on a lab host and measures what the channel between two `ftvmm` rides on.

use std::error::Error;
use std::fmt::Write;

use ftvmm_tests::measure::tcp_echoes;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(server), Some(count)) = (arguments.next(), arguments.next()) else {
        return Err("usage: round-trips ADDRESS COUNT".into());
    };
    let mut lines = String::new();
    for took in tcp_echoes(server.parse()?, count.parse()?)?.answered {
        writeln!(lines, "{}", took.as_nanos())?;
    }
    print!("{lines}");
    Ok(())
}
