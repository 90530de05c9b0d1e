//! The witness, in memory.

use ftvmm_replication::WitnessError;
use ftvmm_replication::witness::{Entry, Nonce, Replaced, WitnessStore};

/// See the module documentation.
#[derive(Clone, Debug, Default)]
pub struct Store(pub Option<Entry>);

impl WitnessStore for Store {
    fn place(&self) -> String {
        "memory".into()
    }

    fn read(&mut self) -> Result<Option<Entry>, WitnessError> {
        Ok(self.0.clone())
    }

    fn replace(&mut self, expected: Option<&Entry>, new: &Entry) -> Result<Replaced, WitnessError> {
        if self.0.as_ref() != expected {
            return Ok(Replaced::Conflict(self.0.clone()));
        }
        self.0 = Some(new.clone());
        Ok(Replaced::Stored)
    }

    fn prove(&mut self, _: Nonce) -> Result<(), WitnessError> {
        Ok(())
    }

    fn sees(&mut self, _: Nonce) -> Result<bool, WitnessError> {
        Ok(true)
    }
}
