//! What a PC's firmware does before the kernel runs.

use ftvmm_devices::Board;

/// What a PC's firmware leaves behind and Linux relies on: counter 0 of the 8254 counts, in mode 3
/// with the full period (Linux reads it for randomness and waits until it does).
const FIRMWARE_WRITES: [(u16, u8); 3] = [(0x43, 0x36), (0x40, 0), (0x40, 0)];

/// Leaves the devices as a PC's firmware does.
pub fn act_as_firmware(board: &mut Board) {
    for (port, value) in FIRMWARE_WRITES {
        board.pio_write(port, &[value]);
    }
}

#[cfg(test)]
mod tests {
    use ftvmm_devices::BoardConfig;

    use super::*;

    #[test]
    fn counter_0_counts_when_the_kernel_comes_to_read_it() {
        let config = BoardConfig { rtc_epoch_s: 0, net: None, disk_bytes: None };
        let [cold, mut warm] = [(); 2].map(|()| Board::new(&config));
        assert_eq!(cold.next_deadline_ns(), None);
        act_as_firmware(&mut warm);
        assert!(warm.next_deadline_ns().is_some());
    }
}
