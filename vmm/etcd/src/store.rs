//! The store: one entry and the proofs of the hosts, as keys below the user's prefix.
//!
//! `PREFIX/entry` is the entry's line. It has no lease and no other limit in time: whoever holds a
//! term holds it until another entry takes its place, whatever any clock says. `PREFIX/proof/NONCE`
//! is the last nonce of a process.

use std::fmt;
use std::sync::Arc;

use ftvmm_replication::witness::{Entry, Nonce, Replaced, WitnessError, WitnessStore};
use tokio::runtime::{Builder, Runtime};

use crate::address::Address;
use crate::fan::{Answered, ask_any};
use crate::member::{Credentials, Member, Refusal};
use crate::request::{Answer, Moment, Question};

/// A witness in a cluster of etcd servers.
pub struct EtcdWitness {
    address: Address,
    members: Arc<[Member]>,
    runtime: Runtime,
    /// The member that answered last, which is asked first.
    first: usize,
    /// The newest moment of the cluster's history from which an answer came.
    newest: Option<Moment>,
    /// The nonce that this process has written last.
    proof: Option<Nonce>,
    silent: Vec<String>,
}

impl fmt::Debug for EtcdWitness {
    /// Without what must stay secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EtcdWitness({})", self.address)
    }
}

impl EtcdWitness {
    /// The witness at `address`. Asks each member which cluster it belongs to.
    ///
    /// # Errors
    /// [`WitnessError`] when no member answers, or those that do belong to different clusters.
    pub fn open(address: Address, credentials: &Credentials) -> Result<Self, WitnessError> {
        let refused = |refusals: &[Refusal]| unusable(&address, refusals);
        let members = Member::all(&address, credentials).map_err(|refusal| refused(&[refusal]))?;
        let runtime = Builder::new_current_thread().enable_all().build().map_err(|error| {
            refused(&[Refusal {
                reason: format!("no epoll descriptor for it: {error}"),
                remedy: "raise the limit of open files",
            }])
        })?;
        let members: Arc<[Member]> = members.into();
        let answers = runtime.block_on(clusters(&members, &entry_key(&address)));
        let mut silent = Vec::new();
        let mut clusters = Vec::new();
        for (member, answer) in members.iter().zip(answers) {
            match answer {
                Ok(cluster) => clusters.push((member.shown(), cluster)),
                Err(refusal) => silent.push(refusal),
            }
        }
        let Some((member, cluster)) = clusters.first() else { return Err(refused(&silent)) };
        if let Some((other, found)) = clusters.iter().find(|(_, found)| found != cluster) {
            return Err(refused(&[Refusal {
                reason: format!(
                    "{member} belongs to the cluster {cluster:x} and {other} to {found:x}"
                ),
                remedy: "name members of one cluster only",
            }]));
        }
        let newest = Some(Moment { cluster: *cluster, revision: 0 });
        let silent = silent.into_iter().map(|refusal| refusal.reason).collect();
        Ok(Self { address, members, runtime, first: 0, newest, proof: None, silent })
    }

    /// The members that did not answer when the witness was opened, each with its reason.
    #[must_use]
    pub fn silent_members(&self) -> &[String] {
        &self.silent
    }

    fn ask(&mut self, question: &Question) -> Result<Answer, WitnessError> {
        let known = self.newest.map(|newest| newest.cluster);
        let asked = ask_any(&self.members, self.first, question, known);
        let answered = self.runtime.block_on(asked);
        let Answered { by, answer, moment } =
            answered.map_err(|refusals| unusable(&self.address, &refusals))?;
        let before = self.newest.map_or(0, |newest| newest.revision);
        if moment.revision < before {
            let Moment { revision, .. } = moment;
            let reason = format!(
                "{}: the cluster is at change {revision} and was at {before} before",
                self.members[by].shown()
            );
            let remedy = "its data was put back to an older state, and may have forgotten a term";
            return Err(unusable(&self.address, &[Refusal { reason, remedy }]));
        }
        self.first = by;
        self.newest = Some(moment);
        Ok(answer)
    }

    fn entry(&self, held: Option<Vec<u8>>) -> Result<Option<Entry>, WitnessError> {
        let entry = held.map(|held| Entry::from_stored(&held)).transpose();
        entry.map_err(|found| WitnessError::Malformed {
            place: self.place(),
            found: format!("{found} at the key {}", entry_key(&self.address)),
        })
    }

    fn proof_key(&self, nonce: Nonce) -> String {
        format!("{}/proof/{nonce}", self.address.prefix())
    }
}

fn entry_key(address: &Address) -> String {
    format!("{}/entry", address.prefix())
}

/// The cluster of each member, all asked at once.
async fn clusters(members: &Arc<[Member]>, key: &str) -> Vec<Result<u64, Refusal>> {
    let ask = |at: usize| {
        let (members, key) = (members.clone(), key.to_owned());
        tokio::spawn(async move { members[at].cluster(&key).await })
    };
    let asked: Vec<_> = (0..members.len()).map(ask).collect();
    let mut answers = Vec::new();
    for answer in asked {
        let joined = answer.await;
        answers.push(joined.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())));
    }
    answers
}

/// All that was said, and what to do about the first of it.
fn unusable(address: &Address, refusals: &[Refusal]) -> WitnessError {
    let reasons: Vec<&str> = refusals.iter().map(|refusal| refusal.reason.as_str()).collect();
    WitnessError::Unusable {
        place: address.to_string(),
        reason: reasons.join("; "),
        remedy: refusals.first().map_or("", |refusal| refusal.remedy).into(),
    }
}

impl WitnessStore for EtcdWitness {
    fn place(&self) -> String {
        self.address.to_string()
    }

    fn read(&mut self) -> Result<Option<Entry>, WitnessError> {
        let answer = self.ask(&Question::Read { key: entry_key(&self.address) })?;
        self.entry(answer.held)
    }

    fn replace(&mut self, expected: Option<&Entry>, new: &Entry) -> Result<Replaced, WitnessError> {
        let key = entry_key(&self.address);
        let (expected, new) = (expected.map(Entry::to_line), new.to_line());
        let answer = self.ask(&Question::Replace { key, expected, new })?;
        match answer.is_stored {
            true => Ok(Replaced::Stored),
            false => Ok(Replaced::Conflict(self.entry(answer.held)?)),
        }
    }

    fn prove(&mut self, nonce: Nonce) -> Result<(), WitnessError> {
        let last = self.proof.filter(|last| *last != nonce).map(|last| self.proof_key(last));
        self.ask(&Question::Prove { key: self.proof_key(nonce), last })?;
        self.proof = Some(nonce);
        Ok(())
    }

    fn sees(&mut self, nonce: Nonce) -> Result<bool, WitnessError> {
        let answer = self.ask(&Question::Read { key: self.proof_key(nonce) })?;
        Ok(answer.held.is_some())
    }
}
