//! A client in memory, whose bytes arrive in small pieces.

use std::io::{Read, Result, Write};

const PIECE_BYTES: usize = 7;

/// Gives its bytes piece by piece and takes any answer.
pub struct Client<'a> {
    rest: &'a [u8],
}

impl<'a> Client<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }
}

impl Read for Client<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let piece = buffer.len().min(PIECE_BYTES);
        self.rest.read(&mut buffer[..piece])
    }
}

impl Write for Client<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}
