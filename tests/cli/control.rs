//! The daemon under its command line: one per group, the control socket, signals.

use super::place::until;
use super::{Daemon, Ended, Place};
use nix::sys::signal::Signal;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::Mutex;

/// The answer to a line on the control socket.
fn raw(daemon: &Daemon, line: &[u8]) -> String {
    let mut stream = UnixStream::connect(&daemon.socket).unwrap();
    // It may answer and close before it has read all of a line that is too long.
    let _ = stream.write_all(line);
    let mut reply = String::new();
    let _ = BufReader::new(stream).read_line(&mut reply);
    reply
}

fn served(place: &Place) -> Daemon {
    place
        .run(&[
            "init",
            "g",
            "--node",
            "db1",
            "--listen",
            "none",
            "--journal-size",
            "8M",
            "--cache-size",
            "4M",
            "--volume",
            "d=disk:1M",
        ])
        .expect(0, &[]);
    Daemon::start(place)
}

#[test]
fn one_daemon_per_group() {
    let place = Place::new();
    let daemon = served(&place);
    place.run(&["serve", "g"]).expect(11, &["served already", &daemon.id().to_string()]);
}

#[test]
fn only_the_owner_gets_to_the_socket() {
    let place = Place::new();
    let daemon = served(&place);
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&daemon.socket), 0o600);
    assert_eq!(mode(daemon.socket.parent().unwrap()), 0o700);
}

#[test]
fn garbage_on_the_socket_is_refused() {
    let place = Place::new();
    let daemon = served(&place);
    assert!(raw(&daemon, b"hello\n").contains("not a request"));
    assert!(raw(&daemon, b"{\"version\":9,\"verb\":\"x\"}\n").contains("version 9"));
    assert!(raw(&daemon, &[b'x'; 1 << 20]).len() < 1024);
    let deep = [b"[".repeat(60_000), b"\n".to_vec()].concat();
    assert!(raw(&daemon, &deep).contains("not a request"));
    drop(UnixStream::connect(&daemon.socket).unwrap());
    assert!(raw(&daemon, b"\n").contains("not a request"));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let place = Place::new();
    let mut daemon = served(&place);
    daemon.signal(Signal::SIGTERM);
    // One signal may be enough if it is quick: then the second has nobody to go to.
    daemon.signal(Signal::SIGINT);
    let code = daemon.wait().code();
    assert!(matches!(code, Some(0 | 130)), "{code:?}");
}

#[test]
fn watching_tells_the_state_again_and_again_whatever_becomes_of_the_daemon() {
    let place = Place::new();
    let mut daemon = served(&place);
    let mut watch = place.command(&["status", "g", "--watch", "--json"]);
    let mut watch = watch.stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let seen = Mutex::new(Vec::<String>::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            lines.map_while(Result::ok).for_each(|line| {
                let status: serde_json::Value = serde_json::from_str(&line).expect("one document a line");
                seen.lock().unwrap().push(status["state"].as_str().unwrap().to_owned());
            })
        });
        let count = |state: &str| seen.lock().unwrap().iter().filter(|s| *s == state).count();
        until("it has told the state twice", || (count("UpToDate") >= 2).then_some(()));
        daemon.kill();
        until("it tells that the daemon is gone", || (count("Stopped") >= 1).then_some(()));
        watch.kill().unwrap();
        watch.wait().unwrap();
    });
}

#[test]
fn a_dead_daemon_is_told_from_its_files() {
    let place = Place::new();
    let mut daemon = served(&place);
    daemon.kill();
    let ended: Ended = place.run(&["status", "g"]);
    assert!(ended.expect(0, &[]).stdout.contains("Stopped"), "{}", ended.stdout);
    drop(daemon);
    // The socket that it left behind is in nobody's way.
    drop(Daemon::start(&place));
}
