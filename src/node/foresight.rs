//! Whether a FLUSH is about to come, by the rhythm of those before.
//!
//! Owns: how many writes each of the last FLUSHes followed. A database's log is one write and one fdatasync, again
//! and again: where that is so, the record can be on its way to the disk while the answer to the write is on its
//! way to the database, and its FLUSH finds half of the work done. Invariant: this decides when an epoch
//! closes, and never what is promised of it; what was not foreseen is what it was without it.

/// So many FLUSHes in a row must have followed equally many writes.
const STREAK: u32 = 3;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Foresight {
    /// Writes since the last FLUSH.
    writes: u32,
    /// Writes before each of the last `streak` FLUSHes.
    usual: u32,
    streak: u32,
    /// Last write sequence whose FLUSH was foreseen.
    upto: u64,
}

impl Foresight {
    /// A write was accepted.
    pub fn wrote(&mut self) {
        self.writes = self.writes.saturating_add(1);
        if self.writes > self.usual {
            self.streak = 0;
        }
    }

    /// A FLUSH came.
    pub fn flushed(&mut self) {
        match self.writes {
            0 => return,
            n if n == self.usual => self.streak = self.streak.saturating_add(1),
            n => (self.usual, self.streak) = (n, 1),
        }
        self.writes = 0;
    }

    /// The next request will be a FLUSH, as far as one can tell.
    pub fn is_due(&self) -> bool {
        self.streak >= STREAK && self.writes == self.usual
    }

    /// The epoch that ends with this write was closed for it.
    pub fn closed(&mut self, seq: u64) {
        self.upto = seq;
    }

    /// Whether a FLUSH for this write was foreseen.
    pub fn covers(&self, seq: u64) -> bool {
        seq <= self.upto
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `w` is a write, `f` a FLUSH; whether the FLUSH was foreseen at each of them.
    fn foreseen(rhythm: &str) -> Vec<bool> {
        let mut foresight = Foresight::default();
        let mut seen = Vec::new();
        for c in rhythm.chars() {
            match c {
                'w' => foresight.wrote(),
                _ => {
                    seen.push(foresight.is_due());
                    foresight.flushed();
                }
            }
        }
        seen
    }

    #[test]
    fn a_steady_rhythm_is_foreseen_after_three_times() {
        assert_eq!(foreseen("wfwfwfwfwf"), [false, false, false, true, true]);
        assert_eq!(foreseen("wwfwwfwwfwwf"), [false, false, false, true]);
        // A FLUSH that follows no write says nothing.
        assert_eq!(foreseen("wfwfffwfwf").last(), Some(&true));
    }

    #[test]
    fn a_broken_rhythm_is_learnt_anew() {
        assert_eq!(
            foreseen("wfwfwfwfwwfwfwfwfwf"),
            [false, false, false, true, false, false, false, false, true]
        );
        let mut foresight = Foresight::default();
        (0..9).for_each(|_| foresight.wrote());
        assert!(!foresight.is_due());
    }
}
