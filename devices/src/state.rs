//! Why a saved state is refused.

/// A saved state that no device of this board could have been in: `field` names the first offender.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("saved board state is impossible: {field}")]
pub struct InvalidState {
    /// Device and field.
    pub field: &'static str,
}

impl InvalidState {
    pub(crate) fn check(holds: bool, field: &'static str) -> Result<(), InvalidState> {
        if holds { Ok(()) } else { Err(InvalidState { field }) }
    }
}
