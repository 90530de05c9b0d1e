//! Inputs from the live host: its clock, its tap, its console.
//!
//! A run that is recorded takes them at exits. When the guest makes none for too long after an
//! input came, it is stopped where it is, and that point becomes a slice.
//!
//! [`LiveCore`] decides. This module reads the host's clock and random numbers, sets the timer, and
//! waits.

mod core;
mod shutdown;
mod slices;

use std::sync::Arc;

use ftvmm_devices::Input;
use ftvmm_host::clock::{HostClock, host_unix_seconds};
use ftvmm_host::entropy::host_random_bytes;
use ftvmm_machine::situation::{RunMode, RunSituation};
use ftvmm_replication::{GuestClock, GuestNs, Ordinal};

use self::core::{Host, LiveCore, Next};
use super::guest_timer::GuestTimer;
use super::input_queue::InputQueue;
use super::slice_pacing::InputDelays;
use crate::input_error::InputError;
use crate::step::Step;

/// Takes from a [`InputQueue`] and samples the host's clock.
pub struct LiveInputs {
    queue: Arc<InputQueue>,
    clock: HostClock,
    timer: GuestTimer,
    core: LiveCore,
}

impl LiveInputs {
    /// Live inputs for a guest at power-on.
    pub fn new(
        queue: Arc<InputQueue>,
        clock: HostClock,
        timer: GuestTimer,
        delays: InputDelays,
    ) -> Self {
        let at_power_on = GuestNs(0);
        let guest = GuestClock::anchored(clock.host_now(), at_power_on);
        Self { queue, clock, timer, core: LiveCore::new(guest, at_power_on, delays) }
    }

    /// The guest was restored from a snapshot, perhaps not the only one. Its first input gives it a
    /// new identity.
    pub fn renew_identity(&mut self) {
        self.core.renew_identity();
    }

    /// Continues with another clock, after the guest has seen guest time up to `last`.
    pub fn resume(&mut self, clock: GuestClock, last: GuestNs) {
        self.core.resume(clock, last);
        self.set_alarm();
    }

    fn set_alarm(&mut self) {
        if let Some(setting) = self.core.take_setting() {
            self.timer.set(setting);
        }
    }
}

fn host_random(bytes: u64) -> Result<Vec<u8>, InputError> {
    host_random_bytes(bytes).map_err(|cause| InputError::Entropy { cause })
}

fn host_new_identity() -> Result<Input, InputError> {
    let mut generation_id = [0; 16];
    let bytes = host_random(generation_id.len() as u64)?;
    generation_id.copy_from_slice(&bytes);
    Ok(Input::NewIdentity { generation_id, unix_s: host_unix_seconds() })
}

impl LiveInputs {
    /// The next thing to do in this situation. Waits while the guest is halted.
    ///
    /// # Errors
    /// When the host gives no random bytes.
    pub fn next(&mut self, situation: &RunSituation) -> Result<Step, InputError> {
        let queue = &self.queue;
        let mut pending = queue.lock();
        let mut now = self.clock.host_now();
        let is_unrecorded = queue.is_unrecorded();
        let mut next =
            self.core.next(situation, Host { now, is_unrecorded, pending: &mut pending });
        let step = loop {
            let until = match next {
                Next::Wait { until } => until,
                Next::Step(step) => break step,
                Next::Entropy { bytes } => {
                    break Step::Apply(Input::Entropy { bytes: host_random(bytes)? });
                }
                Next::NewIdentity => break Step::Apply(host_new_identity()?),
                Next::Leave { now } => {
                    pending.left = Some((self.clock, now));
                    break Step::Proceed;
                }
            };
            pending = queue.sleep(pending, until.map(|until| until.since(now)));
            now = self.clock.host_now();
            let is_unrecorded = queue.is_unrecorded();
            next = self.core.wake(situation, Host { now, is_unrecorded, pending: &mut pending });
        };
        drop(pending);
        self.set_alarm();
        Ok(step)
    }

    /// The guest's state was restored from a snapshot; it has seen guest time up to `last`.
    pub fn restored(&mut self, last: GuestNs) {
        self.resume(GuestClock::anchored(self.clock.host_now(), last), last);
        // Pending disk completions came with the state.
        self.queue.disk_completed();
    }

    /// The guest leaves exit `at`; how far may it run? `interrupt_waits` says that the guest could
    /// not take an interrupt here that is pending.
    pub fn run_mode(&mut self, at: Ordinal, interrupt_waits: bool) -> RunMode {
        self.queue.leave_exit(at);
        let clock = self.clock;
        let mode =
            self.core.leave(interrupt_waits, self.queue.is_unrecorded(), || clock.host_now());
        self.set_alarm();
        mode
    }
}

#[cfg(test)]
mod tests;
