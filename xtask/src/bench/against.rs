//! Two builds of `ftvmm` in one run: `cargo xtask bench --against FILE`.
//!
//! Why: these machines are shared, so figures of two runs do not compare. Here both builds run the
//! same guest in every mode and round, one right after the other, and what is quoted is their
//! quotient.

use std::error::Error;
use std::fs;
use std::path::Path;

use ftvmm_tests::lab::Lab;

use super::summary::{Summary, Value, aligned, short};

/// File name of the other `ftvmm` in the lab.
const OTHER: &str = "ftvmm-other";

/// One of the builds that are measured.
#[derive(Clone, Copy, Debug)]
pub struct Build {
    /// Its file name in the lab.
    pub program: &'static str,
    /// Whether it knows `--on-reset` and `--stop-grace`.
    pub knows_resets: bool,
    /// Whether its channel is TLS; in clear it speaks where it is told to.
    pub knows_tls: bool,
}

/// Carries the other `ftvmm` into the lab.
///
/// # Errors
/// When the file cannot be copied, or does not run there.
pub fn install(lab: &Lab, file: &Path) -> Result<Build, Box<dyn Error>> {
    let place = lab.share().join("bin").join(OTHER);
    fs::copy(file, &place).map_err(|error| format!("{}: {error}", file.display()))?;
    let host = lab.host(0);
    let inside = host.share().join("bin").join(OTHER).display().to_string();
    let help = host.run(&[inside, "--help".to_owned()])?;
    if !help.ended.success() {
        return Err(format!("{} --help: {:?}", file.display(), help.ended).into());
    }
    let knows = |option| help.text().contains(option);
    Ok(Build {
        program: OTHER,
        knows_resets: knows("--on-reset"),
        knows_tls: knows("--insecure-channel"),
    })
}

/// For every figure and mode the built `ftvmm`, the other one, and the first divided by the second;
/// behind it the smallest and the largest quotient of a round.
pub fn table(built: &Summary, other: &Summary) -> String {
    let head = ["", "mode", "built", "other", "built / other", "of the rounds"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for (built, other) in built.figures.iter().zip(&other.figures) {
        let name = format!("{} {}", built.name, built.unit);
        for (built, other) in built.modes.iter().zip(&other.modes) {
            let (Some(a), Some(b)) = (built.value, other.value) else { continue };
            let quotient = if b == 0.0 { "–".to_owned() } else { format!("×{}", short(a / b)) };
            let row = [
                name.trim_end().to_owned(),
                built.mode.to_owned(),
                short(a),
                short(b),
                quotient,
                of_rounds(built, other),
            ];
            rows.push(row.to_vec());
        }
    }
    aligned(&rows)
}

fn of_rounds(built: &Value, other: &Value) -> String {
    let pairs = built.rounds.iter().zip(&other.rounds);
    let quotients: Vec<f64> = pairs.filter(|(_, b)| **b != 0.0).map(|(a, b)| a / b).collect();
    let smallest = quotients.iter().copied().min_by(f64::total_cmp);
    let largest = quotients.iter().copied().max_by(f64::total_cmp);
    smallest.zip(largest).map_or_else(
        || "–".to_owned(),
        |(smallest, largest)| format!("{} to {}", short(smallest), short(largest)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(rounds: &[f64]) -> Value {
        Value { mode: "solo", value: None, ratio_to_solo: None, rounds: rounds.to_vec() }
    }

    #[test]
    fn rounds_are_compared_one_by_one() {
        let spread = of_rounds(&value(&[2.0, 9.0, 1.0]), &value(&[1.0, 3.0, 2.0]));
        assert_eq!(spread, "0.500 to 3.00");
    }

    #[test]
    fn nothing_is_divided_by_nothing() {
        assert_eq!(of_rounds(&value(&[2.0]), &value(&[0.0])), "–");
        assert_eq!(of_rounds(&value(&[]), &value(&[])), "–");
    }
}
