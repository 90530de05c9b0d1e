//! The end of a run whose guest may switch itself off: its power button, and the grace it has then.

use ftvmm_devices::Input;
use ftvmm_replication::{GuestNs, HostNs};

use crate::input::alarm::AlarmPlan;
use crate::input::live_queue::{Shutdown, Waiting};
use crate::step::StopCause;

/// Presses the power button when the run is to end, and ends it when nobody listens or the guest
/// has had its time.
pub(super) fn mind_shutdown(
    waiting: &mut Waiting,
    heard: bool,
    alarm: &mut AlarmPlan,
    (host, guest): (HostNs, GuestNs),
) {
    match waiting.shutdown {
        Shutdown::No => {}
        Shutdown::Wanted if heard => {
            let grace_ns = u64::try_from(waiting.grace.as_nanos()).unwrap_or(u64::MAX);
            waiting.shutdown = Shutdown::Grace { until: host.saturating_add_ns(grace_ns) };
            // Not before it is over by the host's clock.
            alarm.give_grace(Some(guest.saturating_add_ns(grace_ns)));
            waiting.signals.push_back(Input::PowerButton);
            tracing::info!(
                seconds = grace_ns / 1_000_000_000,
                "the guest's power button is pressed"
            );
        }
        Shutdown::Wanted => waiting.stop = waiting.stop.or(Some(StopCause::Requested)),
        Shutdown::Grace { .. } => {
            mind_grace(waiting, host);
        }
    }
}

/// Ends the run when the guest has had its time to switch itself off; whether it has had it.
pub(super) fn mind_grace(waiting: &mut Waiting, host: HostNs) -> bool {
    let Some(until) = grace_until(waiting) else { return false };
    let is_over = host >= until;
    if is_over && waiting.stop.is_none() {
        tracing::warn!("the guest did not switch itself off; the run ends");
        waiting.stop = Some(StopCause::Requested);
    }
    is_over
}

/// Until when a guest whose power button was pressed has time.
pub(super) fn grace_until(waiting: &Waiting) -> Option<HostNs> {
    match waiting.shutdown {
        Shutdown::Grace { until } => Some(until),
        _ => None,
    }
}
