//! The NBD session against independent clients: libnbd's tools, QEMU's, nbdkit and fio.
//!
//! A blocking server over memory stands in for the daemon's shell; the protocol is the real one. A
//! client that is not installed is skipped, and the test says so.

use bytes::Bytes;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;
use volrep::disk::IoError;
use volrep::front::nbd::{Export, Session};
use volrep::node::event::Op;
use volrep::units::Extent;

const SIZE: usize = 64 << 20;

type Disk = Arc<Mutex<Vec<u8>>>;

/// A served disk; the threads end with the process.
struct Server {
    disk: Disk,
    dir: TempDir,
}

impl Server {
    fn start(size: usize, min_block: u32) -> Server {
        let server = Server { disk: Arc::new(Mutex::new(vec![0; size])), dir: tempfile::tempdir().unwrap() };
        let listener = UnixListener::bind(server.path("socket")).unwrap();
        let export = |name: &str| Export {
            name: name.into(),
            volume: 7,
            size: size as u64,
            min_block,
            preferred_block: 4096,
            max_block: 32 << 20,
            read_only: false,
        };
        let exports: Arc<[Export]> = Arc::new([export("data"), export("again")]);
        let disk = server.disk.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (exports, disk) = (exports.clone(), disk.clone());
                std::thread::spawn(move || serve(stream.unwrap(), Session::new(exports), &disk));
            }
        });
        server
    }
    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().into()
    }
    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.path("socket"))
    }
    fn file(&self, name: &str, contents: &[u8]) -> String {
        std::fs::write(self.path(name), contents).unwrap();
        self.path(name)
    }
}

/// Serves one connection. Requests that came together are completed last to first, so that every
/// client sees replies out of order.
fn serve(mut stream: UnixStream, mut session: Session, disk: &Disk) {
    let mut requests = Vec::new();
    loop {
        for bytes in session.output() {
            if stream.write_all(&bytes).is_err() {
                return;
            }
        }
        if session.closing() {
            return;
        }
        let mut buffer = vec![0; session.needed().max(64 << 10)];
        let received = match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(n) => n,
        };
        buffer.truncate(received);
        if let Err(error) = session.receive(buffer.into(), &mut requests) {
            eprintln!("server closes: {error}");
        }
        while let Some(request) = requests.pop() {
            session.complete(request.cookie, perform(request.op, &mut disk.lock().unwrap()));
        }
    }
}

fn perform(op: Op, disk: &mut [u8]) -> Result<Bytes, IoError> {
    match op {
        Op::Read(extent) => return Ok(Bytes::copy_from_slice(&disk[range(extent)])),
        Op::Write { extent, data, .. } => data.copy(&mut disk[range(extent)])?,
        Op::Zero { extent, .. } => disk[range(extent)].fill(0),
        Op::Flush => {}
    }
    Ok(Bytes::new())
}

fn range(extent: Extent) -> Range<usize> {
    assert_eq!(extent.address().volume(), 7);
    let start = extent.address().offset() as usize;
    start..start + extent.len() as usize
}

/// Runs a client. `None`, and a word about it, when it is not installed.
fn run(program: &str, args: &[&str]) -> Option<Output> {
    let Some(path) = ["/usr/bin", "/usr/sbin", "/usr/local/bin"]
        .iter()
        .map(|dir| format!("{dir}/{program}"))
        .find(|path| Path::new(path).exists())
    else {
        eprintln!("skipped: {program} is not installed");
        return None;
    };
    // The distribution's python holds libnbd's bindings; another one may come first in PATH.
    let search = format!("/usr/bin:/bin:{}", std::env::var("PATH").unwrap_or_default());
    // A client that waits for a reply that never comes must not wait for ever.
    Some(Command::new("timeout").args(["120", &path]).args(args).env("PATH", search).output().unwrap())
}

/// As `run`; the client must succeed. Its standard output.
fn client(program: &str, args: &[&str]) -> Option<String> {
    let output = run(program, args)?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {}\n{out}\n{err}", output.status);
    Some(out.into_owned())
}

/// Reproducible bytes that do not compress, with stretches of zeroes among them.
fn pattern(len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    let mut hasher = blake3::Hasher::new().finalize_xof();
    for piece in data.chunks_mut(96 << 10) {
        let full = piece.len() * 2 / 3;
        hasher.fill(&mut piece[..full]);
    }
    data
}

#[test]
fn nbdinfo_sees_what_the_server_offers() {
    let server = Server::start(SIZE, 512);
    let Some(info) = client("nbdinfo", &[&server.uri()]) else { return };
    for line in [
        "protocol: newstyle-fixed without TLS, using structured packets",
        "export-size: 67108864 (64M)",
        "base:allocation",
        "is_rotational: false",
        "is_read_only: false",
        "can_cache: false",
        "can_df: true",
        "can_fast_zero: true",
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_minimum: 512",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
    ] {
        assert!(info.contains(line), "no {line:?} in\n{info}");
    }
    let list = client("nbdinfo", &["--list", "--json", &server.uri()]).unwrap();
    assert!(
        list.contains("\"export-name\": \"data\"") && list.contains("\"export-name\": \"again\""),
        "{list}"
    );
    let map = client("nbdinfo", &["--map", &server.uri()]).unwrap();
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "67108864", "0", "data"]);
    let unknown = run("nbdinfo", &[&server.uri().replace("///", "///nothing")]).unwrap();
    assert!(!unknown.status.success());
}

#[test]
fn nbdcopy_there_and_back() {
    let server = Server::start(SIZE, 512);
    let data = pattern(SIZE);
    let (from, to) = (server.file("from", &data), server.path("to"));
    if client("nbdcopy", &["--flush", &from, &server.uri()]).is_none() {
        return;
    }
    assert!(*server.disk.lock().unwrap() == data);
    client("nbdcopy", &["--connections=4", "--requests=64", &server.uri(), &to]);
    assert!(std::fs::read(&to).unwrap() == data);
    let other = Server::start(SIZE, 512);
    client("nbdcopy", &["--request-size=33554432", "--synchronous", &server.uri(), &other.uri()]);
    assert!(*other.disk.lock().unwrap() == data);
}

#[test]
fn nbdsh_provokes_every_error_and_the_session_goes_on() {
    let server = Server::start(SIZE, 512);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/nbd_session.py");
    let socket = server.path("socket");
    client("nbdsh", &["-c", &format!("exec(open('{script}').read()); everything('{socket}')")]);
}

#[test]
fn qemu_converts_compares_and_checks_patterns() {
    let server = Server::start(SIZE, 512);
    let data = pattern(SIZE);
    let from = server.file("from", &data);
    let convert = ["convert", "-n", "-p", "-f", "raw", "-O", "raw", "-W", "-m", "8", &from, &server.uri()];
    if client("qemu-img", &convert).is_none() {
        return;
    }
    assert!(*server.disk.lock().unwrap() == data);
    client("qemu-img", &["compare", "-f", "raw", "-F", "raw", &from, &server.uri()]);
    let back = server.path("back");
    client("qemu-img", &["convert", "-f", "raw", "-O", "raw", &server.uri(), &back]);
    assert!(std::fs::read(&back).unwrap() == data);

    let commands = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 4k 512",
        "write -P 0x33 1536 1000",
        "write -z 64k 64k",
        "write -z -u 256k 4k",
        "write -z -n 512k 4k",
        "discard 128k 64k",
        "write -P 0x44 32M 32M",
        "flush",
        "read -P 0x11 0 1536",
        "read -P 0x33 1536 1000",
        "read -P 0x22 4k 512",
        "read -P 0x11 4608 60928",
        "read -P 0 64k 128k",
        "read -P 0 256k 4k",
        "read -P 0 512k 4k",
        "read -P 0x44 32M 32M",
        "aio_write -P 0x55 2M 64k",
        "aio_write -P 0x66 3M 64k",
        "aio_flush",
        "read -P 0x55 2M 64k",
    ];
    let mut args = vec!["-f", "raw"];
    commands.iter().for_each(|c| args.extend(["-c", c]));
    let uri = server.uri();
    args.push(&uri);
    let out = client("qemu-io", &args).unwrap();
    assert!(!out.contains("failed"), "{out}");
}

#[test]
fn qemu_keeps_to_a_smallest_block_of_4096() {
    let server = Server::start(SIZE, 4096);
    let uri = server.uri();
    let args = ["-f", "raw", "-c", "write -P 1 0 64k", "-c", "write -P 2 512 512", "-c", "read -P 1 0 512"];
    let Some(out) = client("qemu-io", &[&args[..], &["-c", "read -P 2 512 512", &uri]].concat()) else {
        return;
    };
    assert!(!out.contains("failed"), "{out}");
    let disk = server.disk.lock().unwrap();
    assert!(
        disk[..512] == [1; 512] && disk[512..1024] == [2; 512] && disk[1024..65536].iter().all(|&b| b == 1)
    );
}

#[test]
fn nbdkit_is_a_client_too() {
    let server = Server::start(SIZE, 512);
    let data = pattern(SIZE);
    let from = server.file("from", &data);
    *server.disk.lock().unwrap() = data;
    // Whatever is written through this filter must already be on the disk below it.
    let socket = format!("socket={}", server.path("socket"));
    let copy = format!("nbdcopy {from} \"$uri\"");
    client("nbdkit", &["-U", "-", "--filter=checkwrite", "nbd", &socket, "--run", &copy]);
}

#[test]
fn fio_verifies_what_it_wrote() {
    let server = Server::start(SIZE, 512);
    let uri = format!("--uri={}", server.uri());
    let job = "--name=verify --ioengine=nbd --rw=randwrite --bsrange=512-1048576 --bs_unaligned=0 --blockalign=512 \
               --iodepth=32 --size=64M --io_size=256M --fsync=64 --verify=crc32c --do_verify=1 --verify_fatal=1 \
               --verify_state_save=0";
    let args: Vec<&str> = job.split_whitespace().chain([&*uri]).collect();
    client("fio", &args);
}
