//! The seeds that have found something, run before all others.
//!
//! Owns: the list, `regressions.txt`. Invariant: no seed is twice in it, and each says what it found, which commit
//! mended that, and what else would find it again (`tests/bank.rs` looks for the patches and tests that it names).

use std::collections::BTreeSet;

const LIST: &str = include_str!("regressions.txt");

/// Seed, commit, what keeps it, what it found.
fn lines() -> impl Iterator<Item = (u64, [&'static str; 3])> {
    LIST.lines().filter(|l| !l.is_empty() && !l.starts_with('#')).map(|line| {
        let mut words = line.splitn(4, ' ').map(str::trim);
        let mut word = || words.next().filter(|w| !w.is_empty()).unwrap_or_else(|| panic!("{line}"));
        (word().parse().unwrap_or_else(|_| panic!("{line}")), [word(), word(), word()])
    })
}

/// The seeds, in the order of the list.
pub fn seeds() -> impl Iterator<Item = u64> {
    lines().map(|(seed, _)| seed)
}

/// The list can be read, and names each seed once.
pub fn check() {
    let mut seen = BTreeSet::new();
    for (seed, [commit, kept, _]) in lines() {
        assert!(seen.insert(seed), "seed {seed} is there twice");
        assert!(commit.len() >= 7 && commit.bytes().all(|b| b.is_ascii_hexdigit()), "{seed}: {commit}");
        let kinds = ["bank:", "test:", "drawn:", "seed"];
        assert!(kept.split(',').all(|k| kinds.iter().any(|kind| k.starts_with(kind))), "{seed}: {kept}");
    }
    assert!(!seen.is_empty());
}
