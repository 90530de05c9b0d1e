//! What is refused when a card is restored; what a card does is in `tests/virtio_net.rs`.

use super::*;

fn refused(change: fn(&mut VirtioNetState)) -> &'static str {
    let mut state = VirtioNet::new([2, 0, 0, 0, 0, 1]).save();
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
        refused(|state| state.backlog = vec![vec![0; RX_FRAME_BYTES_MAX + 1]]),
        "virtio_net.backlog.frame"
    );
    let mut state = VirtioNet::new([0; 6]).save();
    state.backlog = vec![frame()];
    assert_eq!(VirtioNet::try_from(state).unwrap_err().field, "virtio_net.backlog.not_live");
}
