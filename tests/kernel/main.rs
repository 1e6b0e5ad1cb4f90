//! Kernel devices, in a guest whose kernel has them: the scripts of this directory, run by `tools/vm`.
//!
//! Owns: which script runs with what, and for how long. Invariant: each runs in a guest of its own, one
//! at a time, within a limit; what it prints is shown, and it passes only with status 0.
//!
//! The short form runs with the other tests; `VOLREP_LONG=1` makes the rounds many.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

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

/// The turn of a test that needs a guest; says why if there can be none.
fn turn() -> Option<MutexGuard<'static, ()>> {
    if !in_path("qemu-system-x86_64") {
        println!("skipped: no qemu-system-x86_64");
        return None;
    }
    Some(ONE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Runs a script by tools/vm.
fn vm(options: &[&str], script: &Path, arguments: &[&str]) -> Output {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/vm"))
        .arg("run")
        .args(options)
        .arg(script)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("tools/vm can be run")
}

/// Runs scripts of this directory, joined by `+`, with these arguments for at most `limit` seconds in all.
fn guest(script: &str, arguments: &[&str], limit: u32) {
    let Some(_turn) = turn() else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let file = |from: &Path, to: &str| format!("{}:{to}", from.display());
    let (limit, program) = (limit.to_string(), file(&program(scratch.path()), "/usr/bin/volrep"));
    let tests = file(&root.join("tests/kernel"), "/tests");
    let rules = file(&root.join("tools/60-volrep.rules"), "/tools/60-volrep.rules");
    let machine = ["--disk", "2G", "--memory", "3G", "--env", "SCRATCH=/dev/vda", "--timeout", &limit];
    let files = ["--file", &program, "--file", &tests, "--file", &rules];
    let words = [&[script], arguments].concat();
    let output = vm(&[&machine[..], &files[..]].concat(), &root.join("tests/kernel/enter"), &words);
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script} {arguments:?}: {}\n{said}", output.status);
    assert!(text.contains("\nok: ") || text.starts_with("ok: "), "{script} {arguments:?} checked nothing");
}

fn long() -> bool {
    std::env::var_os("VOLREP_LONG").is_some_and(|v| v != "0")
}

/// Rounds of killing a daemon.
fn rounds() -> (&'static str, u32) {
    if long() { ("200", 3000) } else { ("4", 300) }
}

/// What the other tests take for granted of tools/vm.
#[test]
fn a_guest_gives_back_status_output_and_results_and_never_hangs() {
    let Some(_turn) = turn() else { return };
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let script = |text: &str| {
        let path = scratch.path().join("script");
        std::fs::write(&path, format!("#!/bin/bash\n{text}\n")).unwrap();
        path
    };
    let results = scratch.path().join("out");
    let told = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    // Two guests and the wire between them.
    let both =
        "set -e; [ $1 = word ]; echo \"$KEY\" >/out/file; peer 'cp /given /out/there; hostname -I'; exit 7";
    let given = scratch.path().join("given");
    std::fs::write(&given, "given").unwrap();
    let (out, given) = (results.to_str().unwrap(), format!("{}:/given", given.display()));
    let options =
        ["--guests", "2", "--env", "KEY=a value", "--file", &given, "--out", out, "--timeout", "60"];
    let output = vm(&options, &script(both), &["word"]);
    assert_eq!(output.status.code(), Some(7), "{}", told(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("10.77.0.2"), "{output:?}");
    let result = |name: &str| std::fs::read_to_string(results.join(name)).unwrap();
    assert_eq!((result("file"), result("peer/there")), ("a value\n".into(), "given".into()));
    // A script that does not end is ended.
    let output = vm(&["--timeout", "2"], &script("sleep 1000"), &[]);
    assert_eq!(output.status.code(), Some(124), "{}", told(&output));
    let shell = told(&output);
    let seconds = shell.split("shell after ").nth(1).and_then(|s| s.split(' ').next()).expect("it has told");
    println!("figure: tools/vm: shell after {seconds} s");
    // Ten times what is aimed at: only a gross failure fails a test.
    assert!(seconds.parse::<f64>().unwrap() < 100.0);
    // So is a machine that has crashed, and it is told from a script that failed.
    let output = vm(&["--timeout", "60"], &script("echo c >/proc/sysrq-trigger; sleep 1000"), &[]);
    assert_eq!(output.status.code(), Some(125), "{}", told(&output));
    assert!(told(&output).contains("Its last words"), "{}", told(&output));
}

#[test]
fn nbd_device() {
    guest("device.bash+durable.bash", &["nbd"], 300);
}

#[test]
fn nbd_two_nodes() {
    guest("view.bash+retired.bash", &["nbd"], 300);
}

#[test]
fn ublk_two_nodes() {
    guest("view.bash+retired.bash", &["ublk"], 300);
}

#[test]
fn nbd_alone() {
    guest("nbd_alone.bash", &["nbd"], 300);
}

#[test]
fn nbd_database() {
    guest("database.bash", &["nbd"], 300);
}

#[test]
fn nbd_restart() {
    let (rounds, limit) = rounds();
    guest("restart.bash", &["nbd", rounds], limit);
}

#[test]
fn ublk_device() {
    guest("device.bash+durable.bash", &["ublk"], 300);
}

#[test]
fn ublk_database() {
    guest("database.bash", &["ublk"], 300);
}

#[test]
fn ublk_restart() {
    let (rounds, limit) = rounds();
    guest("restart.bash", &["ublk", rounds], limit);
}

#[test]
fn ublk_alone() {
    let (scenarios, limit) =
        if long() { (&["attach_killed:200", "kills:200"][..], 3000) } else { (&[][..], 300) };
    guest("ublk_alone.py", scenarios, limit);
}

/// The benchmark beside DRBD still runs: every subject, a second of one row each. Not its figures.
#[test]
fn bench_guests() {
    if !long() {
        println!("skipped: a minute of bench/guests, without VOLREP_LONG=1");
        return;
    }
    let Some(_turn) = turn() else { return };
    let passthrough = Path::new(env!("CARGO_BIN_EXE_volrep")).with_file_name("examples/passthrough");
    if !passthrough.exists() {
        println!("skipped: {} was not built (cargo build --example passthrough)", passthrough.display());
        return;
    }
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

/// On this machine's own kernel it is tested by `tests/fuse_device`.
#[test]
fn fuse_device() {
    if !long() {
        println!("skipped: FUSE on the guest's kernel, without VOLREP_LONG=1");
        return;
    }
    guest("device.bash+durable.bash", &["fuse"], 300);
}
