//! What happened, in order: a hash over all of it and the last lines of it.
//!
//! Owns: the run's fingerprint. Invariant: two runs of a seed with the same fingerprint did the same
//! things at the same virtual times.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};

/// Lines kept for a failure's report.
pub const KEPT: usize = 200;

/// One thing that happened.
pub struct Line {
    at: u64,
    node: u8,
    what: &'static str,
    numbers: [u64; 3],
    text: Option<Box<str>>,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (s, us) = (self.at / 1_000_000_000, self.at / 1_000 % 1_000_000);
        let node = (self.node + b'a') as char;
        let [a, b, c] = self.numbers;
        write!(f, "{s:4}.{us:06} {node} {:<16} {a:#x} {b:#x} {c:#x}", self.what)?;
        self.text.as_ref().map_or(Ok(()), |t| write!(f, " {t}"))
    }
}

/// The record of a run.
pub struct Trace {
    hasher: blake3::Hasher,
    buffer: Vec<u8>,
    kept: VecDeque<Line>,
    /// Print every line at once.
    pub verbose: bool,
    /// Lines so far.
    pub lines: u64,
}

impl Trace {
    /// An empty one.
    pub fn new(verbose: bool) -> Trace {
        let (hasher, buffer) = (blake3::Hasher::new(), Vec::with_capacity(1 << 16));
        Trace { hasher, buffer, kept: VecDeque::new(), verbose, lines: 0 }
    }
    /// Notes numbers.
    pub fn note(&mut self, at: u64, node: usize, what: &'static str, numbers: [u64; 3]) {
        self.push(Line { at, node: node as u8, what, numbers, text: None });
    }
    /// Notes a text.
    pub fn say(&mut self, at: u64, node: usize, what: &'static str, text: &str) {
        self.push(Line { at, node: node as u8, what, numbers: [0; 3], text: Some(text.into()) });
    }
    fn push(&mut self, line: Line) {
        self.buffer.extend_from_slice(&line.at.to_le_bytes());
        self.buffer.push(line.node);
        self.buffer.extend_from_slice(line.what.as_bytes());
        line.numbers.iter().for_each(|n| self.buffer.extend_from_slice(&n.to_le_bytes()));
        if let Some(text) = &line.text {
            self.buffer.extend_from_slice(text.as_bytes());
        }
        if self.buffer.len() > 60_000 {
            self.hasher.update(&self.buffer);
            self.buffer.clear();
        }
        if self.verbose {
            println!("{line}");
        }
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(line);
        self.lines += 1;
    }
    /// The fingerprint of everything so far.
    pub fn hash(&self) -> [u8; 32] {
        *self.hasher.clone().update(&self.buffer).finalize().as_bytes()
    }
    /// The last lines.
    pub fn tail(&self) -> String {
        self.kept.iter().fold(String::new(), |mut out, line| {
            writeln!(out, "{line}").expect("a string takes everything");
            out
        })
    }
}
