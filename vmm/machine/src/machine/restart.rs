//! A guest that ends its own execution: the run ends, or the machine goes back to power-on in the
//! same run. The choice depends only on the guest and on the policy in the fingerprint, so both
//! hosts and every replay agree. Ordinals, guest time and the exit chain continue.

use ftvmm_devices::PowerEvent;
use ftvmm_replication::{OnPanic, OnReset, Ordinal};

use super::Machine;
use super::firmware::act_as_firmware;
use crate::boot::BootImage;
use crate::cpu::Cpu;
use crate::situation::StopCause;
use crate::vcpu_state::VcpuState;
use crate::virtual_machine::RestartError;

/// What the exit chain takes for the address of a reset.
const RESET_ADDRESS: u64 = u64::MAX - 2;
/// A guest that resets more often than once in so long is not worth a line each time.
const TELL_EVERY_NS: u64 = 1_000_000_000;

/// What the machine is at power-on, and when it goes back there.
pub struct Start {
    /// What is loaded into memory.
    pub image: BootImage,
    /// The processor, before its first instruction.
    pub vcpu: VcpuState,
    /// What a reset leads to.
    pub on_reset: OnReset,
    /// What a panic of the guest's kernel leads to.
    pub on_panic: OnPanic,
}

/// What is to happen now.
pub(super) enum Verdict {
    GoOn,
    Restart,
    End(StopCause),
}

impl<C: Cpu> Machine<C> {
    /// What the guest's wish leads to.
    pub(super) fn verdict(&self, event: PowerEvent) -> Verdict {
        let Start { on_reset, on_panic, .. } = &self.start;
        let panicked = self.board.panic_was_printed() && *on_panic != OnPanic::Ignore;
        match (event, panicked, on_panic, on_reset) {
            (PowerEvent::PowerOff, ..) => Verdict::End(StopCause::GuestPowerOff),
            (PowerEvent::Panic, .., OnPanic::Ignore, _) => Verdict::GoOn,
            (PowerEvent::Panic, .., OnPanic::End, _)
            | (PowerEvent::Reset, true, OnPanic::End, _) => Verdict::End(StopCause::GuestPanic),
            (PowerEvent::Panic, ..) | (PowerEvent::Reset, true, ..) => Verdict::Restart,
            (PowerEvent::Reset, false, _, OnReset::Restart) => Verdict::Restart,
            (PowerEvent::Reset, false, _, OnReset::End) => Verdict::End(StopCause::GuestReset),
        }
    }

    /// What a triple fault leads to: Linux resets by one when all else fails.
    pub(super) fn verdict_of_shutdown(&self) -> Verdict {
        match self.verdict(PowerEvent::Reset) {
            Verdict::End(StopCause::GuestReset) => Verdict::End(StopCause::GuestTripleFault),
            verdict => verdict,
        }
    }

    /// Goes back to power-on, at exit `at`.
    pub(super) fn power_on_again(&mut self, at: Ordinal) -> Result<(), RestartError> {
        let panicked = self.board.panic_was_printed();
        let reason = self.board.panic_reason().escape_ascii().to_string();
        self.vcpu.power_on_again(&self.start.vcpu)?;
        self.start.image.load(&self.memory, &self.vcpu)?;
        self.board.reset();
        self.publish_network();
        act_as_firmware(&mut self.board);
        self.tsc.reset();
        self.chain.link(at, RESET_ADDRESS, &[]);
        let (now_ns, resets) = (self.board.now_ns(), self.board.resets());
        if self.told_ns.is_none_or(|told_ns| now_ns - told_ns >= TELL_EVERY_NS) {
            self.told_ns = Some(now_ns);
            match panicked {
                true => tracing::warn!(
                    exit = at.0,
                    resets,
                    "the guest's kernel panicked{reason}; it is started again"
                ),
                false => tracing::info!(
                    exit = at.0,
                    resets,
                    "the guest reset the machine; it is started again"
                ),
            }
        }
        Ok(())
    }
}
