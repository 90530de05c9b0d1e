//! What lies where on the port bus, and what an access reads that no device answers.

use crate::pvpanic::PVPANIC_PORT;

/// What every byte of an access reads as when no device answers: the bus is pulled high.
pub const FLOATING_BUS: u8 = 0xff;

/// Which register of a byte-wide device a port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Register {
    PicCommand(usize),
    PicData(usize),
    PicElcr(usize),
    PitCounter(usize),
    PitControl,
    PortB,
    I8042Command,
    RtcIndex,
    RtcData,
    Com1(u8),
    ResetControl,
    Panic,
}

impl Register {
    /// The port map. The ACPI registers are not in it: they take accesses of any width
    /// ([`crate::acpi::AcpiPm::offset`]).
    pub(crate) fn at(port: u16) -> Option<Register> {
        Some(match port {
            0x20 => Register::PicCommand(0),
            0x21 => Register::PicData(0),
            0xa0 => Register::PicCommand(1),
            0xa1 => Register::PicData(1),
            0x4d0 => Register::PicElcr(0),
            0x4d1 => Register::PicElcr(1),
            0x40..=0x42 => Register::PitCounter(usize::from(port - 0x40)),
            0x43 => Register::PitControl,
            0x61 => Register::PortB,
            0x64 => Register::I8042Command,
            0x70 => Register::RtcIndex,
            0x71 => Register::RtcData,
            0x3f8..=0x3ff => Register::Com1((port - 0x3f8) as u8),
            0xcf9 => Register::ResetControl,
            PVPANIC_PORT => Register::Panic,
            _ => return None,
        })
    }

    /// Whether what an access to the register does depends on the current time.
    pub(crate) fn reads_clock(self) -> bool {
        match self {
            Register::PitCounter(_)
            | Register::PitControl
            | Register::PortB
            | Register::RtcData => true,
            Register::PicCommand(_)
            | Register::PicData(_)
            | Register::PicElcr(_)
            | Register::I8042Command
            | Register::RtcIndex
            | Register::Com1(_)
            | Register::ResetControl
            | Register::Panic => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_lie_where_a_pc_has_them() {
        for (port, register) in [
            (0x20, Register::PicCommand(0)),
            (0xa1, Register::PicData(1)),
            (0x4d1, Register::PicElcr(1)),
            (0x42, Register::PitCounter(2)),
            (0x3fd, Register::Com1(5)),
            (0x505, Register::Panic),
        ] {
            assert_eq!(Register::at(port), Some(register), "port {port:#x}");
        }
    }

    #[test]
    fn what_the_board_lacks_has_no_register() {
        // COM2 to COM4, PCI configuration, POST.
        for port in [0x2f8, 0x2ff, 0x3e8, 0x2e8, 0xcf8, 0xcfc, 0x80, 0x3f7, 0x400] {
            assert_eq!(Register::at(port), None, "port {port:#x}");
        }
    }

    #[test]
    fn timers_and_the_clock_read_the_time() {
        let reading: Vec<u16> = (0..=u16::MAX)
            .filter(|port| Register::at(*port).is_some_and(Register::reads_clock))
            .collect();
        assert_eq!(reading, [0x40, 0x41, 0x42, 0x43, 0x61, 0x71]);
    }
}
