//! Bad input: damaged files, full disks, strangers on the sockets. Each is told clearly, nothing is
//! lost, and memory stays bounded.

use crate::model::{Model, Promise};
use crate::nbd::Client;
use crate::pair::{Node, Pair, Setup, free_port};
use crate::place::{Ended, until};
use nix::mount::{MsFlags, mount};
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use volrep::format::message::{FRAME, Message, Standing};

const MIB: u64 = 1 << 20;

fn setup() -> Setup {
    Setup { volumes: vec![("data", 16 * MIB)], journal: "32M", ..Setup::default() }
}

/// A node that refuses to start; what it said.
#[track_caller]
fn refused(node: &Node) -> Ended {
    let mut child = node.place.command(&["serve", "g"]);
    let mut child =
        child.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let ended = Ended::of(child.wait_with_output().unwrap());
    assert!(ended.code > 0, "it went on, or did not end: {}", ended.stderr);
    ended
}

/// Changes one bit.
fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

/// Some load, then a kill: what is on disk is in use and not closed.
fn loaded(pair: &mut Pair) -> Model {
    pair.primary.attach("nbd-socket");
    let mut model = Model::new(16 * MIB, Promise::Reply, 11);
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    model.load(&mut client, 8, Instant::now() + Duration::from_millis(300)).unwrap();
    pair.primary.kill();
    model
}

/// Nothing of it was lost.
fn all_there(pair: &mut Pair, model: &mut Model) {
    pair.primary.start();
    pair.primary.wait_attached();
    model.check(&mut Client::connect(&pair.primary.socket(), "data").unwrap(), "after the repair");
    pair.wait_following();
    pair.finish();
}

#[test]
fn a_damaged_superblock_slot_is_survived_and_two_are_refused() {
    let mut pair = Pair::start(&setup());
    let mut model = loaded(&mut pair);
    let path = pair.primary.place.config().join("state/g/superblock");
    let good = std::fs::read(&path).unwrap();
    flip(&path, 300);
    flip(&path, (64 << 10) + 300);
    refused(&pair.primary).expect(1, &["superblock", "damaged", "go on with another node"]);
    std::fs::write(&path, &good).unwrap();
    for slot in [0, 64 << 10] {
        flip(&path, slot + 300);
        pair.primary.start();
        pair.primary.wait_attached();
        let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
        model.check(&mut client, "with one slot");
        // A start writes both slots, so the second round begins with two good ones, too.
        model.load(&mut client, 4, Instant::now() + Duration::from_millis(100)).unwrap();
        drop(client);
        pair.primary.kill();
    }
    all_there(&mut pair, &mut model);
}

#[test]
fn a_damaged_journal_is_refused_with_nothing_changed() {
    // Never half full: that, too, would begin a checkpoint.
    let mut pair = Pair::prepare(&Setup { journal: "256M", ..setup() });
    for node in [&pair.primary, &pair.shadow] {
        // Payloads as they are, so that the test finds them; everything since the start is needed.
        node.configure(|t| {
            t.replace("compression = 1", "compression = 0")
                .replace("#checkpoint_after = \"5s\"", "checkpoint_after = \"1h\"")
        });
        assert!(
            std::fs::read_to_string(node.place.config().join("g.toml"))
                .unwrap()
                .contains("\ncheckpoint_after")
        );
    }
    pair.primary.start();
    pair.shadow.start();
    pair.wait_following();
    pair.primary.attach("nbd-socket");
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    let needle = [0xA7; 4096];
    client.write(8192, &needle).unwrap();
    client.flush().unwrap();
    let mut model = Model::new(16 * MIB, Promise::Reply, 12);
    model.load(&mut client, 4, Instant::now() + Duration::from_millis(200)).unwrap();
    client.write(8192, &[0; 4096]).unwrap();
    client.flush().unwrap();
    let tail = pair.primary.status()["tail_lsn"].as_u64().unwrap();
    until("it is on the shadow", || {
        (pair.shadow.status()["applied_lsn"].as_u64() >= Some(tail)).then_some(())
    });
    pair.primary.kill();
    pair.shadow.kill();
    let spot = |node: &Node| {
        let journal = node.place.config().join("state/g/journal");
        let bytes = std::fs::read(&journal).unwrap();
        let at =
            bytes.windows(needle.len()).position(|w| w == needle).expect("the payload is in the journal");
        (journal, bytes, at as u64 + 100)
    };
    for node in [&pair.primary, &pair.shadow] {
        let (journal, bytes, _) = spot(node);
        let whole = OpenOptions::new().write(true).open(&journal).unwrap();
        whole.set_len(bytes.len() as u64 - 4096).unwrap();
        refused(node).expect(1, &["journal", "must have", "restore the file"]);
        std::fs::write(&journal, &bytes).unwrap();
    }
    let (journal, bytes, at) = spot(&pair.primary);
    flip(&journal, at);
    let before = std::fs::read(&journal).unwrap();
    let backing = std::fs::read(pair.primary.backing("data")).unwrap();
    refused(&pair.primary).expect(1, &["journal", "durable"]);
    assert!(std::fs::read(&journal).unwrap() == before, "the damaged journal was changed");
    assert!(std::fs::read(pair.primary.backing("data")).unwrap() == backing, "the backing was changed");
    std::fs::write(&journal, &bytes).unwrap();
    // A shadow knows what it acknowledged from its superblock: less than that is damage too.
    let (journal, bytes, at) = spot(&pair.shadow);
    flip(&journal, at);
    let before = std::fs::read(&journal).unwrap();
    refused(&pair.shadow).expect(1, &["journal", "durable", "join"]);
    assert!(std::fs::read(&journal).unwrap() == before, "the damaged journal was changed");
    std::fs::write(&journal, &bytes).unwrap();
    pair.shadow.start();
    pair.primary.start();
    pair.primary.wait_attached();
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    assert!(client.read(8192, 4096).unwrap() == [0; 4096]);
    drop(client);
    pair.wait_following();
    pair.finish();
}

#[test]
fn a_backing_that_does_not_fit_is_refused() {
    let mut pair = Pair::start(&setup());
    pair.shadow.stop();
    let path = pair.shadow.backing("data");
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(16 * MIB - 4096).unwrap();
    refused(&pair.shadow).expect(1, &["data", "16773120", "16777216", "enlarge"]);
    file.set_len(16 * MIB).unwrap();

    // The primary's own file, under its own name and another one.
    let theirs = pair.primary.backing("data");
    let link = pair.shadow.place.path().join("link");
    std::fs::hard_link(&theirs, &link).unwrap();
    let mine = path.to_str().unwrap().to_owned();
    for other in [&theirs, &link] {
        pair.shadow.configure(|t| t.replace(&mine, other.to_str().unwrap()));
        let ended = refused(&pair.shadow);
        ended.expect(ended.code, &["in use by another process"]);
        assert!(matches!(ended.code, 1 | 11), "{}", ended.code);
        pair.shadow.configure(|t| t.replace(other.to_str().unwrap(), &mine));
    }
    pair.shadow.configure(|t| format!("on_ful = \"block\"\n{t}"));
    refused(&pair.shadow).expect(1, &["unknown field `on_ful`", "did you mean `on_full`?", "line 1"]);
    pair.shadow.configure(|t| t.lines().skip(1).map(|l| format!("{l}\n")).collect());
    pair.shadow.start();
    pair.wait_following();
    pair.finish();
}

#[test]
fn a_full_disk_under_the_backing_latches_and_is_recovered() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: a small tmpfs can only be mounted by root");
        return;
    }
    let mut pair = Pair::prepare(&Setup { volumes: vec![("data", 32 * MIB)], ..Setup::default() });
    // The same sparse file, on a file system that is smaller than the volume.
    let small = pair.primary.place.path().join("small");
    std::fs::create_dir(&small).unwrap();
    mount(Some("volrep-test"), &small, Some("tmpfs"), MsFlags::empty(), Some("size=8m")).unwrap();
    let backing = pair.primary.backing("data");
    let moved = small.join("data");
    std::fs::File::create(&moved).unwrap().set_len(32 * MIB).unwrap();
    std::fs::remove_file(&backing).unwrap();
    pair.primary.configure(|t| {
        t.replace(backing.to_str().unwrap(), moved.to_str().unwrap())
            .replace("direct = true", "direct = false")
    });
    pair.primary.start();
    pair.shadow.start();
    pair.wait_following();
    pair.primary.attach("nbd-socket");
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    let piece = |n: u64| vec![n as u8 + 1; MIB as usize];
    // More than the disk holds; each is acknowledged, or fails for good.
    let mut acknowledged = 0;
    let error = loop {
        let n = acknowledged % 32;
        match client.write(n * MIB, &piece(n)).and_then(|()| client.flush()) {
            Ok(()) => acknowledged += 1,
            Err(e) => break e,
        }
        assert!(acknowledged < 100_000, "the disk never filled up");
    };
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
    let s = pair.primary.status();
    assert_eq!(s["state"], "Failed", "{s}");
    let reason = s["reason"].as_str().unwrap();
    assert!(
        reason.contains("backing") && reason.contains("No space left") && reason.contains("restart"),
        "{reason}"
    );
    assert!(client.write(0, &[1; 512]).is_err() && client.flush().is_err(), "it did not latch");
    eprintln!("{acknowledged} MiB acknowledged before: {reason}");
    drop(client);
    pair.primary.kill();
    // Enlarged, everything acknowledged is there.
    mount(None::<&str>, &small, None::<&str>, MsFlags::MS_REMOUNT, Some("size=64m")).unwrap();
    pair.primary.start();
    pair.primary.wait_attached();
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    for n in 0..acknowledged.min(32) {
        assert!(client.read(n * MIB, MIB as usize).unwrap() == piece(n), "piece {n}");
    }
    drop(client);
    pair.wait_following();
    pair.drain();
    pair.primary.stop();
    pair.shadow.stop();
    assert_eq!(crate::place::first_difference(&moved, &pair.shadow.backing("data")), None);
}

/// Sends these bytes to a port and reads until the other side closes or says no more.
fn stranger(port: u16, bytes: &[u8]) {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return };
    stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    // It may close before it has read everything.
    let _ = stream.write_all(bytes);
    let mut answer = [0; 4096];
    while matches!(stream.read(&mut answer), Ok(n) if n > 0) {}
}

#[test]
fn strangers_on_the_sockets_do_no_harm() {
    let mut pair = Pair::prepare(&setup());
    let port = free_port();
    for node in [&pair.primary, &pair.shadow] {
        node.configure(|t| {
            let old = t.split("127.0.0.1:").nth(1).unwrap()[..5].to_owned();
            t.replace(&format!("127.0.0.1:{old}"), &format!("127.0.0.1:{port}"))
        });
    }
    pair.primary.start();
    pair.shadow.start();
    pair.wait_following();
    pair.primary.attach("nbd-socket");
    let mut model = Model::new(16 * MIB, Promise::Reply, 13);
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    let mut load = |ms: u64| model.load(&mut client, 8, Instant::now() + Duration::from_millis(ms)).unwrap();
    load(300);
    let before = pair.primary.daemon().resident();
    let frame = |m: Message| m.encode().head.to_vec();
    let good = frame(Message::Heartbeat {
        wall: 1,
        echo: 0,
        tail: Some(volrep::units::Lsn(1)),
        time: 1,
        bytes: 1,
        silent: 0,
        live: true,
        feeds: vec![],
        standing: Standing::None,
    });
    let mut huge = good[..FRAME].to_vec();
    huge[..4].fill(0xFF);
    let mut noise = vec![0; 1 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    let half = good[..good.len() - 1].to_vec();
    let streams = [noise.clone(), good, huge, half, vec![0; 1 << 20], b"GET / HTTP/1.1\r\n\r\n".to_vec()];
    let noise = &noise;
    std::thread::scope(|scope| {
        for bytes in &streams {
            scope.spawn(move || (0..6).for_each(|_| stranger(port, bytes)));
        }
        // More connections at once than it accepts, all silent.
        scope.spawn(move || {
            let held: Vec<_> =
                (0..200).filter_map(|_| TcpStream::connect(("127.0.0.1", port)).ok()).collect();
            std::thread::sleep(Duration::from_millis(500));
            drop(held);
        });
        let socket = pair.primary.socket();
        scope.spawn(move || {
            for bytes in
                [&noise[..], b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xFF\xFF\xFF\xFF", b"IHAVEOPT", &[0; 4096]]
            {
                let mut stream = UnixStream::connect(&socket).unwrap();
                stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
                let _ = stream.write_all(bytes);
                let mut answer = [0; 4096];
                while matches!(stream.read(&mut answer), Ok(n) if n > 0) {}
            }
            // A client that is let in and then talks nonsense.
            let mut client = Client::connect(&socket, "data").unwrap();
            let _ = client.send(99, 0xFFFF, u64::MAX, usize::MAX >> 32, &[]);
            let _ = client.reply();
        });
        load(1000);
    });
    let after = pair.primary.daemon().resident();
    eprintln!("resident: {} KiB before, {} KiB after", before >> 10, after >> 10);
    assert!(after < before + 32 * MIB, "memory grew from {before} to {after}");
    load(100);
    model.check(&mut client, "after the strangers");
    drop(client);
    pair.wait_following();
    pair.finish();
}
