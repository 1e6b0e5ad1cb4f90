//! What was run, kept over many runs: RESULTS.md beside this file.
//!
//! Owns: that table. Invariant: a row for each trace that was recorded and judged to its end, and the sums of all rows below.

use std::path::{Path, PathBuf};
use std::process::Command;

const HEAD: &str = "# What crash points came to

`cargo test --profile checked --test crash -- --record` adds what it ran: a row for each trace. The seed is that of the trace
and of the places and survivals that are drawn; the source is the last commit of src (+ for changes that were not in it).

| on | source | trace | seed | images | of a database | wrong |
| --- | --- | --- | --- | --- | --- | --- |
";

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn output(program: &str, words: &[&str]) -> String {
    let out = Command::new(program).args(words).current_dir(root()).output().unwrap();
    String::from_utf8(out.stdout).unwrap().trim().to_owned()
}

/// The last commit that changed the product, and whether it has changed since.
fn source() -> String {
    let commit = output("git", &["log", "-1", "--format=%h", "--abbrev=10", "--", "src"]);
    let changed = !output("git", &["status", "--porcelain", "--", "src"]).is_empty();
    commit + if changed { "+" } else { "" }
}

/// The table with one more row.
fn with(old: &str, row: String) -> String {
    let kept =
        old.lines().filter(|l| l.starts_with("| ") && !l.starts_with("| on |") && !l.starts_with("| ---"));
    let rows: Vec<_> = kept.map(str::to_owned).chain([row]).collect();
    let images = |database: &str| {
        let cells = rows.iter().map(|r| r.split('|').map(str::trim).collect::<Vec<_>>());
        cells.filter(|c| c[6] == database).map(|c| c[5].parse::<u64>().unwrap()).sum::<u64>()
    };
    let sums =
        format!("{} images of file systems and volumes, {} of databases.", images("no"), images("yes"));
    format!("{HEAD}{}\n\n{sums}\n", rows.join("\n"))
}

/// Adds what came of a trace.
pub fn add(trace: &str, seed: u64, images: usize, database: bool, wrong: usize) {
    let path: &Path = &root().join("tests/crash/RESULTS.md");
    let (day, database) = (output("date", &["+%Y-%m-%d"]), if database { "yes" } else { "no" });
    let row = format!("| {day} | {} | {trace} | {seed} | {images} | {database} | {wrong} |", source());
    let old = std::fs::read_to_string(path).unwrap_or_default();
    std::fs::write(path, with(&old, row)).unwrap();
}
