//! What is refused when a card is restored; what a card does is in `tests/virtio_net.rs`.

use super::*;

const CONFIG: NetConfig = NetConfig { mac: [2, 0, 0, 0, 0, 1], mtu: DEFAULT_MTU };

fn refused(change: fn(&mut VirtioNetState)) -> &'static str {
    let mut state = VirtioNet::new(CONFIG).save();
    assert_eq!(VirtioNet::try_from(state.clone()).unwrap().save(), state);
    change(&mut state);
    VirtioNet::try_from(state).unwrap_err().field
}

#[test]
fn impossible_backlogs_are_refused() {
    let frame = || vec![0; HEADER_BYTES + 60];
    assert_eq!(
        refused(|state| state.backlog = vec![vec![]; RX_BACKLOG_FRAMES_MAX + 1]),
        "virtio_net.backlog"
    );
    assert_eq!(refused(|state| state.backlog = vec![vec![0; 11]]), "virtio_net.backlog.frame");
    assert_eq!(
        refused(|state| state.backlog = vec![vec![0; rx_frame_bytes_max(DEFAULT_MTU) + 1]]),
        "virtio_net.backlog.frame"
    );
    let mut state = VirtioNet::new(CONFIG).save();
    state.backlog = vec![frame()];
    assert_eq!(VirtioNet::try_from(state).unwrap_err().field, "virtio_net.backlog.not_live");
}

#[test]
fn a_wish_no_driver_can_know_of_and_an_mtu_below_the_smallest_are_refused() {
    assert_eq!(refused(|state| state.announce = true), "virtio_net.announce");
    assert_eq!(refused(|state| state.config.mtu = MTU_MIN - 1), "virtio_net.mtu");
}
