//! Power: what the guest asks the machine to do with itself, and what happens to it as a whole.

use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::Board;
use crate::acpi::{AcpiPm, GENERATION_ID_ADDRESS};
use crate::pic::Pic;
use crate::pit::Pit;
use crate::pvpanic::PanicWatch;
use crate::reset::{PowerEvent, ResetPorts};

impl Board {
    /// What the guest has asked the machine to do with itself; stays until the next
    /// [`Self::reset`]. A panic the guest only printed counts when it is followed by a reset
    /// ([`Self::panic_was_printed`]).
    pub fn power_event(&self) -> Option<PowerEvent> {
        let panic = self.panic.happened().then_some(PowerEvent::Panic);
        self.reset.power_event().or(self.acpi.power_event()).or(panic)
    }

    /// Whether the guest has told of a panic since power-on, by its device or on its console.
    pub fn panic_was_printed(&self) -> bool {
        self.panic.was_printed() || self.panic.happened()
    }

    /// What the guest printed of why it panicked; at most 100 bytes.
    pub fn panic_reason(&self) -> &[u8] {
        self.panic.reason()
    }

    /// Whether the guest listens to its power button.
    pub fn hears_power_button(&self) -> bool {
        self.acpi.hears_power_button()
    }

    /// Whether a non-maskable interrupt waits for the processor.
    pub fn nmi_pending(&self) -> bool {
        self.nmi_pending
    }

    /// The processor has taken the non-maskable interrupt.
    pub fn nmi_taken(&mut self) {
        self.nmi_pending = false;
    }

    /// How often the machine went back to power-on.
    pub fn resets(&self) -> u64 {
        self.resets
    }

    /// Every device as at power-on, but guest time goes on, the clock keeps its time and its
    /// memory, and the disk its content: requests on their way are still done, in order, and
    /// their answers are dropped. Counters go on, and so does what waits to be sent.
    pub fn reset(&mut self) {
        self.pic = Pic::new();
        self.pit = Pit::new();
        self.pit.advance(self.now_ns);
        self.rtc.reset();
        self.console.reset();
        self.reset = ResetPorts::new();
        self.acpi = AcpiPm::new();
        self.panic = PanicWatch::default();
        self.virtio.power_on();
        self.nmi_pending = false;
        self.resets += 1;
        self.update_lines_and_outputs();
    }

    pub(super) fn take_identity<M: GuestMemory>(&mut self, mem: &M, id: [u8; 16], unix_s: u64) {
        self.rtc.set_undisturbed(unix_s);
        // A guest too small to have that memory has no driver either.
        if mem.write_slice(&id, GuestAddress(GENERATION_ID_ADDRESS)).is_ok() {
            self.acpi.announce_generation();
        }
    }
}
