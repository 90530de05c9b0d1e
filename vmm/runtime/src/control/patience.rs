//! A client's stream with a deadline: a client that sends or reads a byte at a time does not get
//! more time by that.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use ftvmm_host::clock::HostClock;

/// A stream whose reads and writes fail after a deadline.
pub struct Patience {
    stream: Arc<UnixStream>,
    clock: HostClock,
    longest: Duration,
}

impl Patience {
    /// From now on, `longest` for all that is read and written until the next call.
    pub fn renew(&mut self, longest: Duration) {
        (self.clock, self.longest) = (HostClock::host_start(), longest);
    }

    /// A stream with so much time.
    pub fn new(stream: Arc<UnixStream>, longest: Duration) -> Self {
        Self { stream, clock: HostClock::host_start(), longest }
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.longest.saturating_sub(Duration::from_nanos(self.clock.host_now_ns()));
        // No time would mean for ever.
        if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

/// What a socket's timeout is reported as (socket(7)).
fn timed_out(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::WouldBlock => ErrorKind::TimedOut.into(),
        _ => error,
    }
}

impl Read for Patience {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        (&*self.stream).read(buffer).map_err(timed_out)
    }
}

impl Write for Patience {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        (&*self.stream).write(bytes).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_at_a_time_gets_no_more_time() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&[7; 100_000]).unwrap();
        // Nobody makes so many system calls in that.
        let mut ours = Patience::new(Arc::new(ours), Duration::from_millis(1));
        let error = (0..100_000).find_map(|_| ours.read(&mut [0]).err());
        assert_eq!(error.map(|error| error.kind()), Some(ErrorKind::TimedOut));
    }

    #[test]
    fn whoever_reads_nothing_gets_no_more_time_either() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut ours = Patience::new(Arc::new(ours), Duration::from_millis(20));
        let error = ours.write_all(&vec![7; 16 << 20]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        ours.renew(Duration::from_millis(20));
        assert_eq!(ours.read(&mut [0]).unwrap_err().kind(), ErrorKind::TimedOut);
    }
}
