//! How far a long piece of work is, on stderr.
//!
//! Owns: the terminal's progress line. Invariant: on a terminal a bar; off one, a line every few
//! seconds, and none for work that is done before the first.

use super::size::human;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(5);

/// Work of a known number of bytes.
pub struct Progress {
    label: String,
    total: u64,
    bar: Option<ProgressBar>,
    said: Instant,
}

impl Progress {
    /// Begins.
    pub fn new(label: String, total: u64) -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{msg} {bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} eta {eta}";
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            bar.set_style(ProgressStyle::with_template(style).expect("a fixed template"));
            bar.with_message(label.clone())
        });
        Progress { label, total, bar, said: Instant::now() }
    }

    /// So many bytes are done.
    pub fn at(&mut self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        } else if self.said.elapsed() >= INTERVAL {
            self.said = Instant::now();
            let percent = (done.min(self.total) as f64 / self.total.max(1) as f64 * 100.0) as u32;
            eprintln!("volrep: {}: {} of {}, {percent}%", self.label, human(done), human(self.total));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
