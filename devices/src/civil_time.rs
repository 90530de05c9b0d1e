//! Calendar time from Unix seconds and back, in the proleptic Gregorian calendar, without leap
//! seconds.
//!
//! The day count is the well-known one that starts the year in March, so that the leap day is the
//! last of the year.

use serde::{Deserialize, Serialize};

/// The last second of the year 9999, the last one four BCD digits can show.
pub(crate) const UNIX_S_MAX: u64 = 253_402_300_799;
const SECONDS_PER_DAY: u64 = 86_400;
/// Days from 0000-03-01 to 1970-01-01.
const DAYS_BEFORE_UNIX: u64 = 719_468;
const DAYS_PER_400_YEARS: u64 = 146_097;

/// Registers of a clock; may hold anything, as a guest can write anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DateTime {
    pub(crate) year: u16,
    pub(crate) month: u8,
    pub(crate) day: u8,
    pub(crate) hour: u8,
    pub(crate) minute: u8,
    pub(crate) second: u8,
}

impl DateTime {
    /// The date and time of `unix_s`, at most [`UNIX_S_MAX`].
    pub(crate) fn from_unix_s(unix_s: u64) -> DateTime {
        let (days, second_of_day) = (unix_s / SECONDS_PER_DAY, unix_s % SECONDS_PER_DAY);
        let shifted = days + DAYS_BEFORE_UNIX;
        let (cycle, day_of_cycle) = (shifted / DAYS_PER_400_YEARS, shifted % DAYS_PER_400_YEARS);
        let year_of_cycle = (day_of_cycle - day_of_cycle / 1_460 + day_of_cycle / 36_524
            - day_of_cycle / 146_096)
            / 365;
        let day_of_year =
            day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let is_next_year = month_from_march >= 10;
        DateTime {
            year: (cycle * 400 + year_of_cycle + u64::from(is_next_year)) as u16,
            month: (if is_next_year { month_from_march - 9 } else { month_from_march + 3 }) as u8,
            day: (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8,
            hour: (second_of_day / 3_600) as u8,
            minute: (second_of_day / 60 % 60) as u8,
            second: (second_of_day % 60) as u8,
        }
    }

    /// Unix seconds, or `None` when the registers are no date since 1970.
    pub(crate) fn to_unix_s(self) -> Option<u64> {
        let in_range = (1..=12).contains(&self.month) && (1..=31).contains(&self.day);
        if !in_range || !(1970..=9999).contains(&self.year) {
            return None;
        }
        let unix_s = self.days() * SECONDS_PER_DAY
            + u64::from(self.hour) * 3_600
            + u64::from(self.minute) * 60
            + u64::from(self.second);
        // Converting back finds every other impossible value: 30 February, 24 o'clock, second 60.
        (DateTime::from_unix_s(unix_s.min(UNIX_S_MAX)) == self).then_some(unix_s)
    }

    /// Days since 1970-01-01 of a date with month 1..=12 and day 1..=31.
    fn days(self) -> u64 {
        let year = u64::from(self.year) - u64::from(self.month <= 2);
        let (cycle, year_of_cycle) = (year / 400, year % 400);
        let month_from_march = (u64::from(self.month) + 9) % 12;
        let day_of_year = (153 * month_from_march + 2) / 5 + u64::from(self.day) - 1;
        let day_of_cycle =
            365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100 + day_of_year;
        cycle * DAYS_PER_400_YEARS + day_of_cycle - DAYS_BEFORE_UNIX
    }

    /// 1 = Sunday .. 7 = Saturday; 1 for registers that are no date.
    pub(crate) fn day_of_week(self) -> u8 {
        match self.to_unix_s() {
            Some(unix_s) => ((unix_s / SECONDS_PER_DAY + 4) % 7 + 1) as u8,
            None => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(year: u16, month: u8, day: u8, hour: u8, minute: u8, second: u8) -> DateTime {
        DateTime { year, month, day, hour, minute, second }
    }

    #[test]
    fn known_dates() {
        // Seconds from date(1); weekdays from cal(1).
        for (unix_s, time, day_of_week) in [
            (0, at(1970, 1, 1, 0, 0, 0), 5),
            (951_827_696, at(2000, 2, 29, 12, 34, 56), 3),
            (1_709_251_199, at(2024, 2, 29, 23, 59, 59), 5),
            (4_107_542_400, at(2100, 3, 1, 0, 0, 0), 2),
            (UNIX_S_MAX, at(9999, 12, 31, 23, 59, 59), 6),
        ] {
            assert_eq!(DateTime::from_unix_s(unix_s), time);
            assert_eq!(time.to_unix_s(), Some(unix_s));
            assert_eq!(time.day_of_week(), day_of_week, "{time:?}");
        }
    }

    #[test]
    fn impossible_registers_are_no_time() {
        for time in [
            at(2023, 2, 29, 0, 0, 0),
            at(2024, 13, 1, 0, 0, 0),
            at(2024, 0, 1, 0, 0, 0),
            at(2024, 4, 31, 0, 0, 0),
            at(2024, 1, 0, 0, 0, 0),
            at(2024, 1, 1, 24, 0, 0),
            at(2024, 1, 1, 0, 60, 0),
            at(2024, 1, 1, 0, 0, 60),
            at(1969, 12, 31, 23, 59, 59),
            at(9999, 12, 31, 255, 255, 255),
        ] {
            assert_eq!(time.to_unix_s(), None, "{time:?}");
        }
    }

    proptest! {
        #[test]
        fn every_second_converts_back(unix_s in 0..=UNIX_S_MAX) {
            prop_assert_eq!(DateTime::from_unix_s(unix_s).to_unix_s(), Some(unix_s));
        }
    }
}
