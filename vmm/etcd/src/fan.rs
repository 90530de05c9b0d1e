//! One question, several members: the first answer counts.
//!
//! Why not one after the other: the member that is asked first may run on the host that has just
//! died, and then a take-over would wait for its timeout. Why not all at once: each would have the
//! cluster order the same transaction. So the next one is asked when the last has refused, or has
//! been silent for a while. Asking two is safe: a replacement that was done already is found done.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::member::{Member, Refusal};
use crate::request::{Answer, Moment, Question};

/// Silence after which the next member is asked too.
const PATIENCE: Duration = Duration::from_millis(250);

/// An answer, and which member gave it.
pub struct Answered {
    /// Its place in the list.
    pub by: usize,
    /// What it said.
    pub answer: Answer,
    /// When, in the cluster's history.
    pub moment: Moment,
}

/// Asks the members in turn, `first` first. `known` is the cluster they must belong to.
///
/// # Errors
/// What each of them said when none gave an answer. At the latest after the time of one attempt and
/// [`PATIENCE`] for each member.
pub async fn ask_any(
    members: &Arc<[Member]>,
    first: usize,
    question: &Question,
    known: Option<u64>,
) -> Result<Answered, Vec<Refusal>> {
    let mut waiting = (first..members.len()).chain(0..first).peekable();
    let mut refusals = Vec::new();
    let mut asked = JoinSet::new();
    loop {
        if let Some(by) = waiting.next() {
            let (members, question) = (members.clone(), question.clone());
            asked.spawn(async move { (by, members[by].ask(question, known).await) });
        }
        // Until all have been asked, nobody is waited for longer than the patience.
        let longest = if waiting.peek().is_some() { PATIENCE } else { Duration::MAX };
        match tokio::time::timeout(longest, asked.join_next()).await {
            Ok(Some(Ok((by, Ok((answer, moment)))))) => return Ok(Answered { by, answer, moment }),
            Ok(Some(Ok((_, Err(refusal))))) => refusals.push(refusal),
            Ok(Some(Err(panicked))) => std::panic::resume_unwind(panicked.into_panic()),
            Ok(None) => return Err(refusals),
            Err(_) => {}
        }
    }
}
