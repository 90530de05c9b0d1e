//! What is refused when an entropy source is restored; what it does is in
//! `tests/virtio_entropy.rs`.

use super::*;

#[test]
fn a_wish_without_a_driver_is_refused() {
    let state = VirtioEntropy::new().save();
    assert_eq!(VirtioEntropy::try_from(state.clone()).unwrap().save(), state);
    let wishing = VirtioEntropyState { wanted_bytes: 1, ..state };
    let refused = VirtioEntropy::try_from(wishing).unwrap_err();
    assert_eq!(refused.field, "virtio_entropy.wanted_bytes");
}

#[test]
fn power_on_forgets_the_wish_and_keeps_the_count() {
    let mut source = VirtioEntropy { wanted_bytes: 8, supplied_bytes: 5, ..VirtioEntropy::new() };
    source.power_on();
    assert_eq!((source.wanted_bytes(), source.supplied_bytes()), (0, 5));
}
