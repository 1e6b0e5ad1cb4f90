//! The bank of planted bugs is kept: each still applies, says what it breaks, and was found.
//!
//! So is the list of the mutants that no test notices: each names a function that exists, and says why.
//!
//! Owns: nothing. Invariant: a change of the product that a planted bug no longer fits fails here, and so does a bug
//! of which nobody knows whether it is found (`tools/bugs --record` writes that down), and a survivor that nobody has
//! explained (`tools/mutants --record` lists them).

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

/// Whether a file below this directory has a function of that name.
fn is_there(dir: &Path, function: &str) -> bool {
    let entries = fs::read_dir(dir).unwrap().flatten().map(|e| e.path());
    let holds = |file: &Path| {
        let text = file.extension().filter(|e| *e == "rs").map(|_| fs::read_to_string(file).unwrap());
        text.is_some_and(|t| t.contains(&format!("fn {function}(")))
    };
    entries.into_iter().any(|at| if at.is_dir() { is_there(&at, function) } else { holds(&at) })
}

/// What is named in the simulator's list of seeds, and is not there.
fn unkept(list: &str, root: &Path) -> Vec<String> {
    let patches: Vec<_> = patches().into_iter().map(|(name, _)| name).collect();
    let kept = list.lines().filter(|l| !l.starts_with('#')).filter_map(|l| l.split(' ').nth(2));
    let there = |what: &str| match what.split_once(':') {
        Some(("bank", number)) => patches.iter().any(|name| name.starts_with(&format!("{number}-"))),
        Some(("test", name)) => ["src", "tests"].iter().any(|dir| is_there(&root.join(dir), name)),
        _ => true,
    };
    kept.flat_map(|k| k.split(',')).filter(|k| !there(k)).map(str::to_owned).collect()
}

#[test]
fn what_keeps_the_simulators_findings_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let list = fs::read_to_string(root.join("tests/sim/regressions.txt")).unwrap();
    assert_eq!(unkept(&list, root), Vec::<String>::new());
    let wrong = ["no", "such"].join("_");
    assert_eq!(unkept(&format!("5 abcdef0 bank:00,test:{wrong},seed what it found"), root).len(), 2);
}

/// The cells of a row of a table, of which some have a `\\|` in them.
fn cells(line: &str) -> Vec<String> {
    let line = line.replace("\\|", "\0");
    let inner = line.trim().trim_start_matches('|').trim_end_matches('|');
    inner.split('|').map(|c| c.trim().replace('\0', "|")).collect()
}

/// What is wrong with the list of survivors; `source` gives the text of a file.
fn survivors(list: &str, source: &dyn Fn(&str) -> Option<String>) -> Vec<String> {
    let mut broken = Vec::new();
    for row in list.lines().filter(|l| l.starts_with("| src/")).map(cells) {
        let Some(text) = source(&row[0]) else {
            broken.push(format!("{}: there is no such file", row[0]));
            continue;
        };
        let [file, function, change, why] = &row[..] else { continue };
        let name = function.trim_matches('`').rsplit("::").next().unwrap_or_default();
        let exists = ["(", "<"].iter().any(|end| text.contains(&format!("fn {name}{end}")));
        if !name.is_empty() && !exists {
            broken.push(format!("{file}: there is no {function}"));
        }
        if why.len() < 10 || why.contains("unexplained") {
            broken.push(format!("{file}: {change}: why does nothing notice it?"));
        }
    }
    broken
}

#[test]
fn every_mutant_that_survives_is_in_a_function_that_exists_and_is_explained() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let list = fs::read_to_string(root.join("tests/mutants/RESULTS.md")).unwrap();
    let broken = survivors(&list, &|file| fs::read_to_string(root.join(file)).ok());
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn a_survivor_that_is_gone_or_unexplained_is_noticed() {
    let source = |file: &str| (file == "src/a.rs").then(|| "fn there() {}\nfn of<T>() {}".to_owned());
    let wrong = |row: &str| survivors(row, &source).len();
    assert_eq!(wrong("| src/a.rs | `A::there` | `replace \\| with ^ #1` | the bits never overlap |"), 0);
    assert_eq!(wrong("| src/a.rs | `of` | `x #1` | it is only a hint |"), 0);
    assert_eq!(wrong("| src/a.rs | `` | `replace << with >> #1` | it is only a hint |"), 0);
    assert_eq!(wrong("| src/a.rs | `gone` | `x #1` | it is only a hint |"), 1);
    assert_eq!(wrong("| src/a.rs | `there` | `x #1` | **unexplained** |"), 1);
    assert_eq!(wrong("| src/b.rs | `there` | `x #1` | it is only a hint |"), 1);
    assert_eq!(wrong("| src/a.rs | 5 | 3 | 1 | 0 | 1 | 0 | 2026-01-01 |"), 0);
    assert_eq!(wrong("| src/b.rs | 5 | 3 | 1 | 0 | 1 | 0 | 2026-01-01 |"), 1);
}
