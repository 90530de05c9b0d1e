//! The end of a run whose guest may switch itself off: its power button, and the grace it has then.

use ftvmm_devices::Input;
use ftvmm_machine::situation::StopCause;
use ftvmm_replication::{GuestNs, HostNs};

use crate::input::guest_timer::TimerPlan;
use crate::input::input_queue::{Pending, Shutdown, Urgency};

/// Presses the power button when the run is to end, and ends it when nobody listens or the guest
/// has had its time.
pub(super) fn mind_shutdown(
    pending: &mut Pending,
    heard: bool,
    timer: &mut TimerPlan,
    (host, guest): (HostNs, GuestNs),
) {
    match pending.shutdown {
        Shutdown::No => {}
        Shutdown::Wanted if heard => {
            let grace_ns = u64::try_from(pending.grace.as_nanos()).unwrap_or(u64::MAX);
            pending.shutdown = Shutdown::Grace { until: host.saturating_add_ns(grace_ns) };
            // Not before it is over by the host's clock.
            timer.give_grace(Some(guest.saturating_add_ns(grace_ns)));
            pending.signals.push_back(Input::PowerButton);
            tracing::info!(
                seconds = grace_ns / 1_000_000_000,
                "the guest's power button is pressed"
            );
        }
        Shutdown::Wanted => {
            pending.stop = pending.stop.or(Some((StopCause::Requested, Urgency::NextExit)))
        }
        Shutdown::Grace { .. } => {
            mind_grace(pending, host);
        }
    }
}

/// Ends the run when the guest has had its time to switch itself off; whether it has had it.
pub(super) fn mind_grace(pending: &mut Pending, host: HostNs) -> bool {
    let Some(until) = grace_until(pending) else { return false };
    let is_over = host >= until;
    if is_over && pending.stop.is_none() {
        tracing::warn!("the guest did not switch itself off; the run ends");
        pending.stop = Some((StopCause::Requested, Urgency::NextExit));
    }
    is_over
}

/// Until when a guest whose power button was pressed has time.
pub(super) fn grace_until(pending: &Pending) -> Option<HostNs> {
    match pending.shutdown {
        Shutdown::Grace { until } => Some(until),
        _ => None,
    }
}
