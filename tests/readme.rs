//! README.md does what it says: its `sh` blocks run, in order, in one shell and an empty directory, by a
//! user without any privilege, who can write neither /etc nor /var nor /run.
//!
//! Owns: their extraction. Invariant: a block is run as it stands, but for the ports, which must be
//! free ones; what it started is ended with it.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The ports that the README uses.
const PORTS: [&str; 2] = ["127.0.0.1:7654", "127.0.0.1:7655"];
/// The user who has nothing, under this number on every system.
const NOBODY: u32 = 65534;
/// What the blocks call, besides a shell.
const PROGRAMS: [&str; 3] = ["nbdinfo", "qemu-io", "jq"];

fn readme() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap()
}

/// The `sh` blocks.
fn blocks(text: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut open: Option<String> = None;
    for line in text.lines() {
        match (&mut open, line) {
            (None, "```sh") => open = Some(String::new()),
            (Some(_), "```") => blocks.extend(open.take()),
            (Some(block), line) => *block += &format!("{line}\n"),
            (None, _) => {}
        }
    }
    assert!(open.is_none(), "a block without an end");
    blocks
}

fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).exists())
}

/// The whole README as one script; each block says when it begins.
fn script(free: [String; 2]) -> String {
    let blocks = blocks(&readme());
    assert!(blocks.len() >= 6, "only {} blocks", blocks.len());
    // A failed block must not leave daemons behind.
    let mut script = "set -eu\ntrap 'trap - EXIT; kill -9 $(jobs -p) 2>/dev/null || true' EXIT\n".to_owned();
    for (i, block) in blocks.iter().enumerate() {
        script += &format!("echo '=== block {} of README.md' >&2\n{block}", i + 1);
    }
    PORTS.iter().zip(free).fold(script, |script, (port, free)| script.replace(port, &free))
}

#[test]
fn every_block_runs_in_order() {
    if let Some(program) = PROGRAMS.iter().find(|p| !in_path(p)) {
        println!("skipped: no {program}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let shm = Path::new("/dev/shm").join(format!("volrep-readme-{}", std::process::id()));
    let free = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let free = free.map(|l| l.local_addr().unwrap().to_string());
    fs::write(dir.path().join("script"), script(free)).unwrap();
    // A copy: the directories above the program may be closed to others.
    let programs = tempfile::tempdir().unwrap();
    fs::copy(env!("CARGO_BIN_EXE_volrep"), programs.path().join("volrep")).unwrap();
    let path = format!("{}:{}", programs.path().display(), std::env::var("PATH").unwrap());
    let output = |name: &str| fs::File::create(dir.path().join(name)).unwrap();
    let mut shell = Command::new("bash");
    if nix::unistd::geteuid().is_root() {
        chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        chown(programs.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        shell.uid(NOBODY).gid(NOBODY);
    }
    let mut shell = shell
        .arg("script")
        .current_dir(dir.path())
        .env("PATH", path)
        .env("VOLREP_SHM_DIR", &shm)
        .stdin(Stdio::null())
        .stdout(output("stdout"))
        .stderr(output("stderr"))
        .process_group(0)
        .spawn()
        .unwrap();
    // A loop that waits for what never comes must end, too.
    let end = Instant::now() + Duration::from_secs(120);
    let status = loop {
        if let Some(status) = shell.try_wait().unwrap() {
            break Some(status);
        }
        if Instant::now() > end {
            let group = nix::unistd::Pid::from_raw(shell.id() as i32);
            nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL).unwrap();
            shell.wait().unwrap();
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let said: Vec<String> = ["stdout", "stderr", "east.log", "west.log", "attach.log"]
        .iter()
        .map(|name| format!("--- {name}\n{}", fs::read_to_string(dir.path().join(name)).unwrap_or_default()))
        .collect();
    let _ = fs::remove_dir_all(&shm);
    assert!(status.is_some_and(|s| s.success()), "{status:?}\n{}", said.join("\n"));
}

#[test]
fn what_it_names_is_in_the_tree() {
    let text = readme();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let words = text.split(|c: char| c.is_whitespace() || "`(),;".contains(c));
    let kept = ["tools/", "tests/", "bench/", "kernel-notes/", "src/"];
    for word in words.filter(|w| kept.iter().any(|k| w.starts_with(k))) {
        let path = root.join(word.trim_end_matches(['.', ':']));
        assert!(path.exists(), "README.md names {word}, which is not here");
    }
}
