//! Announces the guest to the network's switches: every address it sends from, in every VLAN.
//!
//! An [`Announcer`] says when. A timer asks it, so no thread waits for it.

use std::sync::Arc;
use std::time::Duration;

use ftvmm_devices::{NetSource, NetSources};
use ftvmm_host::clock::HostClock;
use ftvmm_host::{HostEventsError, Tap, Ticker, VNET_HEADER_BYTES, resting_timer, set_timer};
use ftvmm_replication::peer::Announcer;

use crate::input::InputQueue;

/// Shortest Ethernet frame without its checksum.
const FRAME_BYTES_MIN: usize = 60;
const BROADCAST: [u8; 6] = [0xff; 6];
/// RFC 903: Ethernet type 0x8035; hardware Ethernet, protocol IPv4, operation 3, "request reverse".
const RARP_REQUEST: [u8; 10] = [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3];

/// Interval at which a timer checks whether a snapshot has been restored.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Announces the guest once: this host sends a frame for every address the guest has sent from. A
/// guest that has sent anything is asked to announce itself too, because only it knows its other
/// addresses.
pub fn announce(mac: [u8; 6], queue: &InputQueue, transmit: impl Fn(&[u8])) {
    let sources = queue.network().sources();
    frames(mac, &sources).for_each(|frame| transmit(&frame));
    if sources.iter().next().is_some() {
        queue.push_announce();
    }
}

/// A timer that announces a guest without a pair after it was restored from a snapshot: the
/// switches may still send its frames to another host.
///
/// # Errors
/// When the host refuses a timer.
pub fn restored(
    tap: Tap,
    mac: [u8; 6],
    queue: Arc<InputQueue>,
) -> Result<Ticker<impl FnMut()>, HostEventsError> {
    let (timer, clock) = (resting_timer()?, HostClock::host_start());
    let (mut announcer, mut is_restored) = (Announcer::default(), false);
    set_timer(&timer, Some(LOOK_EVERY));
    Ok(Ticker::on(timer.clone(), move || {
        let now_ns = clock.host_now_ns();
        // Where it sends from is in its state.
        if !is_restored && queue.last_exit() > 0 {
            is_restored = true;
            announcer.start(now_ns);
        }
        if announcer.is_due(now_ns) {
            announce(mac, &queue, |frame| {
                if !tap.write_frame(frame).unwrap_or(false) {
                    queue.network().tap_dropped();
                }
            });
        }
        if !(is_restored && announcer.is_done()) {
            set_timer(&timer, Some(LOOK_EVERY));
        }
    }))
}

/// What announces a guest whose card has the address `mac` and which has sent from `sources`. The
/// card's own goes out even when the guest has not used it, for one that only listens.
fn frames(mac: [u8; 6], sources: &NetSources) -> impl Iterator<Item = Vec<u8>> {
    let own = NetSource::untagged(mac);
    let others = sources.iter().filter(move |source| **source != own);
    std::iter::once(frame(&own)).chain(others.map(frame))
}

/// A broadcast RARP request from `source`, behind an empty virtio-net header. Every switch learns
/// the port, and no host answers. Unlike a gratuitous ARP it does not need the guest's IP
/// addresses.
fn frame(source: &NetSource) -> Vec<u8> {
    let NetSource { mac, tags } = source;
    let mut frame = vec![0; VNET_HEADER_BYTES];
    frame.extend(BROADCAST);
    frame.extend(mac);
    for tag in tags.iter().flatten() {
        frame.extend(tag.kind.ethernet_type().to_be_bytes());
        frame.extend(tag.id.to_be_bytes());
    }
    frame.extend(RARP_REQUEST);
    frame.extend(mac);
    frame.extend([0; 4]);
    frame.extend(mac);
    frame.extend([0; 4]);
    frame.resize(frame.len().max(VNET_HEADER_BYTES + FRAME_BYTES_MIN), 0);
    frame
}

#[cfg(test)]
mod tests {
    use ftvmm_devices::{VlanKind, VlanTag};

    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

    #[test]
    fn announces_the_mac_as_source_and_as_target() {
        let frame = &frame(&NetSource::untagged(MAC))[VNET_HEADER_BYTES..];
        assert_eq!(frame.len(), FRAME_BYTES_MIN);
        assert_eq!((&frame[..6], &frame[6..12]), (&BROADCAST[..], &MAC[..]));
        assert_eq!((&frame[22..28], &frame[32..38]), (&MAC[..], &MAC[..]));
    }

    #[test]
    fn tags_stand_where_the_guest_puts_them() {
        let tags = [(VlanKind::Service, 100), (VlanKind::Customer, 5)]
            .map(|(kind, id)| Some(VlanTag { kind, id }));
        let frame = &frame(&NetSource { mac: MAC, tags })[VNET_HEADER_BYTES..];
        assert_eq!(frame[12..20], [0x88, 0xa8, 0, 100, 0x81, 0, 0, 5]);
        assert_eq!(frame[20..30], RARP_REQUEST);
        assert_eq!(frame.len(), FRAME_BYTES_MIN);
    }

    #[test]
    fn every_address_is_announced_once_and_the_cards_own_always() {
        let vlan =
            NetSource { mac: MAC, tags: [Some(VlanTag { kind: VlanKind::Customer, id: 5 }), None] };
        let other = NetSource::untagged([6, 0, 0, 0, 0, 1]);
        let own = NetSource::untagged(MAC);
        for (sources, wanted) in [
            (vec![], vec![own]),
            (vec![other, own, vlan], vec![own, other, vlan]),
            (vec![vlan], vec![own, vlan]),
        ] {
            let sources = NetSources::try_from(sources).unwrap();
            let wanted: Vec<_> = wanted.iter().map(frame).collect();
            assert_eq!(frames(MAC, &sources).collect::<Vec<_>>(), wanted);
        }
    }
}
