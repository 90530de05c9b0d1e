//! `ping` as a client would use it, beside whatever else goes on.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use crate::lab::{Lab, LabError, at};

/// A running `ping`.
pub struct Ping {
    child: Child,
}

/// What `ping` saw.
#[derive(Clone, Debug, Default)]
pub struct Pinged {
    /// Round trips in the order they were answered.
    pub answered: Vec<Duration>,
    /// Requests sent.
    pub sent: usize,
}

impl Ping {
    /// Asks `address` for `count` echoes, one every `interval`, from the clients' network.
    ///
    /// # Errors
    /// When `ping` cannot be started.
    pub fn start(
        lab: &Lab,
        address: &str,
        interval: Duration,
        count: usize,
    ) -> Result<Self, LabError> {
        let interval = interval.as_secs_f64().to_string();
        let child = lab
            .client(&["ping", "-n", "-c", &count.to_string(), "-i", &interval, address])
            .stdout(Stdio::piped())
            .spawn()
            .map_err(at(Path::new("ping")))?;
        Ok(Self { child })
    }

    /// Waits for the last answer, or until none can be expected, and reads what it printed.
    ///
    /// # Errors
    /// When its output cannot be read.
    pub fn finish(self) -> Result<Pinged, LabError> {
        let output = self.child.wait_with_output().map_err(at(Path::new("ping")))?;
        Ok(parse(&String::from_utf8_lossy(&output.stdout)))
    }
}

/// Lines such as `64 bytes from 10.0.0.1: icmp_seq=1 ttl=64 time=0.345 ms`, and the summary.
fn parse(text: &str) -> Pinged {
    let answered = text.lines().filter_map(|line| {
        let milliseconds: f64 = line.split_once("time=")?.1.split(' ').next()?.parse().ok()?;
        Some(Duration::from_secs_f64(milliseconds / 1000.0))
    });
    let sent =
        text.lines().find_map(|line| line.split_once(" packets transmitted")?.0.parse().ok());
    Pinged { answered: answered.collect(), sent: sent.unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_and_requests_are_counted() {
        let text = "PING 10.0.0.1 (10.0.0.1) 56(84) bytes of data.\n\
                    64 bytes from 10.0.0.1: icmp_seq=1 ttl=64 time=0.345 ms\n\
                    64 bytes from 10.0.0.1: icmp_seq=3 ttl=64 time=12 ms\n\n\
                    --- 10.0.0.1 ping statistics ---\n\
                    3 packets transmitted, 2 received, 33% packet loss, time 2041ms\n";
        let pinged = parse(text);
        assert_eq!(pinged.sent, 3);
        assert_eq!(pinged.answered, [Duration::from_micros(345), Duration::from_millis(12)]);
    }
}
