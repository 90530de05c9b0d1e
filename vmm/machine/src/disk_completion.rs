//! What came of a request to the guest's disk.

use ftvmm_devices::DiskOutcome;
use serde::{Deserialize, Serialize};

/// How a request ended on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completion {
    /// The request.
    pub id: u64,
    /// Its first sector, if it has one.
    pub sector: Option<u64>,
    /// It was a flush.
    pub is_flush: bool,
    /// For the guest.
    pub outcome: DiskOutcome,
    /// The host's error, for a request that failed.
    pub error: Option<String>,
}

impl Completion {
    /// What failed, in a line.
    pub fn failure(&self) -> Option<String> {
        let error = self.error.as_ref()?;
        Some(match self.sector {
            Some(sector) => format!("request {} at sector {sector}: {error}", self.id),
            None => format!("request {}: {error}", self.id),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_with_its_place_where_it_has_one() {
        let failed = Completion {
            id: 3,
            sector: Some(8),
            is_flush: false,
            outcome: DiskOutcome::Failed,
            error: Some("no space left".into()),
        };
        assert_eq!(failed.failure().unwrap(), "request 3 at sector 8: no space left");
        let flush = Completion { sector: None, is_flush: true, ..failed };
        assert_eq!(flush.failure().unwrap(), "request 3: no space left");
        assert_eq!(Completion { error: None, ..flush }.failure(), None);
    }
}
