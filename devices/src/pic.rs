//! The interrupt controller of a PC: two cascaded Intel 8259A (Intel data sheet 231468, "8259A
//! Programmable Interrupt Controller"), the second one's INT output on input 2 of the first, plus
//! the ELCR of the 82371 (PIIX).
//!
//! | port | name | access | reset | meaning |
//! |------|------|--------|-------|---------|
//! | 0x20, 0xa0 | ICW1 / OCW2 / OCW3 | w | | bit 4 set: ICW1; else bit 3 set: OCW3; else OCW2 |
//! | 0x20, 0xa0 | IRR, ISR or poll | r | IRR | chosen by OCW3 |
//! | 0x21, 0xa1 | ICW2..ICW4 / OCW1 | w | | the initialisation words after ICW1, else the mask |
//! | 0x21, 0xa1 | IMR | r | 0xff | OCW1 read back |
//! | 0x4d0, 0x4d1 | ELCR | rw | 0 | bit set: that input is level triggered |
//!
//! The reset values are this board's choice (the data sheet has none): everything masked, as
//! firmware leaves it.
//!
//! Not emulated: the 8080 mode of ICW4, buffered mode (no data-bus buffers here), ICW1's LTIM and
//! call interval (a PC uses the ELCR), ICW3 (the wiring is fixed).
//!
//! From outside: nothing. Inputs are the other devices' lines, set by the board. An input's request
//! is latched at its rising edge and stays until acknowledged, so a device may pulse a line that is
//! not level triggered.

use serde::{Deserialize, Serialize};

use crate::state::InvalidState;

/// Input of the first chip that carries the second chip's INT output.
const CASCADE_INPUT: u8 = 2;
/// The input an 8259A reports when the request vanished before it was acknowledged (data sheet,
/// "default IR7").
const SPURIOUS_INPUT: u8 = 7;
/// ELCR bits that exist: inputs 0, 1, 2, 8 and 13 are always edge triggered (82371AB data sheet,
/// §4.2.9).
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];

const ICW1_INIT: u8 = 0x10;
const ICW1_SINGLE: u8 = 0x02;
const ICW1_NEEDS_ICW4: u8 = 0x01;
const ICW4_AUTO_EOI: u8 = 0x02;
const ICW4_SPECIAL_FULLY_NESTED: u8 = 0x10;
const OCW3: u8 = 0x08;
const OCW3_POLL: u8 = 0x04;

/// Which initialisation word the data port expects next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum InitStep {
    Ready,
    Icw2,
    Icw3,
    Icw4,
}

/// Everything one 8259A remembers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Chip {
    lines: u8,
    requests: u8,
    in_service: u8,
    mask: u8,
    level_triggered: u8,
    vector_base: u8,
    /// The input with the highest priority; rotation moves it.
    highest: u8,
    init_step: InitStep,
    single: bool,
    needs_icw4: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_fully_nested: bool,
    special_mask: bool,
    read_in_service: bool,
    poll: bool,
}

impl Chip {
    fn new() -> Self {
        Chip {
            lines: 0,
            requests: 0,
            in_service: 0,
            mask: 0xff,
            level_triggered: 0,
            vector_base: 0,
            highest: 0,
            init_step: InitStep::Ready,
            single: false,
            needs_icw4: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_fully_nested: false,
            special_mask: false,
            read_in_service: false,
            poll: false,
        }
    }

    /// Priority rank of the most urgent input in `inputs`: 0 is the most urgent, 8 means none.
    fn rank(&self, inputs: u8) -> u32 {
        inputs.rotate_right(u32::from(self.highest)).trailing_zeros().min(8)
    }

    fn input_of_rank(&self, rank: u32) -> u8 {
        (rank as u8 + self.highest) & 7
    }

    /// The input the chip would ask the processor to serve now.
    fn pending(&self, is_first: bool) -> Option<u8> {
        let wanted = self.rank(self.requests & !self.mask);
        if wanted == 8 {
            return None;
        }
        let mut blocking = self.in_service;
        if self.special_mask {
            blocking &= !self.mask;
        }
        if self.special_fully_nested && is_first {
            blocking &= !(1 << CASCADE_INPUT);
        }
        (wanted < self.rank(blocking)).then(|| self.input_of_rank(wanted))
    }

    fn set_line(&mut self, input: u8, high: bool) {
        let bit = 1 << input;
        let rising = high && self.lines & bit == 0;
        if high {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        if rising {
            self.requests |= bit;
        } else if !high && self.level_triggered & bit != 0 {
            self.requests &= !bit;
        }
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        // A level-triggered input asks again for as long as its line is high.
        if self.level_triggered & self.lines & bit == 0 {
            self.requests &= !bit;
        }
        if !self.auto_eoi {
            self.in_service |= bit;
        } else if self.rotate_on_auto_eoi {
            self.make_lowest(input);
        }
    }

    fn make_lowest(&mut self, input: u8) {
        self.highest = (input + 1) & 7;
    }

    fn write_command(&mut self, value: u8) {
        if value & ICW1_INIT != 0 {
            self.on_icw1(value);
        } else if value & OCW3 != 0 {
            self.on_ocw3(value);
        } else {
            self.on_ocw2(value);
        }
    }

    /// Data sheet, "Initialization Command Words": what ICW1 does by itself. A line that is high
    /// now must fall and rise again to be seen; a level-triggered one is seen at once.
    fn on_icw1(&mut self, value: u8) {
        self.requests = self.lines & self.level_triggered;
        self.in_service = 0;
        self.mask = 0;
        self.highest = 0;
        self.special_mask = false;
        self.read_in_service = false;
        self.poll = false;
        self.auto_eoi = false;
        self.rotate_on_auto_eoi = false;
        self.special_fully_nested = false;
        self.single = value & ICW1_SINGLE != 0;
        self.needs_icw4 = value & ICW1_NEEDS_ICW4 != 0;
        self.init_step = InitStep::Icw2;
    }

    fn on_ocw3(&mut self, value: u8) {
        self.poll = value & OCW3_POLL != 0;
        match value & 0x03 {
            0x02 => self.read_in_service = false,
            0x03 => self.read_in_service = true,
            _ => {}
        }
        match value & 0x60 {
            0x40 => self.special_mask = false,
            0x60 => self.special_mask = true,
            _ => {}
        }
    }

    fn on_ocw2(&mut self, value: u8) {
        let level = value & 7;
        match value >> 5 {
            0b000 => self.rotate_on_auto_eoi = false,
            0b100 => self.rotate_on_auto_eoi = true,
            0b001 => {
                self.end_most_urgent();
            }
            0b101 => {
                if let Some(ended) = self.end_most_urgent() {
                    self.make_lowest(ended);
                }
            }
            0b011 => self.in_service &= !(1 << level),
            0b111 => {
                self.in_service &= !(1 << level);
                self.make_lowest(level);
            }
            0b110 => self.make_lowest(level),
            _ => {} // 0b010: no operation
        }
    }

    /// Non-specific EOI: in special mask mode it leaves masked inputs alone (data sheet, "Special
    /// Mask Mode").
    fn end_most_urgent(&mut self) -> Option<u8> {
        let candidates =
            if self.special_mask { self.in_service & !self.mask } else { self.in_service };
        let rank = self.rank(candidates);
        if rank == 8 {
            return None;
        }
        let ended = self.input_of_rank(rank);
        self.in_service &= !(1 << ended);
        Some(ended)
    }

    fn write_data(&mut self, value: u8) {
        match self.init_step {
            InitStep::Ready => self.mask = value,
            InitStep::Icw2 => {
                self.vector_base = value & 0xf8;
                self.init_step = match (self.single, self.needs_icw4) {
                    (false, _) => InitStep::Icw3,
                    (true, true) => InitStep::Icw4,
                    (true, false) => InitStep::Ready,
                };
            }
            InitStep::Icw3 => {
                self.init_step = if self.needs_icw4 { InitStep::Icw4 } else { InitStep::Ready };
            }
            InitStep::Icw4 => {
                self.auto_eoi = value & ICW4_AUTO_EOI != 0;
                self.special_fully_nested = value & ICW4_SPECIAL_FULLY_NESTED != 0;
                self.init_step = InitStep::Ready;
            }
        }
    }
}

/// What the two chips remember; plain data, checked when it becomes a [`Pic`] again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    chips: [Chip; 2],
}

/// The pair of 8259A.
#[derive(Debug)]
pub(crate) struct Pic {
    state: PicState,
}

impl TryFrom<PicState> for Pic {
    type Error = InvalidState;

    fn try_from(state: PicState) -> Result<Self, InvalidState> {
        for (chip, writable) in state.chips.iter().zip(ELCR_WRITABLE) {
            InvalidState::check(chip.highest < 8, "pic.highest")?;
            InvalidState::check(chip.vector_base & 7 == 0, "pic.vector_base")?;
            InvalidState::check(chip.level_triggered & !writable == 0, "pic.level_triggered")?;
        }
        let pic = Pic { state };
        let cascade_high = pic.state.chips[0].lines & (1 << CASCADE_INPUT) != 0;
        InvalidState::check(
            cascade_high == pic.state.chips[1].pending(false).is_some(),
            "pic.cascade",
        )?;
        Ok(pic)
    }
}

impl Pic {
    pub(crate) fn new() -> Self {
        Pic { state: PicState { chips: [Chip::new(), Chip::new()] } }
    }

    pub(crate) fn save(&self) -> PicState {
        self.state.clone()
    }

    fn chip(&mut self, irq: u8) -> &mut Chip {
        &mut self.state.chips[usize::from(irq >> 3 & 1)]
    }

    /// Drives interrupt request `irq` (0..=15) high or low.
    pub(crate) fn set_line(&mut self, irq: u8, high: bool) {
        let chip = self.chip(irq);
        if (chip.lines >> (irq & 7) & 1 != 0) != high {
            chip.set_line(irq & 7, high);
            self.update_cascade();
        }
    }

    /// A short pulse on `irq`: the request is latched even when the input is level triggered,
    /// because a device that pulses has no line to hold.
    pub(crate) fn pulse(&mut self, irq: u8) {
        self.chip(irq).requests |= 1 << (irq & 7);
        self.update_cascade();
    }

    /// Takes a pulse back that has not been acknowledged, and says whether there was one.
    pub(crate) fn withdraw(&mut self, irq: u8) -> bool {
        let chip = self.chip(irq);
        let requested = chip.requests >> (irq & 7) & 1 != 0;
        chip.requests &= !(1 << (irq & 7));
        self.update_cascade();
        requested
    }

    /// Whether `irq` is neither requested nor being served.
    pub(crate) fn is_idle(&self, irq: u8) -> bool {
        let chip = &self.state.chips[usize::from(irq >> 3 & 1)];
        (chip.requests | chip.in_service) >> (irq & 7) & 1 == 0
    }

    /// The INT output of the first chip.
    pub(crate) fn interrupt_pending(&self) -> bool {
        self.state.chips[0].pending(true).is_some()
    }

    /// Whether any unmasked input waits to be served, be it behind a more urgent one.
    pub(crate) fn request_waits(&self) -> bool {
        self.state.chips.iter().any(|chip| chip.requests & !chip.mask & !chip.in_service != 0)
    }

    /// The interrupt-acknowledge cycle: returns the vector and puts the input in service. With no
    /// request left it is the spurious input 7, which is not put in service (data sheet,
    /// "default IR7").
    pub(crate) fn acknowledge(&mut self) -> u8 {
        let [first, second] = &mut self.state.chips;
        let vector = match first.pending(true) {
            None => first.vector_base + SPURIOUS_INPUT,
            Some(CASCADE_INPUT) => {
                let vector = match second.pending(false) {
                    None => second.vector_base + SPURIOUS_INPUT,
                    Some(input) => {
                        second.acknowledge(input);
                        second.vector_base + input
                    }
                };
                first.acknowledge(CASCADE_INPUT);
                // The second chip's INT falls with the acknowledge, so that another request of it
                // is a new edge.
                first.set_line(CASCADE_INPUT, false);
                vector
            }
            Some(input) => {
                first.acknowledge(input);
                first.vector_base + input
            }
        };
        self.update_cascade();
        vector
    }

    fn update_cascade(&mut self) {
        let [first, second] = &mut self.state.chips;
        first.set_line(CASCADE_INPUT, second.pending(false).is_some());
    }

    pub(crate) fn write_command(&mut self, chip: usize, value: u8) {
        self.state.chips[chip].write_command(value);
        self.update_cascade();
    }

    pub(crate) fn write_data(&mut self, chip: usize, value: u8) {
        self.state.chips[chip].write_data(value);
        self.update_cascade();
    }

    pub(crate) fn read_command(&mut self, chip: usize) -> u8 {
        if self.state.chips[chip].poll {
            return self.poll(chip);
        }
        let chip = &self.state.chips[chip];
        if chip.read_in_service { chip.in_service } else { chip.requests }
    }

    pub(crate) fn read_data(&mut self, chip: usize) -> u8 {
        if self.state.chips[chip].poll {
            return self.poll(chip);
        }
        self.state.chips[chip].mask
    }

    /// Data sheet, "Poll Command": the read is the acknowledge of this one chip; bit 7 says whether
    /// it had a request.
    fn poll(&mut self, index: usize) -> u8 {
        let chip = &mut self.state.chips[index];
        chip.poll = false;
        let Some(input) = chip.pending(index == 0) else {
            return 0;
        };
        chip.acknowledge(input);
        self.update_cascade();
        0x80 | input
    }

    pub(crate) fn read_elcr(&self, chip: usize) -> u8 {
        self.state.chips[chip].level_triggered
    }

    pub(crate) fn write_elcr(&mut self, chip: usize, value: u8) {
        let target = &mut self.state.chips[chip];
        target.level_triggered = value & ELCR_WRITABLE[chip];
        target.requests |= target.level_triggered & target.lines;
        self.update_cascade();
    }
}

#[cfg(test)]
mod tests;
