//! What travels between the lab and the agent inside a host.
//!
//! One byte stream carries many commands at once. A frame is a little-endian `u32` with the
//! length of what follows in bytes, then one postcard-encoded [`Request`] (towards the host) or
//! [`Report`] (from it). Both ends come from one build, so there is no version to negotiate.
//!
//! Per command the order is: `Start`, then `Started` or `Refused`, then any number of `Output`,
//! then `Ended`. `Ended` is sent after both output streams have reached their end, so a command
//! that leaves a daemon behind must redirect the daemon's output, as under ssh.

use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Longest frame accepted; far above what is sent, low enough to notice a stream out of step.
pub const FRAME_BYTES_MAX: u32 = 16 << 20;

/// Most bytes of a stream put into one frame.
pub const CHUNK_BYTES: usize = 64 << 10;

/// Name of the virtio-serial port that carries the stream.
pub const PORT_NAME: &str = "ftvmm.agent";

/// Names the serial line, below `/dev`, that carries the stream instead; in the environment of a
/// lab host's `/init`, where the kernel puts what it does not know of its command line.
pub const SERIAL_PORT: &str = "AGENT_PORT";

/// What an agent on a serial line says first: before it, others may have written there.
pub const SERIAL_MARK: &[u8] = b"\nftvmm lab agent\n";

/// Where a lab host mounts the shared directory, and its virtiofs tag.
pub const SHARE: &str = "/share";

/// virtiofs tag of the shared directory.
pub const SHARE_TAG: &str = "share";

/// Number of a command, chosen by the lab, never used twice in its life.
pub type CommandId = u32;

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// Program and arguments; the program is looked up in PATH.
    pub argv: Vec<String>,
    /// Added to the agent's own environment.
    pub env: Vec<(String, String)>,
}

/// Which output stream of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// File descriptor 1.
    Stdout,
    /// File descriptor 2.
    Stderr,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ended {
    /// It exited with this status.
    Status(i32),
    /// This signal killed it.
    Signal(i32),
}

impl Ended {
    /// Whether the command exited with status 0.
    pub fn success(self) -> bool {
        self == Self::Status(0)
    }

    /// The number a shell would show in `$?`.
    pub fn shell_code(self) -> i32 {
        match self {
            Self::Status(status) => status,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

impl From<ExitStatus> for Ended {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Status(code),
            (None, signal) => Self::Signal(signal.unwrap_or_default()),
        }
    }
}

/// Towards the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Run a command in a process group of its own.
    Start(CommandId, Start),
    /// Bytes for its standard input.
    Stdin(CommandId, Vec<u8>),
    /// The end of its standard input.
    CloseStdin(CommandId),
    /// A signal for the whole process group.
    Signal(CommandId, i32),
}

/// From the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// The host is set up and takes commands.
    Ready,
    /// The command runs under this process id of the host.
    Started(CommandId, u32),
    /// The command could not be started, with the reason.
    Refused(CommandId, String),
    /// The command wrote something.
    Output(CommandId, Stream, Vec<u8>),
    /// The command is over and all its output has been sent.
    Ended(CommandId, Ended),
}

/// Sends one frame with a single write.
///
/// # Errors
/// What the stream answered.
pub fn write_frame(stream: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut frame = vec![0; 4];
    frame = postcard::to_extend(message, frame).map_err(io::Error::other)?;
    let length = u32::try_from(frame.len() - 4).map_err(io::Error::other)?;
    frame[..4].copy_from_slice(&length.to_le_bytes());
    stream.write_all(&frame)?;
    stream.flush()
}

/// Receives one frame; `None` when the stream ended between two frames.
///
/// # Errors
/// What the stream answered; `InvalidData` when the bytes are no frame.
pub fn read_frame<M: DeserializeOwned>(stream: &mut impl Read) -> io::Result<Option<M>> {
    let mut length = [0; 4];
    match stream.read_exact(&mut length) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let length = u32::from_le_bytes(length);
    if length > FRAME_BYTES_MAX {
        let text = format!("frame of {length} bytes, at most {FRAME_BYTES_MAX}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let mut frame = vec![0; length as usize];
    stream.read_exact(&mut frame)?;
    let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    postcard::from_bytes(&frame).map(Some).map_err(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_follow_each_other_and_the_end_between_two_is_clean() {
        let first = Request::Start(1, Start { argv: vec!["ls".into()], env: vec![] });
        let second = Request::Stdin(1, vec![7; 300]);
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &first).unwrap();
        write_frame(&mut bytes, &second).unwrap();
        let mut stream = &bytes[..];
        assert_eq!(read_frame(&mut stream).unwrap(), Some(first));
        assert_eq!(read_frame(&mut stream).unwrap(), Some(second));
        assert_eq!(read_frame::<Request>(&mut stream).unwrap(), None);
    }

    #[test]
    fn a_frame_cut_short_or_too_long_is_an_error() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &Report::Ready).unwrap();
        bytes.pop();
        assert!(read_frame::<Report>(&mut &bytes[..]).is_err());
        let long = (FRAME_BYTES_MAX + 1).to_le_bytes();
        assert!(read_frame::<Report>(&mut &long[..]).is_err());
    }
}
