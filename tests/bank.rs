//! The bank of planted bugs is kept: each still applies, says what it breaks, and was found.
//!
//! Owns: nothing. Invariant: a change of the product that a planted bug no longer fits fails here, and so does a bug
//! of which nobody knows whether it is found (`tools/bugs --record` writes that down).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn bank() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bugs")
}

/// Name and text of each patch.
fn patches() -> Vec<(String, String)> {
    let entries = fs::read_dir(bank()).unwrap().flatten().map(|e| e.path());
    let patches = entries.filter(|p| p.extension().is_some_and(|e| e == "patch"));
    let name = |p: &Path| p.file_stem().unwrap().to_str().unwrap().to_owned();
    let mut all: Vec<_> = patches.map(|p| (name(&p), fs::read_to_string(&p).unwrap())).collect();
    all.sort();
    all
}

/// Whether a patch fits the tree.
fn applies(patch: &Path) -> Result<(), String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = Command::new("git").args(["apply", "--check"]).arg(patch).current_dir(root).output();
    let out = out.map_err(|e| format!("git can't be run: {e}"))?;
    if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned()) }
}

#[test]
fn every_planted_bug_applies_and_says_what_it_breaks() {
    let patches = patches();
    assert!(patches.len() >= 25, "only {} bugs", patches.len());
    for (name, text) in patches {
        let head = text.split("\n--- ").next().unwrap();
        for field in ["Breaks: ", "Invariant: ", "Found by: "] {
            assert!(
                head.lines().any(|l| l.starts_with(field) && l.len() > field.len()),
                "{name}: no {field}"
            );
        }
        let touched = text.lines().filter_map(|l| l.strip_prefix("+++ b/"));
        assert!(touched.clone().count() > 0 && touched.clone().all(|p| p.starts_with("src/")), "{name}");
        if let Err(why) = applies(&bank().join(format!("{name}.patch"))) {
            panic!("{name} does not apply any more, make it anew: {why}");
        }
    }
}

#[test]
fn a_patch_that_does_not_fit_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let wrong = dir.path().join("wrong.patch");
    let text = "--- a/src/lib.rs\n+++ b/src/lib.rs\n@@ -1,1 +1,1 @@\n-//! no such line\n+//! nor this\n";
    fs::write(&wrong, text).unwrap();
    assert!(applies(&wrong).is_err());
}

#[test]
fn every_planted_bug_was_found() {
    let results = fs::read_to_string(bank().join("RESULTS.md")).unwrap();
    for (name, _) in patches() {
        let row = results.lines().find(|l| l.starts_with(&format!("| {name} |")));
        let row = row.unwrap_or_else(|| panic!("{name} was never run: tools/bugs --record {name}"));
        assert!(!row.contains("**"), "nothing finds {name}: {row}");
    }
}
