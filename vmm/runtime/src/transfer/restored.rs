//! The state of a snapshot, which is put in place before the guest is given anything else.

use std::sync::Arc;

use ftvmm_host::disk::Disk;

use super::put_on_disk;
use crate::input_error::InputError;
use crate::snapshot::Parts;
use crate::step::Step;

/// See the module documentation.
pub struct Restore {
    parts: Parts,
    disk: Option<Arc<Disk>>,
}

impl Restore {
    /// Puts `parts` in place; what they hold of the disk goes to `disk`, which a replay does
    /// without.
    pub fn new(parts: Parts, disk: Option<Arc<Disk>>) -> Self {
        Self { parts, disk }
    }

    /// The next part that is for the guest; `None` after the last.
    ///
    /// # Errors
    /// When the snapshot cannot be read, or the disk not be written.
    pub fn next_step(&mut self) -> Result<Option<Step>, InputError> {
        let part = self.parts.next_part().map_err(|cause| InputError::SnapshotRead { cause })?;
        let Some(part) = part else { return Ok(None) };
        if let Some(disk) = &self.disk {
            put_on_disk(disk, &part).map_err(|cause| InputError::Disk { cause })?;
        }
        Ok(Some(Step::RestoreState(part)))
    }
}
