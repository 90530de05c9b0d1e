//! The proof that both hosts see one witness, on threads of its own: a witness may take its time.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ftvmm_host::contain::Thread;
use ftvmm_host::entropy::host_random;
use ftvmm_host::sync::lock;
use ftvmm_replication::peer::{Common, Look};
use ftvmm_replication::witness::Nonce;

use super::Peer;

/// A file on a shared folder may show on the other host a little later. Both together are less than
/// a handshake may take.
const LOOKS: u32 = 8;
const PAUSE: Duration = Duration::from_millis(250);
/// Most threads at a time. Each connection needs two; a witness that does not answer keeps them.
const THREADS_MAX: u32 = 8;

impl Peer {
    /// A backup whose witness is another one than the primary's may be granted there what the
    /// primary is granted too. A primary was granted its term by the witness that it asks.
    pub(super) fn may_claim(&self) -> bool {
        let common = {
            let core = self.lock();
            if core.follows() { core.common_witness() } else { Common::Yes }
        };
        match common {
            Common::Yes => true,
            Common::IfSeen(nonce) => lock(&self.witness.access).store.sees(nonce).unwrap_or(false),
            Common::No => false,
        }
    }

    /// Writes a new number into the witness.
    pub(super) fn write_proof(self: &Arc<Self>, number: u64) {
        self.on_proof_thread(move |peer| {
            let Ok(nonce) = host_random().map(Nonce) else {
                return tracing::error!("the host has no random bytes for a proof of the witness");
            };
            for _ in 0..LOOKS {
                let written = lock(&peer.witness.access).store.prove(nonce);
                match written {
                    Ok(()) => {
                        peer.say_of_witness(None, "");
                        return peer.tell(|core, _| core.proof_written(number, nonce));
                    }
                    Err(error) => {
                        peer.say_of_witness(Some(error), "the witness takes no proof");
                    }
                }
                std::thread::sleep(PAUSE);
            }
        });
    }

    /// Looks for the other host's number.
    pub(super) fn look_for_proof(self: &Arc<Self>, number: u64, nonce: Nonce) {
        self.on_proof_thread(move |peer| {
            let look = peer.look(nonce);
            peer.tell(|core, now_ns| core.proof_looked_for(now_ns, number, nonce, look));
        });
    }

    fn look(&self, nonce: Nonce) -> Look {
        let mut look = Look::Unknown;
        for attempt in 0..LOOKS {
            if attempt > 0 {
                std::thread::sleep(PAUSE);
            }
            let seen = lock(&self.witness.access).store.sees(nonce);
            look = match seen {
                Ok(true) => return Look::Found,
                Ok(false) => Look::Missing,
                Err(error) => {
                    let what = "the witness does not show the other host's proof";
                    self.say_of_witness(Some(error), what);
                    Look::Unknown
                }
            };
        }
        look
    }

    fn on_proof_thread(self: &Arc<Self>, work: impl FnOnce(&Arc<Self>) + Send + 'static) {
        let threads = &self.witness.proofs;
        if threads.fetch_add(1, Ordering::AcqRel) >= THREADS_MAX {
            threads.fetch_sub(1, Ordering::AcqRel);
            return tracing::warn!("the witness still has to answer older questions");
        }
        let peer = Arc::clone(self);
        let run = move || {
            work(&peer);
            peer.witness.proofs.fetch_sub(1, Ordering::AcqRel);
        };
        if let Err(error) = Thread::Witness.start(run) {
            threads.fetch_sub(1, Ordering::AcqRel);
            tracing::error!(%error, "no thread to ask the witness");
        }
    }
}
