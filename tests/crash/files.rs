//! The work on a file system, and what must be there of it after a crash.
//!
//! Owns: nothing. Invariant: step `n` is a function of `n` alone, and is over once its fsyncs are.

use crate::judge::Verdict;
use crate::log::Mark;
use crate::recorder::Recorder;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// A file is deleted so many steps after it was made.
const LIFE: u64 = 24;

fn name(n: u64) -> String {
    format!("file{n}")
}

fn content(n: u64) -> Vec<u8> {
    let mut bytes = vec![0; 1 + (n as usize * 7919) % 90_000];
    blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Makes, renames and deletes files; each step is noted once it is durable.
pub fn work(dir: &Path, steps: u64, recorder: &Recorder) {
    let names = File::open(dir).unwrap();
    for n in 1..=steps {
        let made = dir.join("new");
        let mut file = File::create(&made).unwrap();
        let bytes = content(n);
        // In pieces, so that a crash may come within.
        bytes.chunks(20_000).for_each(|piece| file.write_all(piece).unwrap());
        file.sync_all().unwrap();
        fs::rename(&made, dir.join(name(n))).unwrap();
        if n > LIFE {
            fs::remove_file(dir.join(name(n - LIFE))).unwrap();
        }
        names.sync_all().unwrap();
        recorder.mark(Mark::Kept(n));
    }
}

/// Whether all that was kept is there, and everything that has a name is whole. The last step that is there.
pub fn look(dir: &Path, kept: u64) -> Verdict<u64> {
    let mut there: Vec<u64> = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| format!("read {}: {e}", dir.display()))?.flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        if let Some(n) = name.strip_prefix("file").and_then(|n| n.parse().ok()) {
            there.push(n);
            let bytes = fs::read(entry.path()).map_err(|e| format!("read {name}: {e}"))?;
            if bytes != content(n) {
                return Err(format!("{name} does not hold what it held when it got its name"));
            }
        }
    }
    let last = there.iter().copied().max().unwrap_or(0);
    // The step after it may have begun, and deletes one.
    let first = (last + 2).saturating_sub(LIFE).max(1);
    if let Some(n) = (first..=last).find(|n| !there.contains(n)) {
        return Err(format!("file{n} is missing, and file{last} is there"));
    }
    if last < kept {
        return Err(format!("file{kept} was synced, and file{last} is the last one"));
    }
    Ok(last)
}
