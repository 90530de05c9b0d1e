//! Hand-over: this host does not run the vCPU thread, so the backup is to take over.

use super::{Phase, Primary};
use crate::session::Context;
use crate::session::decision::Trouble;

impl Primary {
    /// Only when the backup can continue at once.
    pub(super) fn on_vcpu_stuck(&mut self, cx: &mut Context<'_>, unseen_ns: u64) {
        if let Phase::Protected = self.phase {
            let detail = format!("the guest's processor was not seen for {unseen_ns} ns");
            self.carry_out(cx, Trouble::VcpuStuck, &detail);
        }
    }

    /// The backup takes a primary that hung up for dead, and has some time to do so.
    pub(super) fn hand_over(&mut self, cx: &mut Context<'_>) {
        cx.hang_up();
        let deadline_ns = cx.now_ns + cx.config.hand_over_ns();
        self.phase = Phase::HandingOver { deadline_ns };
    }
}
