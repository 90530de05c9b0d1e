//! The half of a host that follows: the other host's log, or its whole state first.

use std::collections::VecDeque;

use crate::cursor::ReplayCursor;
use crate::group::Group;
use crate::record::{Event, Ordinal};
use crate::state::StatePart;

/// What has come of the other host's guest and is not executed yet.
#[derive(Debug, Default)]
pub struct Follower {
    cursor: ReplayCursor,
    /// The guest is to execute what has come before it takes this host's inputs.
    active: bool,
    /// A whole state is to be put in place first; the parts of it that have come.
    joining: bool,
    parts: VecDeque<StatePart>,
    restored_bytes: u64,
    /// The guest has left the path of the log.
    replay_failed: bool,
}

impl Follower {
    /// The log as received.
    #[must_use]
    pub fn cursor(&mut self) -> &mut ReplayCursor {
        &mut self.cursor
    }

    /// True while a whole state comes.
    #[must_use]
    pub fn is_joining(&self) -> bool {
        self.joining
    }

    /// True when the guest has left the path of the log.
    #[must_use]
    pub fn has_faulted(&self) -> bool {
        self.replay_failed
    }

    /// The next part of a state that is to be put in place.
    pub fn next_part(&mut self) -> Option<StatePart> {
        self.parts.pop_front()
    }

    /// Adds a group; whether it has a slice.
    ///
    /// # Errors
    /// When the group does not continue the log.
    pub(super) fn push_group(&mut self, group: Group) -> Result<bool, String> {
        let has_slice = group.records.iter().any(|r| matches!(r.event, Event::Slice(_)));
        self.cursor.push_group(group).map_err(|error| error.to_string())?;
        Ok(has_slice)
    }

    pub(super) fn push_part(&mut self, part: StatePart) {
        self.parts.push_back(part);
    }

    /// A whole state is about to come: the one there is counts no more.
    pub(super) fn join(&mut self) {
        *self = Self { active: true, joining: true, ..Self::default() };
    }

    /// A log is about to come for a guest that has left `through`.
    pub(super) fn follow(&mut self, through: Ordinal) {
        self.active = true;
        self.cursor = ReplayCursor::starting_at(through);
    }

    /// No more will come. A guest that has left the path of the log may consume nothing of it.
    pub(super) fn go_live(&mut self) {
        if core::mem::take(&mut self.replay_failed) {
            self.cursor = ReplayCursor::new();
        }
        self.cursor.seal();
    }

    /// True until the guest has executed all that has come, also when this host has gone live.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active
    }

    pub(super) fn set_active(&mut self, active: bool) {
        self.active = active;
    }

    pub(super) fn fault(&mut self) {
        self.replay_failed = true;
    }

    /// Bytes in place so far.
    pub(super) fn part_restored(&mut self, part_bytes: u64, is_whole: bool) -> u64 {
        self.restored_bytes += part_bytes;
        self.joining &= !is_whole;
        self.restored_bytes
    }
}
