//! Says what is going on when something takes more than a moment.
//!
//! A terminal gets a spinner; a log file gets one line at the start and none after it, so that a
//! run in CI reads as a list of what was done.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

const REDRAW_MS: u64 = 100;

/// One step under way; dropping it takes the spinner away.
pub struct Step {
    bar: ProgressBar,
}

impl Step {
    /// Announces a step on standard error.
    pub fn start(what: impl Into<String>) -> Self {
        let what = what.into();
        if !std::io::stderr().is_terminal() {
            eprintln!("{what} ...");
            return Self { bar: ProgressBar::hidden() };
        }
        let bar = ProgressBar::new_spinner().with_message(what);
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} [{elapsed}]") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(REDRAW_MS));
        Self { bar }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
