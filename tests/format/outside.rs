//! The checks of `tests/fuzz` on arbitrary bytes, and on those that are right but for a few: the golden ones, and
//! what is kept in tests/fuzz/seeds, of which each was once wrong or is an example.
//!
//! Owns: where the seeds are. Invariant: every reader of bytes from outside has at least one.

use crate::checks::TARGETS;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

/// What a reader's seeds are: the golden bytes of its kind, and its own.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(root().join("format/golden")).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if name.starts_with(target) {
            let text = std::fs::read_to_string(entry.path()).unwrap();
            let (len, hex) = text.split_once('\n').unwrap();
            let digits: Vec<u8> = hex.chars().filter_map(|c| c.to_digit(16)).map(|d| d as u8).collect();
            let mut bytes: Vec<u8> = digits.chunks(2).map(|d| d[0] << 4 | d[1]).collect();
            bytes.resize(len.parse::<usize>().unwrap().min(8192), 0);
            all.push(bytes);
        }
    }
    let own = std::fs::read_dir(root().join("fuzz/seeds").join(target)).into_iter().flatten().flatten();
    all.extend(own.map(|entry| std::fs::read(entry.path()).unwrap()));
    all.sort();
    all
}

#[test]
fn every_seed_is_borne() {
    for (name, check) in TARGETS {
        let seeds = seeds(name);
        assert!(!seeds.is_empty(), "{name} has no seed");
        seeds.iter().for_each(|seed| check(seed));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn arbitrary_bytes_are_borne_by_all(which in any::<Index>(), bytes in vec(any::<u8>(), 0..2500)) {
        for (_, check) in TARGETS {
            check(&bytes[..bytes.len().min(300)]);
        }
        TARGETS[which.index(TARGETS.len())].1(&bytes);
    }

    #[test]
    fn altered_seeds_are_borne_by_all(
        pokes in vec((any::<Index>(), any::<u8>()), 1..5),
        from in any::<Index>(),
        cut in proptest::option::weighted(0.3, any::<Index>()),
        twice in any::<bool>(),
    ) {
        for (name, check) in TARGETS {
            let seeds = seeds(name);
            let mut bytes = seeds[from.index(seeds.len())].clone();
            if twice {
                bytes.extend_from_within(..bytes.len().min(2000));
            }
            if bytes.is_empty() {
                continue;
            }
            for (i, (at, value)) in pokes.iter().enumerate() {
                let len = if i % 2 == 0 { bytes.len() } else { bytes.len().min(256) };
                bytes[at.index(len)] = *value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            check(&bytes);
        }
    }
}
