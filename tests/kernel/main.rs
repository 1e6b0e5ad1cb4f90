//! Kernel devices, in a guest whose kernel has them: the scripts of this directory, run by `tools/vm`.
//!
//! Owns: which script runs with what, and for how long. Invariant: each runs in a guest of its own, one
//! at a time, within a limit; what it prints is shown, and it passes only with status 0.
//!
//! The short form runs with the other tests; `VOLREP_LONG=1` makes the rounds many.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

/// Guests at a time: the machine has few processors, and emulation needs them.
static ONE: Mutex<()> = Mutex::new(());

fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).exists())
}

/// The program without what only a debugger needs, which is most of it.
fn program(dir: &Path) -> PathBuf {
    let (built, small) = (Path::new(env!("CARGO_BIN_EXE_volrep")), dir.join("volrep"));
    let stripped = Command::new("strip").args(["--strip-debug", "-o"]).arg(&small).arg(built).status();
    if stripped.is_ok_and(|s| s.success()) { small } else { built.to_owned() }
}

/// Runs a script with its arguments for at most `limit` seconds.
fn guest(script: &str, arguments: &[&str], limit: u32) {
    if !in_path("qemu-system-x86_64") {
        println!("skipped: no qemu-system-x86_64");
        return;
    }
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let file = |from: &Path, to: &str| format!("{}:{to}", from.display());
    let output = Command::new(root.join("tools/vm"))
        .args(["run", "--disk", "2G", "--memory", "3G", "--env", "SCRATCH=/dev/vda", "--timeout"])
        .arg(limit.to_string())
        .args(["--file", &file(&program(scratch.path()), "/usr/bin/volrep")])
        .args(["--file", &file(&root.join("tests/kernel"), "/tests")])
        .args(["--file", &file(&root.join("tools/60-volrep.rules"), "/tools/60-volrep.rules")])
        .arg(root.join("tests/kernel/enter"))
        .arg(script)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("tools/vm can be run");
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script} {arguments:?}: {}\n{said}", output.status);
    assert!(text.contains("\nok: ") || text.starts_with("ok: "), "{script} {arguments:?} checked nothing");
}

/// Rounds of killing a daemon.
fn rounds() -> (&'static str, u32) {
    if std::env::var_os("VOLREP_LONG").is_some() { ("200", 3000) } else { ("6", 200) }
}

#[test]
fn nbd_device() {
    guest("device.bash", &["nbd"], 120);
}

#[test]
fn nbd_database() {
    guest("database.bash", &["nbd"], 120);
}

#[test]
fn nbd_restart() {
    let (rounds, limit) = rounds();
    guest("restart.bash", &["nbd", rounds], limit);
}

#[test]
fn nbd_alone() {
    guest("nbd_alone.bash", &["nbd"], 120);
}

#[test]
fn ublk_device() {
    guest("device.bash", &["ublk"], 120);
}

#[test]
fn ublk_database() {
    guest("database.bash", &["ublk"], 120);
}

#[test]
fn ublk_restart() {
    let (rounds, limit) = rounds();
    guest("restart.bash", &["ublk", rounds], limit);
}

#[test]
fn ublk_alone() {
    let long = std::env::var_os("VOLREP_LONG").is_some();
    guest("ublk_alone.py", if long { &["kills:200"] } else { &[] }, if long { 1500 } else { 200 });
}

/// The benchmark beside DRBD still runs: every subject, a second of one row each. Not its figures.
#[test]
fn bench_guests() {
    if !in_path("qemu-system-x86_64") {
        println!("skipped: no qemu-system-x86_64");
        return;
    }
    let passthrough = Path::new(env!("CARGO_BIN_EXE_volrep")).with_file_name("examples/passthrough");
    if !passthrough.exists() {
        println!("skipped: {} was not built (cargo build --example passthrough)", passthrough.display());
        return;
    }
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/guests"))
        .args(["--smoke", "--volrep", env!("CARGO_BIN_EXE_volrep"), "--passthrough"])
        .arg(passthrough)
        .stdin(Stdio::null())
        .output()
        .expect("bench/guests can be run");
    let (table, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    print!("{table}");
    assert!(output.status.success(), "bench/guests --smoke: {}\n{said}", output.status);
    assert!(said.contains("ok: every subject, every row"), "bench/guests --smoke measured nothing:\n{said}");
    assert!(table.contains("DRBD C") && !table.contains("failed"), "no full table:\n{table}");
}

#[test]
fn fuse_device() {
    guest("device.bash", &["fuse"], 120);
}
