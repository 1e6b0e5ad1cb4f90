//! Power cuts of whole machines: two guests with PostgreSQL on a volrep device, and a client outside of them that has
//! fsynced the number of every acknowledged commit.
//!
//! `cargo test --profile checked --test powercut -- --cycles N --seed S [--kind K] [--mode M] [--device D] [--program PATH]`;
//! VOLREP_LONG=1 is 200 cycles, VOLREP_POWERCUT=CYCLES as many as it says, otherwise there are five, one of each sort. What a
//! cycle does and with which seed is printed before it; these words repeat it, as far as time allows.
//!
//! In each cycle the client commits, then something happens: the power of either guest or of both is cut, the link
//! between them is, a daemon is killed with SIGKILL, several of these; sometimes the shadow is promoted, and the old
//! primary comes back. Then the database must recover, with every page checksum and every index right (amcheck), and
//! hold of each writer's commits an exact prefix, in the order of their time. Of the acknowledged ones none is missing; only a promotion
//! at ack level `local` may lose some, but none that a status of either node had said to be durable on the shadow.
//! Then the pair is whole again, is compared by `verify`, and the next cycle begins on it.
//!
//! The guests' disks have volatile caches (`disk`): a cut takes what no FLUSH had covered, or some of it, or tears it.
//!
//! Shown with bugs planted (`tests/bugs`): 07, in the first cycle of `--mode durable --kind shadow-daemon,primary,promote`; 90, in that of
//! `--mode local --kind primary`. 06 was not found in seven of those: an append that somebody waits for is, as a rule, durable when it is
//! written.
//!
//! What it does not see: time is that of an emulator on a busy machine, so races that need microseconds are for
//! `tests/sim`; a disk behind the guest's own file system sees that file system's order of writes, `tests/crash` all others.
//!
//! Owns: the arguments, and the disks while the guests run. Invariant: nothing that it started outlives it: the guests are killed by
//! the kernel when the script ends, the disks end with their standard input.

mod disk;
#[allow(dead_code, reason = "the simulator uses all of it")]
#[path = "../sim/prng.rs"]
mod prng;

use disk::{Disk, cut};
use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const PYTHON: &str = "/usr/bin/python3"; // Debian's own: another one in PATH would not see its modules

/// What the script asks of the disks: a line each, and a line in answer.
#[derive(Default)]
struct Disks(BTreeMap<String, Disk>);

impl Disks {
    fn named(&self, name: &str) -> Result<Disk, String> {
        self.0.get(name).cloned().ok_or(format!("no disk {name}"))
    }

    fn obey(&mut self, line: &str) -> Result<String, String> {
        let words: Vec<_> = line.split_whitespace().collect();
        let seed = |text: &str| text.parse::<u64>().map_err(|e| format!("{text}: {e}"));
        let told = |e: std::io::Error| format!("{line}: {e}");
        match words[..] {
            ["new", name, image, number] => {
                let disk = Disk::new(Path::new(image), seed(number)?).map_err(told)?;
                self.0.insert(name.to_owned(), disk);
            }
            ["plug", name, socket] => self.named(name)?.plug(Path::new(socket)).map_err(told)?,
            ["cut", number, ref names @ ..] => {
                let disks = names.iter().map(|n| self.named(n)).collect::<Result<Vec<_>, _>>()?;
                let lost = cut(&disks, seed(number)?).map_err(told)?;
                let one = |(name, l): (&&str, &disk::Lost)| {
                    format!("{name}: {} not flushed, {} survive, {} torn", l.pending, l.whole, l.torn)
                };
                return Ok(names.iter().zip(&lost).map(one).collect::<Vec<_>>().join("; "));
            }
            _ => return Err(format!("{line} is not understood")),
        }
        Ok(String::new())
    }
}

fn serve_disks() {
    let mut disks = Disks::default();
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        match disks.obey(&line) {
            Ok(told) => println!("ok {told}"),
            Err(why) => println!("failed {why}"),
        }
        // Without a reader there is nobody left to serve.
        if std::io::stdout().flush().is_err() {
            return;
        }
    }
}

/// What can't be done here, if anything.
fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("a database's files for the guests are made by root".into());
    }
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let there = |p: &str| std::env::split_paths(&path).any(|dir| dir.join(p).exists());
    if let Some(program) = ["qemu-system-x86_64", "mkfs.ext4", "setpriv", "strip"].iter().find(|p| !there(p))
    {
        return Some(format!("no {program}"));
    }
    if !Path::new("/usr/lib/postgresql/15/bin/initdb").exists() {
        return Some("no postgresql-15".into());
    }
    let imports = Command::new(PYTHON).args(["-c", "import psycopg2"]).stderr(Stdio::null()).status();
    if !imports.is_ok_and(|s| s.success()) {
        return Some("no python3-psycopg2".into());
    }
    None
}

/// How many cycles, unless the arguments say so.
fn cycles() -> String {
    let long = std::env::var_os("VOLREP_LONG").is_some_and(|v| v != "0");
    std::env::var("VOLREP_POWERCUT").unwrap_or(if long { "200" } else { "5" }.into())
}

/// Runs the script with these arguments, beside its own; whether all was right.
fn power_cuts(mut words: Vec<String>) -> bool {
    let mut program = PathBuf::from(env!("CARGO_BIN_EXE_volrep"));
    if let Some(i) = words.iter().position(|w| w == "--program") {
        program = words.drain(i..=i + 1).nth(1).expect("--program PATH").into();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let status = Command::new(PYTHON)
        .arg(root.join("tests/powercut/powercut.py"))
        .args(["--cycles", &cycles()])
        .arg("--volrep")
        .arg(program)
        .arg("--disks")
        .arg(std::env::current_exe().expect("this program's path"))
        .arg("--keep")
        .arg(Path::new(env!("CARGO_TARGET_TMPDIR")).join("powercut"))
        .args(words)
        .stdin(Stdio::null())
        .status()
        .expect("python can be run");
    status.success()
}

fn main() {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|w| w == "--disks") {
        return serve_disks();
    }
    // Of the harness that this is not.
    words.retain(|w| w != "--show-output" && w != "--nocapture");
    if let Some(why) = missing() {
        println!("skipped: {why}");
        return println!("test result: ok. 0 passed; 0 failed");
    }
    let right = power_cuts(words);
    println!("test power_cuts ... {}", if right { "ok" } else { "FAILED" });
    println!("test result: {}", if right { "ok. 1 passed; 0 failed" } else { "FAILED. 0 passed; 1 failed" });
    std::process::exit(i32::from(!right));
}
