//! The demonstration holds: PostgreSQL on a volume, the link cut, the daemon killed, the shadow promoted.
//!
//! Owns: nothing; tools/demo/quickstart.py checks its own facts and takes everything away. Invariant:
//! what it says is false fails here. Needs what it needs; says so and passes where it is missing.

use std::path::Path;
use std::process::{Command, Stdio};

/// How the demonstration says that this machine can't.
const CANNOT: i32 = 77;

#[test]
fn every_fact_of_the_quick_form_is_true() {
    let python = Path::new("/usr/bin/python3");
    let has_driver = || Command::new(python).args(["-c", "import psycopg2"]).stderr(Stdio::null()).status();
    if !python.exists() || !has_driver().is_ok_and(|s| s.success()) {
        println!("skipped: no python3-psycopg2 (tools/quickstart installs it)");
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("q");
    let output = Command::new(python)
        .arg(root.join("tools/demo/quickstart.py"))
        .args(["--volrep", env!("CARGO_BIN_EXE_volrep"), "--quick", "--dir"])
        .arg(&dir)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(CANNOT) {
        println!("skipped: {said}");
        return;
    }
    println!("{said}");
    assert!(output.status.success(), "{:?}\n{said}", output.status);
    assert!(!dir.exists(), "the directory was left behind\n{said}");
}
