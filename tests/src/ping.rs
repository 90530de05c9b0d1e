//! `ping` as a client would use it, beside whatever else goes on.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use crate::Program;
use crate::lab::{Lab, LabError, at};

/// A client that has waited so long for its answers gives up. Only a guest that is dead makes it
/// pass.
const GIVE_UP_AFTER_S: &str = "120";

/// A running `ping`.
pub struct Ping {
    child: Child,
}

/// What `ping` saw.
#[derive(Clone, Debug, Default)]
pub struct Pinged {
    /// Round trips in the order they were answered.
    pub answered: Vec<Duration>,
    /// Requests before the last one answered that were not.
    pub lost: usize,
    /// Answers to requests that had been answered before.
    pub repeated: usize,
}

impl Ping {
    /// Asks `address` for an echo every `interval`, from the clients' network, until `count` have
    /// come.
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
            .client(Program::Ping, &["-n", "-c", &count.to_string(), "-i", &interval])?
            // Without it `ping` waits for the last answer only twice as long as for the others.
            .args(["-w", GIVE_UP_AFTER_S, address])
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

/// Lines such as `64 bytes from 10.0.0.1: icmp_seq=1 ttl=64 time=0.345 ms`.
fn parse(text: &str) -> Pinged {
    let mut pinged = Pinged::default();
    let mut numbers = BTreeSet::new();
    for (number, took) in text.lines().filter_map(answer) {
        if numbers.insert(number) {
            pinged.answered.push(took);
        } else {
            pinged.repeated += 1;
        }
    }
    pinged.lost = numbers.last().map_or(0, |last| last.saturating_sub(numbers.len()));
    pinged
}

/// The number of the request and its round trip.
fn answer(line: &str) -> Option<(usize, Duration)> {
    let field = |name| line.split_once(name)?.1.split(' ').next();
    let milliseconds: f64 = field("time=")?.parse().ok()?;
    Some((field("icmp_seq=")?.parse().ok()?, Duration::from_secs_f64(milliseconds / 1000.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_answer_makes_up_for_none_that_was_lost() {
        let text = "64 bytes from 10.0.0.1: icmp_seq=1 ttl=64 time=1 ms\n\
                    64 bytes from 10.0.0.1: icmp_seq=1 ttl=64 time=2 ms (DUP!)\n\
                    64 bytes from 10.0.0.1: icmp_seq=3 ttl=64 time=1 ms\n";
        let pinged = parse(text);
        assert_eq!((pinged.answered.len(), pinged.lost, pinged.repeated), (2, 1, 1));
    }

    #[test]
    fn answers_and_requests_are_counted() {
        let text = "PING 10.0.0.1 (10.0.0.1) 56(84) bytes of data.\n\
                    64 bytes from 10.0.0.1: icmp_seq=1 ttl=64 time=0.345 ms\n\
                    64 bytes from 10.0.0.1: icmp_seq=3 ttl=64 time=12 ms\n\n\
                    --- 10.0.0.1 ping statistics ---\n\
                    3 packets transmitted, 2 received, 33% packet loss, time 2041ms\n";
        let pinged = parse(text);
        assert_eq!(pinged.lost, 1);
        assert_eq!(pinged.answered, [Duration::from_micros(345), Duration::from_millis(12)]);
    }
}
