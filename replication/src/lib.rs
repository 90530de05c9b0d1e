//! Log records, replay cursor, output gate and the role state machine. Decides; does no I/O, knows no KVM.
