//! Outputs of a pair's guest: frames go to the session, disk requests to this host's disk.

use std::sync::Arc;

use ftvmm_devices::{DiskOp, Output};
use ftvmm_host::Console;
use ftvmm_replication::{Ordinal, OutputDigest, SessionEvent};

use super::Peer;
use crate::input_error::InputError;
use crate::step::OutputSink;

/// Hands frames to the session, which decides when they leave. The console is printed on both
/// hosts, so that the backup's console is complete after a take-over.
pub struct PeerOutputs {
    peer: Arc<Peer>,
    console: Arc<Console>,
}

impl PeerOutputs {
    /// Outputs that go through `peer`'s session.
    pub fn new(peer: Arc<Peer>, console: Arc<Console>) -> Self {
        Self { peer, console }
    }
}

impl OutputSink for PeerOutputs {
    #[expect(clippy::expect_used, reason = "the guest of a pair is logged")]
    fn emit(
        &mut self,
        at: Ordinal,
        digest: Option<OutputDigest>,
        output: Output,
    ) -> Result<(), InputError> {
        let frame = match output {
            Output::Frame(frame) => frame,
            Output::Console(bytes) => {
                self.console.print(&bytes);
                return Ok(());
            }
            Output::Disk(request) => {
                // The flush also waits for the backup's disk, so the backup must get the request at
                // once.
                if request.op == DiskOp::Flush {
                    self.peer.tell(|core, now_ns| {
                        core.step(now_ns, SessionEvent::FlushAsked { id: request.id });
                        core.flush_log(now_ns);
                    });
                }
                if let Some(disk) = &self.peer.disk {
                    disk.submit(request);
                }
                return Ok(());
            }
        };
        let digest = digest.expect("a frame of a logged guest has a digest");
        self.peer.tell(|core, now_ns| {
            // The backup cannot produce this output before it knows that nothing else happens at
            // this exit.
            core.flush_log(now_ns);
            core.step(now_ns, SessionEvent::Output { at, digest, frame });
        });
        Ok(())
    }
}
