//! `volrep bench`: its plan, its refusals, and that nothing of it is left whatever becomes of fio.
//!
//! The measurement itself, with the real fio, is in tests/e2e/bench.rs.

use super::place::until;
use super::{Ended, Place};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::process::{Command, Stdio};

/// A program that takes fio's arguments, with a case for each engine.
fn fake(place: &Place, bare: &str, nbd: &str) -> String {
    let text = format!(
        "#!/bin/sh\ncase \"$*\" in --version) echo fio-0.1; exit;; --enghelp=*) exit;; esac\n\
         for a; do case $a in --output=*) out=${{a#*=}};; esac; done\n\
         case \"$*\" in *ioengine=io_uring*) {bare};; *) {nbd};; esac\n"
    );
    std::fs::create_dir_all(place.path().join("bin")).unwrap();
    let path = place.file("bin/fio", text.as_bytes());
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    format!("{}:{}", place.path().join("bin").display(), std::env::var("PATH").unwrap())
}

const ONE_WRITE: &str =
    r#"echo '{"jobs":[{"jobname":"a","error":0,"write":{"total_ios":1,"iops":2,"io_bytes":4096}}]}' >$out"#;

/// A group that fits the test, and what its place holds.
fn group() -> (Place, Vec<String>) {
    let place = Place::new();
    place.init(&["data=disk:1M"]).expect(0, &[]);
    fake(&place, "exit 1", "exit 1");
    let tree = place.tree();
    (place, tree)
}

const SMALL: [&str; 6] = ["bench", "g", "--profile", "mixed", "--size", "64M"];

fn bench(place: &Place, path: &str, more: &[&str]) -> Command {
    let mut command = place.command(&[&SMALL, more].concat());
    command.env("PATH", path);
    command
}

fn run(place: &Place, path: &str, more: &[&str]) -> Ended {
    Ended::of(bench(place, path, more).output().unwrap())
}

/// Processes that have been told of this place.
fn processes(place: &Place) -> usize {
    let place = place.path().to_str().unwrap().as_bytes();
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let told = entries.filter_map(|e| std::fs::read(e.path().join("cmdline")).ok());
    told.filter(|text| text.windows(place.len()).any(|w| w == place)).count()
}

#[test]
fn the_plan_is_told_and_nothing_is_made() {
    let (place, tree) = group();
    let path = fake(&place, "exit 1", "exit 1");
    let ended = run(&place, &path, &["--dry-run", "--seconds", "7", "--shadow", ".", "--sync"]);
    ended.expect(0, &[]);
    let dir = place.path().canonicalize().unwrap();
    for words in [
        "mixed: 7 s on a bare file, then 7 s through volrep; 64.0 MiB",
        &format!("file     {}/.volrep-bench-g-volume, ", dir.display()),
        "state/g/.volrep-bench-g, 8.00 MiB, zstd 1",
        "a FLUSH waits for it",
        "--ioengine=io_uring",
        "--ioengine=nbd",
        "(dry run: nothing was created)",
    ] {
        assert!(ended.stdout.contains(words), "no `{words}` in {}", ended.stdout);
    }
    let told = run(&place, &path, &["--dry-run", "--json"]).json();
    assert_eq!((&told["seconds"], &told["size"]), (&30.into(), &(64 << 20).into()));
    assert_eq!((&told["dry_run"], &told["live_group_shares_its_disks"]), (&true.into(), &false.into()));
    assert_eq!((told["directories"].as_array().unwrap().len(), &told["fio"]), (4, &"fio-0.1".into()));
    assert!(told["space"][0]["needed"].as_u64().unwrap() > 72 << 20);
    assert_eq!(place.tree(), tree);
}

#[test]
fn it_says_what_it_lacks() {
    let (place, tree) = group();
    run(&place, "/nonexistent", &[]).expect(1, &["no fio in PATH", "the package is called fio"]);
    let path = fake(&place, "exit 1", "exit 1");
    let sized = |size: &str| {
        let mut command = place.command(&["bench", "g", "--profile", "mixed", "--size", size]);
        Ended::of(command.env("PATH", &path).output().unwrap())
    };
    sized("1000T").expect(1, &["not enough room", "stay free", "--dir"]);
    sized("1M").expect(2, &["from 64M to"]);
    run(&place, &path, &["--volume", "wal"]).expect(2, &["no volume `wal`", "here are: data"]);
    run(&place, &path, &["--sync"]).expect(2, &["--shadow"]);
    run(&place, &path, &["--dir", "nowhere"]).expect(1, &["nowhere"]);
    place.file("bin/fio", b"#!/bin/sh\n[ $1 != --enghelp=nbd ] && echo fio-0.2\n");
    run(&place, &path, &[]).expect(1, &["fio-0.2 has no `nbd` engine", "libnbd0"]);
    assert_eq!(place.tree(), tree);
}

#[test]
fn a_block_device_wants_a_directory_on_a_comparable_disk() {
    let devices = std::fs::read_dir("/dev").unwrap().flatten();
    let Some(device) = devices.into_iter().find(|d| d.file_type().is_ok_and(|t| t.is_block_device())) else {
        return eprintln!("skipped: no block device in /dev");
    };
    let (place, _) = group();
    let path = fake(&place, "exit 1", "exit 1");
    let file = place.config().join("g.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let disk = place.path().canonicalize().unwrap().join("disk");
    assert!(text.contains(disk.to_str().unwrap()), "{text}");
    std::fs::write(&file, text.replace(disk.to_str().unwrap(), device.path().to_str().unwrap())).unwrap();
    run(&place, &path, &[]).expect(2, &["is the block device /dev/", "--dir"]);
    run(&place, &path, &["--dir", ".", "--dry-run"]).expect(0, &[]);
}

#[test]
fn a_name_that_fio_would_split_is_refused() {
    let (place, _) = group();
    let path = fake(&place, "exit 1", "exit 1");
    for name in ["pci-0000:00", "back\\slash"] {
        let dir = place.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        run(&place, &path, &["--dir", dir.to_str().unwrap()]).expect(2, &["fio takes", "--dir"]);
        std::fs::remove_dir(&dir).expect("nothing was made in it");
    }
}

#[test]
fn nothing_is_left_whatever_becomes_of_fio() {
    let (place, tree) = group();
    let disk = std::fs::read(place.path().join("disk")).unwrap();
    for (bare, nbd, word) in [
        ("echo it is broken >&2; exit 1", "exit 0", "it is broken"),
        ("exit 0", "exit 0", "can't read"),
        (ONE_WRITE, "echo no export >&2; exit 1", "no export"),
        (ONE_WRITE, r#"echo '{"jobs":[{"error":5}]}' >$out"#, "had errors"),
        (ONE_WRITE, r#"echo '{"jobs":[{"error":0}]}' >$out"#, "same kinds of requests"),
    ] {
        let path = fake(&place, bare, nbd);
        run(&place, &path, &["--seconds", "1"]).expect(1, &[word]);
        assert_eq!((place.tree(), processes(&place)), (tree.clone(), 0), "{bare} {nbd}");
    }
    let path = fake(&place, ONE_WRITE, ONE_WRITE);
    let report = run(&place, &path, &["--seconds", "1", "--json", "--keep", "kept"]).expect(0, &[]).json();
    assert_eq!((&report["rows"][0]["ratio"], &report["bytes_written"]), (&1.0.into(), &4096.into()));
    assert_eq!(report["kept"].as_array().unwrap().len(), 3);
    for kept in report["kept"].as_array().unwrap() {
        std::fs::remove_file(place.path().join(kept.as_str().unwrap())).unwrap();
    }
    std::fs::remove_dir(place.path().join("kept")).unwrap();
    assert_eq!((place.tree(), processes(&place)), (tree, 0));
    assert_eq!(std::fs::read(place.path().join("disk")).unwrap(), disk);
}

#[test]
fn a_signal_ends_it_and_all_that_it_started() {
    let (place, tree) = group();
    let path = fake(&place, ONE_WRITE, "echo >$out; exec tail -f $out");
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut command = bench(&place, &path, &["--shadow", "."]);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let state = place.config().join("state/g/.volrep-bench-g");
        // fio's second run has begun once the first one's document is gone.
        let second = || std::fs::read(state.join("fio.json")).is_ok_and(|text| text == b"\n").then_some(());
        until("fio runs on the scratch group", second);
        // Another one keeps away meanwhile.
        run(&place, &path, &[]).expect(11, &["another `volrep bench` of this group"]);
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        Ended::of(child.wait_with_output().unwrap()).expect(130, &["interrupted"]);
        assert_eq!((place.tree(), processes(&place)), (tree.clone(), 0));
    }
}

#[test]
fn one_that_was_killed_leaves_no_daemon_and_the_next_one_clears_up() {
    let (place, tree) = group();
    let path = fake(&place, ONE_WRITE, "echo >$out; exec tail -f $out");
    let mut child = bench(&place, &path, &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let state = place.config().join("state/g/.volrep-bench-g");
    let second = || std::fs::read(state.join("fio.json")).is_ok_and(|text| text == b"\n").then_some(());
    until("fio runs on the scratch group", second);
    child.kill().unwrap();
    child.wait().unwrap();
    until("its children have ended, too", || (processes(&place) == 0).then_some(()));
    assert_ne!(place.tree(), tree);
    let path = fake(&place, ONE_WRITE, ONE_WRITE);
    run(&place, &path, &["--seconds", "1"]).expect(0, &[]);
    assert!(!place.tree().iter().any(|path| path.contains(".volrep-bench")));
}
