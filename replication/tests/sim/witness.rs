//! The witness of the simulator: the product's decider over an entry in memory, and how the hosts
//! ask it: late, sometimes in vain, and one of them perhaps another one than the other.

use ftvmm_replication::peer::{Common, Look};
use ftvmm_replication::witness::{
    Claim, Doing, Entry, GuestId, Holder, Nonce, Purpose, Replaced, WitnessError, WitnessStore,
    claim, moment,
};
use ftvmm_replication::{LastRun, Term};

use crate::coverage::Mark;
use crate::world::{BACKUP, Due, FAULTS_END_NS, MS, OnHost, US, World};

/// How often the hosts prove their witness again.
const PROVE_EVERY_NS: u64 = 20 * MS;

/// What the witness holds.
#[derive(Clone, Default)]
pub struct Store {
    held: Option<Entry>,
    nonces: Vec<Nonce>,
}

fn holder(host: usize, life: u64) -> Holder {
    let mut unique = [0; 16];
    unique[..8].copy_from_slice(&life.to_le_bytes());
    Holder::new(&format!("host-{host}"), GuestId::from_random(unique))
}

fn guest(number: u8) -> GuestId {
    GuestId::from_random([number; 16])
}

fn live(term: Term, guest: GuestId, holder: Holder) -> Entry {
    Entry { term, guest, holder, doing: Doing::Live, ran: Some(term), seen: moment(0) }
}

impl Store {
    /// An empty one, or one that knows another pair's guest.
    pub fn new(is_taken: bool) -> Self {
        let entry = || live(Term(1), guest(2), holder(9, 0));
        Self { held: is_taken.then(entry), nonces: Vec::new() }
    }

    /// The last term given away; 0 for none.
    pub fn term(&self) -> Term {
        self.held.as_ref().map_or(Term(0), |entry| entry.term)
    }

    /// What is known of the guest.
    pub fn last_run(&self) -> LastRun {
        LastRun { guest: None, ..LastRun::of(self.held.as_ref()) }
    }

    /// A start of the guest with the command line of its first one, by a process that is new.
    pub fn starts_again(&mut self, life: u64) -> bool {
        let term = self.term().next();
        let wanted = live(term, guest(1), holder(7, life));
        claim(self, &wanted, Purpose::Start).ok() == Some(Claim::Granted)
    }

    /// A start of another guest in this one's place, as its user insists (`--force-new-guest`).
    pub fn starts_another(&mut self) -> bool {
        let term = self.term().next();
        let wanted = live(term, guest(3), holder(8, 0));
        claim(self, &wanted, Purpose::Replace).ok() == Some(Claim::Granted)
    }

    /// What the host is told; `None` when the witness cannot say.
    pub fn claim(
        &mut self,
        term: Term,
        ran: Term,
        (host, life): (usize, u64),
        begun: bool,
    ) -> Option<Claim> {
        let wanted = Entry { ran: Some(ran), ..live(term, guest(1), holder(host, life)) };
        claim(self, &wanted, if begun { Purpose::GoOn } else { Purpose::Start }).ok()
    }
}

/// The witness, and what happened to it.
pub struct Witness {
    pub store: Store,
    /// What the second host sees in its place.
    pub copied: Option<Store>,
    /// How many numbers were written into both.
    nonces: u128,
    /// The guest has made an exit somewhere: a backup that is ready waits for that too.
    pub guest_has_run: bool,
}

impl Witness {
    /// As [`Store::new`].
    pub fn new(is_taken: bool) -> Self {
        Self { store: Store::new(is_taken), copied: None, nonces: 0, guest_has_run: false }
    }
}

impl World {
    /// The one that the host sees.
    pub fn witness(&mut self, host: usize) -> &mut Store {
        match &mut self.witness.copied {
            Some(copy) if host == BACKUP => copy,
            _ => &mut self.witness.store,
        }
    }

    /// How long the witness answers nobody from now on; 0 when it does.
    pub fn witness_is_down_ns(&mut self) -> u64 {
        let (from_ns, to_ns) = self.options.witness.outage_ns.unwrap_or_default();
        let is_down = (from_ns..to_ns).contains(&self.now_ns);
        if is_down {
            self.coverage.mark(Mark::WitnessDown);
        }
        if is_down { to_ns - self.now_ns } else { 0 }
    }

    /// A backup whose last proof failed claims nothing.
    pub fn may_claim(&mut self, host: usize) -> bool {
        let core = &self.hosts[host].core;
        let common = if core.follows() { core.common_witness() } else { Common::Yes };
        match common {
            Common::Yes => true,
            Common::IfSeen(nonce) => self.witness(host).sees(nonce).unwrap_or(false),
            Common::No => false,
        }
    }

    pub fn plan_proof(&mut self, host: usize, number: u64) {
        self.witness.nonces += 1;
        let what = OnHost::Prove { number, nonce: self.witness.nonces };
        let delay_ns = self.random.between(20 * US, MS) + self.witness_is_down_ns();
        self.after_on(delay_ns, host, what);
    }

    pub fn plan_look(&mut self, host: usize, number: u64, nonce: Nonce) {
        let delay_ns = self.random.between(20 * US, MS);
        let nonce = u128::from_le_bytes(nonce.0);
        self.after_on(delay_ns, host, OnHost::LookFor { number, nonce });
    }

    pub fn prove(&mut self, host: usize, number: u64, nonce: u128) {
        let nonce = Nonce(nonce.to_le_bytes());
        if self.witness(host).prove(nonce).is_ok() {
            self.core(host, |core, _| core.proof_written(number, nonce));
        }
    }

    pub fn look_for(&mut self, host: usize, number: u64, nonce: u128) {
        let nonce = Nonce(nonce.to_le_bytes());
        let look = match self.witness_is_down_ns() {
            0 if self.witness(host).sees(nonce).unwrap_or(false) => Look::Found,
            0 => Look::Missing,
            _ => Look::Unknown,
        };
        self.core(host, |core, now_ns| core.proof_looked_for(now_ns, number, nonce, look));
    }

    /// Both prove their witness again, when it is time.
    pub fn prove_again(&mut self) {
        self.after(PROVE_EVERY_NS, Due::ProveAgain);
        if self.options.witness.copied_at_ns.is_some_and(|at_ns| self.now_ns >= at_ns)
            && self.witness.copied.is_none()
        {
            self.witness.copied = Some(self.witness.store.clone());
        }
        for host in 0..2 {
            if !self.hosts[host].is_gone() && !self.is_paused(host) {
                self.core(host, |core, _| core.prove_again());
            }
        }
    }

    /// Somebody starts the guest a second time.
    pub fn start_beside(&mut self) {
        let is_live = self.hosts.iter().any(|host| host.thread.begun && !host.is_gone());
        if is_live && self.witness.guest_has_run && self.now_ns < FAULTS_END_NS {
            let life = self.hosts[0].life + self.hosts[1].life;
            assert!(!self.witness.store.starts_again(life), "a second machine was started");
            self.coverage.mark(Mark::SecondStartRefused);
        }
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

    fn prove(&mut self, nonce: Nonce) -> Result<(), WitnessError> {
        self.nonces.push(nonce);
        Ok(())
    }

    fn sees(&mut self, nonce: Nonce) -> Result<bool, WitnessError> {
        Ok(self.nonces.contains(&nonce))
    }
}
