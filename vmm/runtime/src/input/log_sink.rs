//! Where log records go.

use ftvmm_replication::{Ordinal, Record};

use crate::input_error::InputError;

/// Where log records go: a file, or the channel to a backup.
pub trait LogSink {
    /// Takes a record.
    ///
    /// # Errors
    /// When the sink is broken.
    fn append(&mut self, record: &Record) -> Result<(), InputError>;

    /// The guest leaves exit `at`: no further record will name it.
    ///
    /// # Errors
    /// When the sink is broken.
    fn exit_complete(&mut self, at: Ordinal) -> Result<(), InputError>;

    /// The guest waits at its exit: what was appended should get where it goes.
    ///
    /// # Errors
    /// When the sink is broken.
    fn idle(&mut self) -> Result<(), InputError>;
}
