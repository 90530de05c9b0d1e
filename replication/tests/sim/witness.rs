//! The witness of the simulator: the product's decider over an entry in memory.

use ftvmm_replication::Term;
use ftvmm_replication::witness::{
    Claim, Doing, Entry, GuestId, Holder, Nonce, Purpose, Replaced, WitnessError, WitnessStore,
    claim, moment,
};

/// What the witness holds.
#[derive(Default)]
pub struct Store {
    held: Option<Entry>,
}

fn holder(host: usize, life: u64) -> Holder {
    let mut unique = [0; 16];
    unique[..8].copy_from_slice(&life.to_le_bytes());
    Holder::new(&format!("host-{host}"), GuestId::from_random(unique))
}

fn guest(number: u8) -> GuestId {
    GuestId::from_random([number; 16])
}

impl Store {
    /// An empty one, or one that knows another pair's guest.
    pub fn new(is_taken: bool) -> Self {
        let entry = |term| Entry {
            term: Term(term),
            guest: guest(2),
            holder: holder(9, 0),
            doing: Doing::Live,
            seen: moment(0),
        };
        Self { held: is_taken.then(|| entry(1)) }
    }

    /// The last term given away; 0 for none.
    pub fn term(&self) -> Term {
        self.held.as_ref().map_or(Term(0), |entry| entry.term)
    }

    /// What the host is told; `None` when the witness cannot say.
    pub fn claim(&mut self, term: Term, host: usize, life: u64, begun: bool) -> Option<Claim> {
        let holder = holder(host, life);
        let doing = Doing::Live;
        let wanted = Entry { term, guest: guest(1), holder, doing, seen: moment(0) };
        claim(self, &wanted, if begun { Purpose::GoOn } else { Purpose::Start }).ok()
    }
}

impl WitnessStore for Store {
    fn place(&self) -> String {
        "memory".into()
    }

    fn read(&mut self) -> Result<Option<Entry>, WitnessError> {
        Ok(self.held.clone())
    }

    fn replace(&mut self, expected: Option<&Entry>, new: &Entry) -> Result<Replaced, WitnessError> {
        if self.held.as_ref() != expected {
            return Ok(Replaced::Conflict(self.held.clone()));
        }
        self.held = Some(new.clone());
        Ok(Replaced::Stored)
    }

    fn prove(&mut self, _: Nonce) -> Result<(), WitnessError> {
        Ok(())
    }

    fn sees(&mut self, _: Nonce) -> Result<bool, WitnessError> {
        Ok(true)
    }
}
