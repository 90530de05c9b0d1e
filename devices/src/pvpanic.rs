//! What tells that the guest's kernel panicked: the pvpanic device, and what it prints.
//!
//! | port | name | access | reset | meaning |
//! |------|------|--------|-------|---------|
//! | 0x505 | events | r | 0x03 | the events the device knows: PANICKED 0, CRASH_LOADED 1 |
//! | 0x505 | events | w | | one or more of them happened |
//!
//! QEMU's device (docs/specs/pvpanic.rst), which Linux's driver `pvpanic-mmio` finds as ACPI device
//! "QEMU0001". CRASH_LOADED says that a crash kernel takes over: nothing is to be done.
//!
//! A panic of a kernel without that driver is seen on its console: its panic begins a line with
//! [`PANIC_TEXT`] and the guest resets afterwards. A program may print the same; alone it has no
//! effect, and the flag is gone with the next power-on.
//!
//! From outside: nothing.

use serde::{Deserialize, Serialize};

use crate::state::InvalidState;

/// The port of the pvpanic device.
pub const PVPANIC_PORT: u16 = 0x505;
/// What Linux prints first (`panic`, kernel/panic.c).
pub const PANIC_TEXT: &[u8] = b"Kernel panic - not syncing";
/// Most bytes of the rest of that line that are kept.
const REASON_BYTES_MAX: usize = 100;

const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 2;

/// What is remembered; plain data, checked when it becomes a [`PanicWatch`] again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PanicState {
    event: bool,
    /// So many bytes of [`PANIC_TEXT`] have just been printed; all of them: the reason follows.
    matched: u8,
    reason: Vec<u8>,
    printed: bool,
}

/// The pvpanic device and the look at the console.
#[derive(Debug, Default)]
pub(crate) struct PanicWatch {
    state: PanicState,
}

impl TryFrom<PanicState> for PanicWatch {
    type Error = InvalidState;

    fn try_from(state: PanicState) -> Result<Self, InvalidState> {
        let matched = usize::from(state.matched) <= PANIC_TEXT.len();
        InvalidState::check(matched, "pvpanic.matched")?;
        InvalidState::check(state.reason.len() <= REASON_BYTES_MAX, "pvpanic.reason")?;
        Ok(PanicWatch { state })
    }
}

impl PanicWatch {
    pub(crate) fn save(&self) -> PanicState {
        self.state.clone()
    }

    pub(crate) fn read(&self) -> u8 {
        PANICKED | CRASH_LOADED
    }

    pub(crate) fn write(&mut self, value: u8) {
        self.state.event |= value & PANICKED != 0;
    }

    /// Whether the device was told of a panic.
    pub(crate) fn happened(&self) -> bool {
        self.state.event
    }

    /// Whether a panic was printed.
    pub(crate) fn was_printed(&self) -> bool {
        self.state.printed
    }

    /// What stood behind [`PANIC_TEXT`].
    pub(crate) fn reason(&self) -> &[u8] {
        &self.state.reason
    }

    /// Looks at what the guest prints.
    pub(crate) fn see(&mut self, printed: &[u8]) {
        for &byte in printed {
            let matched = usize::from(self.state.matched);
            if matched == PANIC_TEXT.len() {
                if byte.is_ascii_control() || self.state.reason.len() == REASON_BYTES_MAX {
                    self.state.matched = 0;
                } else {
                    self.state.reason.push(byte);
                }
            } else if byte == PANIC_TEXT[matched] {
                self.state.matched += 1;
                if matched + 1 == PANIC_TEXT.len() {
                    self.state.printed = true;
                    self.state.reason.clear();
                }
            } else {
                // The text's first byte comes nowhere else in it.
                self.state.matched = u8::from(byte == PANIC_TEXT[0]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_read_whatever_the_pieces() {
        let text = b"[    1.0] KKernel panic - not Kernel panic - not syncing: oops!\r\n---[ end";
        for piece in [1, 3, text.len()] {
            let mut watch = PanicWatch::default();
            text.chunks(piece).for_each(|piece| watch.see(piece));
            assert!(watch.was_printed() && !watch.happened());
            assert_eq!(watch.reason(), b": oops!");
        }
        let mut watch = PanicWatch::default();
        watch.see(b"Kernel panic - not synced");
        assert!(!watch.was_printed());
    }

    #[test]
    fn a_reason_without_end_is_cut() {
        let mut watch = PanicWatch::default();
        watch.see(&[PANIC_TEXT, &[b'x'; 1000][..]].concat());
        assert_eq!(watch.reason().len(), REASON_BYTES_MAX);
        assert_eq!(PanicWatch::try_from(watch.save()).unwrap().save(), watch.save());
    }

    #[test]
    fn the_device_tells_a_panic_from_a_crash_kernel_that_takes_over() {
        let mut watch = PanicWatch::default();
        assert_eq!(watch.read(), 3);
        watch.write(CRASH_LOADED);
        assert!(!watch.happened());
        watch.write(PANICKED);
        assert!(watch.happened());
    }
}
