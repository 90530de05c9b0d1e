//! The bar of a transfer, on the standard error when that is a terminal.

use ftvmm_runtime::transfer::{Progress, ProgressDisplay};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What is shown, and how.
const STYLE: &str =
    "{prefix} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} iteration {msg}, {eta} left";
/// Times a second at most that the bar is drawn anew.
const REDRAWS_PER_SECOND: u8 = 5;

/// See the module documentation. Hidden between transfers.
pub struct TransferBar(ProgressBar);

impl TransferBar {
    /// A bar that is not shown yet.
    pub fn hidden() -> Self {
        let bar = ProgressBar::hidden();
        if let Ok(style) = ProgressStyle::with_template(STYLE) {
            bar.set_style(style);
        }
        Self(bar)
    }
}

impl ProgressDisplay for TransferBar {
    fn begin(&self, what: &'static str, progress: &Progress) {
        self.0.set_draw_target(ProgressDrawTarget::stderr_with_hz(REDRAWS_PER_SECOND));
        self.0.reset();
        self.0.set_prefix(what);
        self.show(progress);
    }

    fn show(&self, progress: &Progress) {
        self.0.set_message(progress.iteration.to_string());
        self.0.set_length(progress.total_bytes);
        self.0.set_position(progress.bytes);
    }

    fn end(&self) {
        self.0.finish_and_clear();
    }
}
