//! From samples to figures, and figures as a table.
//!
//! A figure is one function of samples. It is applied to all rounds of a mode for the value, and
//! to each round for its scatter.

use std::time::Duration;

use ftvmm_tests::measure::Times;
use ftvmm_tests::pair::Report;
use hdrhistogram::Histogram;
use serde::Serialize;

use super::MODES;

/// Precision of the histograms in decimal digits.
const DIGITS: u8 = 3;
const NS_PER_MS: f64 = 1e6;

/// One mode in one round.
#[derive(Debug)]
pub struct Sample {
    /// Title of the mode.
    pub mode: &'static str,
    /// From power-on to a guest that serves.
    pub boot_seconds: f64,
    /// Round trips of UDP.
    pub echoes: Times,
    /// Small HTTP requests.
    pub requests: Times,
    /// The long download.
    pub download_seconds: f64,
    /// Its length.
    pub download_bytes: u64,
    /// What the (primary) VMM says of the whole run, from the guest's first instruction on.
    pub report: Report,
}

/// What a reader must know to judge the numbers.
#[derive(Clone, Debug, Serialize)]
pub struct Conditions {
    /// Start of the run.
    pub unix_seconds: u64,
    /// What was measured, as `git describe` says.
    pub commit: String,
    /// What the two hosts were.
    pub hosts: &'static str,
    /// Model name of the machine below them.
    pub cpu: String,
    /// Its CPUs.
    pub cpus: usize,
    /// Its load average over the last minute, before anything was started.
    pub load_before: Option<f64>,
    /// How often each mode was measured.
    pub rounds: u32,
    /// UDP round trips of each mode and round, and those of the channel in each round.
    pub echoes: usize,
    /// HTTP requests of each mode and round.
    pub requests: usize,
    /// Their body.
    pub request_bytes: usize,
    /// The long download.
    pub download_bytes: u64,
    /// `--failure-timeout-ms` where it was given.
    pub failure_timeout_ms: Option<u64>,
}

/// One figure for one mode.
#[derive(Clone, Debug, Serialize)]
pub struct Value {
    /// Title of the mode.
    pub mode: &'static str,
    /// Of all rounds; none where the mode has no such thing.
    pub value: Option<f64>,
    /// The value divided by solo's.
    pub ratio_to_solo: Option<f64>,
    /// Of each round.
    pub rounds: Vec<f64>,
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// What it is.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// In the order of [`MODES`].
    pub modes: Vec<Value>,
}

/// The round trip of what the channel rides on, without any guest, in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Channel {
    /// Median.
    pub p50_ms: f64,
    /// 9 of 10 were not longer.
    pub p90_ms: f64,
    /// 99 of 100 were not longer.
    pub p99_ms: f64,
}

/// Everything that was found out.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// How it was found out.
    pub conditions: Conditions,
    /// Host to host.
    pub channel: Channel,
    /// Line by line.
    pub figures: Vec<Figure>,
}

type Of = fn(&[&Sample]) -> Option<f64>;

/// Names and units are what [`super::plot`] looks for.
const FIGURES: [(&str, &str, Of); 12] = [
    ("UDP echo p50", "ms", |s| percentile_ms(s.iter().map(|s| &s.echoes), 0.50)),
    ("UDP echo p90", "ms", |s| percentile_ms(s.iter().map(|s| &s.echoes), 0.90)),
    ("UDP echo p99", "ms", |s| percentile_ms(s.iter().map(|s| &s.echoes), 0.99)),
    ("UDP echoes lost", "", |s| Some(s.iter().map(|s| s.echoes.lost).sum::<usize>() as f64)),
    ("HTTP request p50", "ms", |s| percentile_ms(s.iter().map(|s| &s.requests), 0.50)),
    ("HTTP request p90", "ms", |s| percentile_ms(s.iter().map(|s| &s.requests), 0.90)),
    ("HTTP request p99", "ms", |s| percentile_ms(s.iter().map(|s| &s.requests), 0.99)),
    ("download", "s", |s| median(s.iter().map(|s| s.download_seconds))),
    ("download", "MB/s", |s| {
        median(s.iter().map(|s| s.download_bytes as f64 / s.download_seconds / 1e6))
    }),
    ("boot", "s", |s| median(s.iter().map(|s| s.boot_seconds))),
    ("exits", "1/s", |s| median(s.iter().map(|s| s.report.exits as f64 / s.report.seconds))),
    ("log", "kB/s", |s| {
        let logged = s.iter().filter(|s| s.report.log_bytes > 0);
        median(logged.map(|s| s.report.log_bytes as f64 / s.report.seconds / 1e3))
    }),
];

impl Summary {
    /// Draws the figures from the samples.
    pub fn new(conditions: Conditions, channel: &[Times], samples: &[Sample]) -> Self {
        let channel = |quantile| percentile_ms(channel.iter(), quantile).unwrap_or(f64::NAN);
        let channel =
            Channel { p50_ms: channel(0.50), p90_ms: channel(0.90), p99_ms: channel(0.99) };
        let figures = FIGURES.iter().map(|&(name, unit, of)| figure(name, unit, of, samples));
        Self { conditions, channel, figures: figures.collect() }
    }

    /// The table, aligned, which is Markdown too.
    pub fn table(&self) -> String {
        let mut rows = vec![vec![String::new(), "unit".to_owned()]];
        for mode in &MODES {
            rows[0].push(mode.title.to_owned());
            if mode.release.is_some() {
                rows[0].push("/ solo".to_owned());
            }
        }
        for figure in &self.figures {
            let mut row = vec![figure.name.to_owned(), figure.unit.to_owned()];
            for (mode, value) in MODES.iter().zip(&figure.modes) {
                row.push(value.value.map_or_else(|| "–".to_owned(), short));
                if mode.release.is_some() {
                    row.push(
                        value
                            .ratio_to_solo
                            .map_or_else(|| "–".to_owned(), |ratio| format!("×{}", short(ratio))),
                    );
                }
            }
            rows.push(row);
        }
        let Channel { p50_ms, p90_ms, p99_ms } = &self.channel;
        let channel = [p50_ms, p90_ms, p99_ms].map(|&ms| short(ms));
        format!(
            "{}\nThe channel itself, host to host and back: p50 {} ms, p90 {} ms, p99 {} ms.\n",
            aligned(&rows),
            channel[0],
            channel[1],
            channel[2]
        )
    }

    /// One line that says how it was measured.
    pub fn subtitle(&self) -> String {
        let c = &self.conditions;
        let rounds = if c.rounds == 1 { "round" } else { "rounds" };
        format!(
            "{} {rounds} of {} UDP echoes, {} HTTP requests of {} bytes and a download of {} MiB",
            c.rounds,
            c.echoes,
            c.requests,
            c.request_bytes,
            c.download_bytes >> 20,
        )
    }

    /// One line that says on what it was measured.
    pub fn place(&self) -> String {
        let c = &self.conditions;
        let load = c.load_before.map_or_else(String::new, |load| format!(", load {load} before"));
        format!("hosts: {} on {} × {}{load}; commit {}", c.hosts, c.cpus, c.cpu, c.commit)
    }

    /// The table with what is needed to read it, and the plot, a file beside it.
    pub fn markdown(&self, plot: &str) -> String {
        format!(
            "{}\n{}, all modes in turn; {}.\nPercentiles are of all rounds together, the rest are \
             medians of the rounds; exits and log are those of the primary over the whole run, \
             boot included.\nMade by `cargo xtask bench --save`.\n\n![The same as bars]({plot})\n",
            self.table(),
            self.subtitle(),
            self.place()
        )
    }
}

fn figure(name: &'static str, unit: &'static str, of: Of, samples: &[Sample]) -> Figure {
    let of_mode = |index: usize| -> Vec<&Sample> {
        samples.iter().filter(|sample| sample.mode == MODES[index].title).collect()
    };
    let solo = of(&of_mode(0));
    let modes = (0..MODES.len()).map(|index| {
        let value = of(&of_mode(index));
        Value {
            mode: MODES[index].title,
            value,
            ratio_to_solo: value
                .zip(solo.filter(|&solo| solo != 0.0))
                .map(|(value, solo)| value / solo),
            rounds: of_mode(index).into_iter().filter_map(|sample| of(&[sample])).collect(),
        }
    });
    Figure { name, unit, modes: modes.collect() }
}

/// A percentile of all times together; none without any.
fn percentile_ms<'a>(times: impl Iterator<Item = &'a Times>, quantile: f64) -> Option<f64> {
    let mut histogram = Histogram::<u64>::new(DIGITS).ok()?;
    for time in times.flat_map(|times| &times.answered) {
        histogram.record(u64::try_from(Duration::as_nanos(time)).ok()?).ok()?;
    }
    let known = !histogram.is_empty();
    known.then(|| histogram.value_at_quantile(quantile) as f64 / NS_PER_MS)
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    Some(if values.len() % 2 == 1 {
        upper
    } else {
        f64::midpoint(values[values.len() / 2 - 1], upper)
    })
}

/// Three significant digits.
pub fn short(value: f64) -> String {
    significant(value, 3)
}

/// A number with so many significant digits; whole digits are never dropped.
pub fn significant(value: f64, digits: i32) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let before_point = value.abs().log10().floor() as i32 + 1;
    format!("{value:.*}", usize::try_from(digits - before_point).unwrap_or(0))
}

/// A Markdown table with columns of equal width; numbers stand to the right.
pub fn aligned(rows: &[Vec<String>]) -> String {
    /// Columns with words.
    const LEFT: usize = 2;
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|c| width(c).unwrap_or(0).max(3)).collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            text += &if column < LEFT {
                format!("| {cell:<width$} ")
            } else {
                format!("| {cell:>width$} ")
            };
        }
        text += "|\n";
        if number == 0 {
            for (column, &width) in widths.iter().enumerate() {
                let end = if column < LEFT { "-" } else { ":" };
                text += &format!("|{}{end}", "-".repeat(width + 1));
            }
            text += "|\n";
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(mode: &'static str, echo_ms: u64, log_bytes: u64) -> Sample {
        let times = |ms| Times { answered: vec![Duration::from_millis(ms)], lost: 0 };
        Sample {
            mode,
            boot_seconds: echo_ms as f64,
            echoes: times(echo_ms),
            requests: times(1),
            download_seconds: 2.0,
            download_bytes: 4_000_000,
            report: Report { log_bytes, exits: 50, seconds: 10.0, ..Report::default() },
        }
    }

    #[test]
    fn ratios_are_to_solo_and_rounds_keep_their_order() {
        let samples = [
            sample("solo", 2, 0),
            sample("lockstep ack", 6, 1000),
            sample("solo", 4, 0),
            sample("lockstep ack", 12, 3000),
        ];
        let of = |wanted| FIGURES.iter().find(|(name, ..)| *name == wanted).unwrap().2;
        let boot = figure("boot", "s", of("boot"), &samples);
        assert_eq!(boot.modes[0].value, Some(3.0));
        assert_eq!(boot.modes[1].rounds, [6.0, 12.0]);
        assert_eq!(boot.modes[1].ratio_to_solo, Some(3.0));
        assert_eq!(boot.modes[2].value, None);
        let log = figure("log", "kB/s", of("log"), &samples);
        assert_eq!((log.modes[0].value, log.modes[1].value), (None, Some(0.2)));
        assert_eq!(log.modes[1].ratio_to_solo, None);
    }

    #[test]
    fn numbers_have_three_digits() {
        let written = [0.0, 0.000_123_4, 0.5, 1.0, 12.345, 123.4, 12_345.6].map(short);
        assert_eq!(written, ["0", "0.000123", "0.500", "1.00", "12.3", "123", "12346"]);
    }
}
