//! A progress bar on a terminal; nothing elsewhere.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// How far the work has come, in steps of unequal length.
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar of so many units of work.
    pub fn new(units: u64) -> Self {
        let template = "{spinner} {wide_msg} {bar:32} {percent:>3} % {elapsed_precise}";
        Self::of(ProgressBar::new(units), template)
    }

    /// Of work whose end may be unknown: no bar, what is being done alone.
    pub fn endless() -> Self {
        Self::of(ProgressBar::new_spinner(), "{spinner} {wide_msg}")
    }

    fn of(bar: ProgressBar, template: &str) -> Self {
        let style = ProgressStyle::with_template(template);
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_millis(200));
        Progress { bar }
    }

    /// Says what is being done.
    pub fn doing(&self, what: impl Into<String>) {
        self.bar.set_message(what.into());
    }

    /// Counts units of work done.
    pub fn done(&self, units: u64) {
        self.bar.inc(units);
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
