//! What one member of the cluster is asked, and what its answer means.
//!
//! Reads are linearizable, etcd's default: the member asks most of the cluster before it answers,
//! so that one that was cut off cannot show an old entry. A replacement is one transaction, which
//! the cluster orders.

use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, Error, GetOptions, KeyValue, PutOptions,
    ResponseHeader, Txn, TxnOp, TxnOpResponse,
};

/// How long a proof outlives the process that wrote it, in seconds. Nothing is decided by its end:
/// the lease is there so that keys of killed processes do not pile up.
const PROOF_LEFT_S: i64 = 300;

/// A question to the cluster.
#[derive(Clone, Debug)]
pub enum Question {
    /// What is at this key now?
    Read {
        /// The key.
        key: String,
    },
    /// Put `new` where `expected` is.
    Replace {
        /// The key.
        key: String,
        /// What must be there; `None` when there must be nothing.
        expected: Option<String>,
        /// What takes its place.
        new: String,
    },
    /// Write a proof.
    Prove {
        /// Its key.
        key: String,
        /// The key of the proof that it takes the place of.
        last: Option<String>,
    },
}

/// The cluster's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Whether what was to be written is stored.
    pub is_stored: bool,
    /// What is at the key, when nothing was written.
    pub held: Option<Vec<u8>>,
}

impl Answer {
    const STORED: Self = Self { is_stored: true, held: None };

    fn held(held: Option<Vec<u8>>) -> Self {
        Self { is_stored: false, held }
    }
}

/// Where in a cluster's history an answer was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// The cluster's number. A cluster made anew, also from a snapshot, has another.
    pub cluster: u64,
    /// The number of changes that the store had seen. It never goes back.
    pub revision: i64,
}

/// Why an answer is none.
#[derive(Debug)]
pub enum Fault {
    /// etcd, or the way to it, said so.
    Etcd(Error),
    /// The answer lacks a part that etcd always sends.
    Incomplete,
    /// The member belongs to another cluster than the one that answered before.
    OtherCluster {
        /// The one that answered before.
        known: u64,
        /// The member's.
        found: u64,
    },
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Etcd(error)
    }
}

fn moment(header: Option<&ResponseHeader>) -> Result<Moment, Fault> {
    let header = header.ok_or(Fault::Incomplete)?;
    Ok(Moment { cluster: header.cluster_id(), revision: header.revision() })
}

fn value(kvs: &[KeyValue]) -> Option<Vec<u8>> {
    kvs.first().map(|kv| kv.value().to_vec())
}

/// Asks a member which cluster it belongs to; it answers on its own, also when it was cut off.
///
/// # Errors
/// When it does not answer.
pub async fn cluster_of(client: &mut Client, key: &str) -> Result<u64, Fault> {
    let alone = GetOptions::new().with_serializable().with_count_only();
    let said = client.get(key, Some(alone)).await?;
    Ok(moment(said.header())?.cluster)
}

/// Asks a member. `known` is the cluster that it must belong to: two clusters named in one address
/// would each give a term away.
///
/// # Errors
/// When it gives no answer, or one that counts for nothing. What was to be written may be written.
pub async fn ask(
    client: &mut Client,
    question: Question,
    known: Option<u64>,
) -> Result<(Answer, Moment), Fault> {
    let is_write = !matches!(question, Question::Read { .. });
    let check = |found: u64| match known {
        Some(known) if known != found => Err(Fault::OtherCluster { known, found }),
        _ => Ok(()),
    };
    // Before anything is written: afterwards would be too late.
    if is_write && known.is_some() {
        let (Question::Replace { key, .. } | Question::Prove { key, .. } | Question::Read { key }) =
            &question;
        check(cluster_of(client, key).await?)?;
    }
    let (answer, moment) = match question {
        Question::Read { key } => {
            let said = client.get(key, None).await?;
            (Answer::held(value(said.kvs())), moment(said.header())?)
        }
        Question::Replace { key, expected, new } => replace(client, key, expected, new).await?,
        Question::Prove { key, last } => {
            let lease = client.lease_grant(PROOF_LEFT_S, None).await?.id();
            let put = TxnOp::put(key, "", Some(PutOptions::new().with_lease(lease)));
            let delete = last.map(|last| TxnOp::delete(last, None::<DeleteOptions>));
            let operations: Vec<TxnOp> = [put].into_iter().chain(delete).collect();
            let said = client.txn(Txn::new().and_then(operations)).await?;
            (Answer::STORED, moment(said.header())?)
        }
    };
    check(moment.cluster)?;
    Ok((answer, moment))
}

async fn replace(
    client: &mut Client,
    key: String,
    expected: Option<String>,
    new: String,
) -> Result<(Answer, Moment), Fault> {
    let is_expected = match expected {
        Some(expected) => Compare::value(key.clone(), CompareOp::Equal, expected),
        None => Compare::version(key.clone(), CompareOp::Equal, 0),
    };
    let txn = Txn::new()
        .when([is_expected])
        .and_then([TxnOp::put(key.clone(), new.clone(), None)])
        .or_else([TxnOp::get(key, None)]);
    let said = client.txn(txn).await?;
    let moment = moment(said.header())?;
    if said.succeeded() {
        return Ok((Answer::STORED, moment));
    }
    let Some(TxnOpResponse::Get(held)) = said.op_responses().into_iter().next() else {
        return Err(Fault::Incomplete);
    };
    let held = value(held.kvs());
    // Stored by an attempt whose answer was lost, or that is still under way by another member.
    let is_ours = held.as_deref() == Some(new.as_bytes());
    Ok((if is_ours { Answer::STORED } else { Answer::held(held) }, moment))
}
