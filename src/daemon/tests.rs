//! The loop with machines made up for the occasion, over real sockets and files.

use super::*;
use crate::daemon::handle::Handle;
use crate::disk::{DiskOp, DiskRequest, File, Token, aligned};
use crate::format::message::Message;
use crate::format::record::{Content, EncodeJob, room};
use crate::front::Submit;
use crate::front::knbd::Serve;
use crate::front::nbd::Export;
use crate::node::event::{AdminOp, LinkId, Op, Refusal};
use crate::sys::net::listen_tcp;
use crate::units::{Address, Extent, Lsn, MILLIS};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(20);

/// A machine that is one function; `None` is the start.
struct Script<F>(F);

impl<F: FnMut(Option<Event>, Now, &mut Actions)> Machine for Script<F> {
    fn start(&mut self, now: Now, actions: &mut Actions) {
        (self.0)(None, now, actions);
    }
    fn step(&mut self, now: Now, event: Event, actions: &mut Actions) {
        (self.0)(Some(event), now, actions);
    }
}

struct Running {
    handle: Handle,
    thread: Option<std::thread::JoinHandle<Result<(), Error>>>,
}

impl Running {
    fn end(mut self) -> Result<(), Error> {
        self.handle.stop();
        self.thread.take().unwrap().join().unwrap()
    }
}

#[derive(Default)]
struct Outside {
    files: Vec<(File, std::path::PathBuf)>,
    listen: bool,
    dial: Vec<Option<String>>,
}

fn start<F>(outside: Outside, script: F) -> Running
where
    F: FnMut(Option<Event>, Now, &mut Actions) + Send + 'static,
{
    let (tell, told) = bounded(1);
    let thread = std::thread::spawn(move || {
        let listener = outside.listen.then(|| listen_tcp("127.0.0.1:0".parse().unwrap()).unwrap());
        let address = listener.as_ref().map(|(_, a)| *a);
        let waker = Arc::new(Waker::new().unwrap());
        let (queue, commands) = unbounded();
        tell.send(Handle::new(queue, waker.clone(), address)).unwrap();
        let open = |(file, path): (File, std::path::PathBuf)| {
            (file, crate::sys::open::open(&path, true, Duration::ZERO).unwrap())
        };
        let disk = Disk::new(outside.files.into_iter().map(open));
        let links = Links::new(listener.map(|(fd, _)| fd), outside.dial);
        let stage = StageFiles::new("/nonexistent/journal".into(), Vec::new());
        let (machine, salvage) = (Script(script), SalvageFiles::new(std::path::PathBuf::new()));
        let history = HistoryFile::start("/nonexistent/history".into()).unwrap();
        Reactor::new(Parts { machine, disk, stage, salvage, history, links, workers: 1, waker, commands })?
            .run()
    });
    Running { handle: told.recv().unwrap(), thread: Some(thread) }
}

fn extent(offset: u64, len: u64) -> Extent {
    Extent::new(Address::new(0, offset).unwrap(), len).unwrap()
}

fn done(id: crate::node::event::AdminId) -> Action {
    Action::Answer { id, answer: Answer::Done(String::new()) }
}

fn ask(handle: &Handle, op: AdminOp) -> Receiver<Answer> {
    let (to, from) = bounded(1);
    handle.admin(
        op,
        Box::new(move |a| {
            let _ = to.send(a);
        }),
    );
    from
}

fn submit(handle: &Handle, op: Op) -> Receiver<Result<Bytes, IoError>> {
    let (to, from) = bounded(1);
    handle.submit(
        op,
        Box::new(move |r| {
            let _ = to.send(r);
        }),
    );
    from
}

/// A disk in memory, which answers at once but keeps what it is asked while `hold` says so.
fn memory_disk(size: usize) -> impl FnMut(Option<Event>, Now, &mut Actions) + Send {
    let mut bytes = vec![0; size];
    move |event, _, actions| {
        let Some(Event::Request { id, op }) = event else { return };
        let range = |e: Extent| e.start() as usize..e.end() as usize;
        let result = match op {
            Op::Read(e) => Ok(Bytes::copy_from_slice(&bytes[range(e)])),
            Op::Write { extent, data, .. } => {
                data.copy(&mut bytes[range(extent)]).unwrap();
                Ok(Bytes::new())
            }
            Op::Zero { extent, .. } => {
                bytes[range(extent)].fill(0);
                Ok(Bytes::new())
            }
            Op::Flush => Ok(Bytes::new()),
        };
        actions.push(Action::Complete { id, result });
    }
}

#[test]
fn requests_from_many_threads_are_answered_and_none_is_lost_at_the_end() {
    let running = start(Outside::default(), memory_disk(1 << 20));
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let handle = running.handle.clone();
            scope.spawn(move || {
                for n in 0..500u64 {
                    let at = extent(thread * 4096, 512);
                    let data = Bytes::from(vec![n as u8; 512]);
                    let write = Op::Write { extent: at, data: data.into(), fua: false };
                    assert_eq!(submit(&handle, write).recv_timeout(LONG).unwrap(), Ok(Bytes::new()));
                    let read = submit(&handle, Op::Read(at)).recv_timeout(LONG).unwrap().unwrap();
                    assert_eq!(read[511], n as u8);
                }
            });
        }
    });
    let handle = running.handle.clone();
    running.end().unwrap();
    assert_eq!(submit(&handle, Op::Flush).recv_timeout(LONG).unwrap(), Err(IoError::ESHUTDOWN));
    let answer = ask(&handle, AdminOp::Status).recv_timeout(LONG).unwrap();
    assert!(matches!(answer, Answer::Refused(Refusal::Failed, _)));
}

#[test]
fn what_is_unanswered_at_the_end_is_told_so_and_a_stop_ends_with_its_text() {
    let running = start(Outside::default(), |event, _, actions| {
        if let Some(Event::Admin { .. }) = event {
            actions.push(Action::Stop { text: "the journal is damaged".into() });
        }
    });
    let unanswered = submit(&running.handle, Op::Flush);
    let _ = ask(&running.handle, AdminOp::Drain);
    assert_eq!(unanswered.recv_timeout(LONG).unwrap(), Err(IoError::ESHUTDOWN));
    assert!(matches!(running.end(), Err(Error::Stopped(text)) if text == "the journal is damaged"));
}

#[test]
fn a_wake_comes_when_it_was_wished_and_not_before() {
    let mut asked = None;
    let running = start(Outside::default(), move |event, now, actions| match event {
        Some(Event::Admin { id, .. }) => {
            asked = Some((id, now.mono + 30 * MILLIS));
            actions.wake = Some(now.mono + 30 * MILLIS);
        }
        Some(Event::Wake) => {
            let (id, due) = asked.take().unwrap();
            assert!(now.mono >= due);
            actions.push(done(id));
        }
        _ => {}
    });
    for _ in 0..3 {
        ask(&running.handle, AdminOp::Drain).recv_timeout(LONG).unwrap();
    }
    running.end().unwrap();
}

#[test]
fn small_and_large_payloads_are_encoded_and_disk_requests_answered() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    std::fs::write(&path, [5; 8192]).unwrap();
    let mut waiting = None;
    let mut left = 3;
    let running = start(
        Outside { files: vec![(File::Journal, path)], ..Outside::default() },
        move |event, _, actions| {
            match event {
                Some(Event::Admin { id, .. }) => {
                    waiting = Some(id);
                    for (token, len) in [(1, 4096), (2, 1 << 20)] {
                        let mut buf = aligned(room(1) + len);
                        buf.resize(room(1) + len, 0);
                        let job = EncodeJob {
                            extents: vec![(extent(0, len as u64), Content::Data)],
                            buf,
                            level: Some(1),
                        };
                        actions.push(Action::Encode { token: Token(token), job });
                    }
                    let op = DiskOp::Read { offset: 4096, len: 4096 };
                    actions.push(Action::Disk(DiskRequest { token: Token(3), file: File::Journal, op }));
                }
                Some(Event::Encoded { .. }) => left -= 1,
                Some(Event::Disk { token: Token(3), result }) => {
                    assert_eq!(result.unwrap()[..], [5; 4096]);
                    left -= 1;
                }
                _ => {}
            }
            if left == 0
                && let Some(id) = waiting.take()
            {
                actions.push(done(id));
            }
        },
    );
    ask(&running.handle, AdminOp::Drain).recv_timeout(LONG).unwrap();
    running.end().unwrap();
}

/// What a link's end has seen, as text.
type Seen = Sender<String>;

fn note(seen: &Seen, event: &Event) {
    let text = match event {
        Event::LinkUp { dialed, .. } => format!("up {dialed:?}"),
        Event::LinkDown { .. } => "down".into(),
        Event::DialFailed { peer } => format!("failed {peer}"),
        Event::Message { message: Message::Durable { lsn }, .. } => format!("durable {lsn}"),
        Event::Message { .. } => "message".into(),
        _ => return,
    };
    seen.send(text).unwrap();
}

fn expect(seen: &Receiver<String>, expected: &[&str]) {
    for e in expected {
        assert_eq!(&seen.recv_timeout(LONG).unwrap(), e);
    }
}

/// Notes what it sees; on the start dials peer 0 if told to.
fn listener_end(seen: Seen) -> Running {
    start(Outside { listen: true, ..Outside::default() }, move |event, _, _| {
        if let Some(event) = event {
            note(&seen, &event);
        }
    })
}

#[test]
fn a_dialled_link_carries_messages_in_order_and_closes_after_the_last() {
    let (tell, seen) = unbounded();
    let acceptor = listener_end(tell);
    let port = acceptor.handle.link_address().unwrap().port();
    let (tell, seen_by_dialler) = unbounded();
    let dial = vec![Some("127.0.0.1:1".into()), None, Some(format!("localhost:{port}"))];
    let dialler = start(Outside { dial, ..Outside::default() }, move |event, _, actions| match event {
        None => (0..3).for_each(|peer| actions.push(Action::Dial { peer })),
        Some(event) => {
            note(&tell, &event);
            if let Event::LinkUp { link, .. } = event {
                for n in 0..1000 {
                    actions.push(Action::Send { link, message: Message::Durable { lsn: Lsn(n) } });
                }
                actions.push(Action::Close { link });
                actions.push(Action::Close { link: LinkId(link.0 + 1) });
            }
        }
    });
    expect(&seen, &["up None"]);
    for n in 0..1000 {
        expect(&seen, &[&format!("durable {n}")]);
    }
    expect(&seen, &["down"]);
    let mut all: Vec<String> = (0..4).map(|_| seen_by_dialler.recv_timeout(LONG).unwrap()).collect();
    assert!(all.iter().position(|s| s == "up Some(2)") < all.iter().position(|s| s == "down"));
    all.sort();
    assert_eq!(all, ["down", "failed 0", "failed 1", "up Some(2)"]);
    dialler.end().unwrap();
    acceptor.end().unwrap();
    assert!(seen.try_recv().is_err() && seen_by_dialler.try_recv().is_err());
}

#[test]
fn garbage_ends_its_own_link_only() {
    let (tell, seen) = unbounded();
    let running = listener_end(tell);
    let address = running.handle.link_address().unwrap();
    let mut good = TcpStream::connect(address).unwrap();
    expect(&seen, &["up None"]);
    let mut bad = TcpStream::connect(address).unwrap();
    expect(&seen, &["up None"]);
    // A valid message, and then a frame that claims 4 GiB.
    let mut frame = Message::Durable { lsn: Lsn(1) }.encode().head;
    frame.extend([0xFF; 64]);
    bad.write_all(&frame).unwrap();
    expect(&seen, &["durable 1", "down"]);
    assert_eq!(bad.read(&mut [0; 16]).unwrap_or(0), 0);
    let frame = Message::Durable { lsn: Lsn(2) }.encode().head;
    let (first, second) = frame.split_at(7);
    good.write_all(first).unwrap();
    good.write_all(second).unwrap();
    expect(&seen, &["durable 2"]);
    drop(good);
    expect(&seen, &["down"]);
    running.end().unwrap();
}

fn export(size: u64) -> Export {
    Export {
        name: "v".into(),
        volume: 0,
        size,
        min_block: 512,
        preferred_block: 4096,
        max_block: 32 << 20,
        read_only: false,
    }
}

/// A client that names its export the old way; enough for requests.
fn connect(path: &std::path::Path) -> UnixStream {
    let mut s = UnixStream::connect(path).unwrap();
    s.set_read_timeout(Some(LONG)).unwrap();
    let mut greeting = [0; 18];
    s.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    s.write_all(
        &[&3u32.to_be_bytes()[..], b"IHAVEOPT", &1u32.to_be_bytes(), &1u32.to_be_bytes(), b"v"].concat(),
    )
    .unwrap();
    s.read_exact(&mut [0; 10]).unwrap();
    s
}

fn request(kind: u16, handle: u64, offset: u64, len: u32) -> Vec<u8> {
    [
        &0x2560_9513u32.to_be_bytes()[..],
        &[0, 0],
        &kind.to_be_bytes(),
        &handle.to_be_bytes(),
        &offset.to_be_bytes(),
        &len.to_be_bytes(),
    ]
    .concat()
}

fn reply(s: &mut UnixStream) -> (u32, u64) {
    let mut b = [0; 16];
    s.read_exact(&mut b).unwrap();
    assert_eq!(b[..4], 0x6744_6698u32.to_be_bytes());
    (u32::from_be_bytes(b[4..8].try_into().unwrap()), u64::from_be_bytes(b[8..].try_into().unwrap()))
}

#[test]
fn an_nbd_client_writes_and_reads_in_any_size() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd");
    let running = start(Outside::default(), memory_disk(8 << 20));
    let id = running.handle.listen_nbd(UnixListener::bind(&path).unwrap(), vec![export(8 << 20)]);
    let mut client = connect(&path);
    for (n, len) in [512u32, 4096, 70_000 / 512 * 512, 1 << 20, 5 << 20].into_iter().enumerate() {
        let data: Vec<u8> = (0..len).map(|i| (i / 7) as u8 ^ n as u8).collect();
        client.write_all(&request(1, 10, 512, len)).unwrap();
        client.write_all(&data).unwrap();
        assert_eq!(reply(&mut client), (0, 10));
        client.write_all(&request(0, 11, 512, len)).unwrap();
        assert_eq!(reply(&mut client), (0, 11));
        let mut got = vec![0; len as usize];
        client.read_exact(&mut got).unwrap();
        assert!(got == data, "{len} bytes");
    }
    running.handle.close_nbd(id);
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    running.end().unwrap();
}

#[test]
fn a_client_that_vanishes_leaves_no_request_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd");
    let (tell, held) = unbounded();
    let mut waiting = Vec::new();
    let running = start(Outside::default(), move |event, _, actions| match event {
        Some(Event::Request { id, op: Op::Flush }) => {
            waiting.push(id);
            tell.send(()).unwrap();
        }
        Some(Event::Request { id, .. }) => actions.push(Action::Complete { id, result: Ok(Bytes::new()) }),
        Some(Event::Admin { id, .. }) => {
            for id in waiting.drain(..) {
                actions.push(Action::Complete { id, result: Ok(Bytes::new()) });
            }
            actions.push(done(id));
        }
        _ => {}
    });
    running.handle.listen_nbd(UnixListener::bind(&path).unwrap(), vec![export(1 << 20)]);
    let mut client = connect(&path);
    for n in 0..10 {
        client.write_all(&request(3, n, 0, 0)).unwrap();
        held.recv_timeout(LONG).unwrap();
    }
    drop(client);
    let mut second = connect(&path);
    second.write_all(&request(3, 77, 0, 0)).unwrap();
    held.recv_timeout(LONG).unwrap();
    ask(&running.handle, AdminOp::Drain).recv_timeout(LONG).unwrap();
    assert_eq!(reply(&mut second), (0, 77));
    running.end().unwrap();
}

#[test]
fn a_client_that_sends_without_reading_is_held_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd");
    let (tell, asked) = unbounded();
    let mut answer = memory_disk(1 << 20);
    let running = start(Outside::default(), move |event, now, actions| {
        if let Some(Event::Request { .. }) = event {
            tell.send(()).unwrap();
        }
        answer(event, now, actions);
    });
    running.handle.listen_nbd(UnixListener::bind(&path).unwrap(), vec![export(1 << 20)]);
    let mut client = connect(&path);
    let mut requests = client.try_clone().unwrap();
    // 1000 MiB of replies.
    let writer = std::thread::spawn(move || {
        for n in 0..1000 {
            requests.write_all(&request(0, n, 0, 1 << 20)).unwrap();
        }
    });
    let mut taken = 0;
    while asked.recv_timeout(Duration::from_millis(500)).is_ok() {
        taken += 1;
    }
    assert!((16..=22).contains(&taken), "{taken}");
    let mut data = vec![0; 1 << 20];
    for n in 0..1000 {
        assert_eq!(reply(&mut client), (0, n));
        client.read_exact(&mut data).unwrap();
    }
    writer.join().unwrap();
    running.end().unwrap();
}

/// A machine that answers nothing but writes until it is asked to drain, and tells of each other request.
fn holding(tell: Sender<()>) -> impl FnMut(Option<Event>, Now, &mut Actions) + Send {
    let mut waiting = Vec::new();
    move |event, _, actions| match event {
        Some(Event::Request { id, op: Op::Write { .. } }) => {
            actions.push(Action::Complete { id, result: Ok(Bytes::new()) });
        }
        Some(Event::Request { id, .. }) => {
            waiting.push(id);
            tell.send(()).unwrap();
        }
        Some(Event::Admin { id, .. }) => {
            for id in waiting.drain(..) {
                actions.push(Action::Complete { id, result: Ok(Bytes::new()) });
            }
            actions.push(done(id));
        }
        _ => {}
    }
}

/// Serves the far end of a socket pair as the kernel's driver is served, without negotiation.
fn served(handle: &Handle) -> (UnixStream, u64) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(LONG)).unwrap();
    let id = handle.serve(ours.into(), export(1 << 20));
    (theirs, id)
}

#[test]
fn a_connection_is_finished_when_all_that_came_is_answered() {
    let (tell, held) = unbounded();
    let running = start(Outside::default(), holding(tell));
    let (mut client, id) = served(&running.handle);
    let (over, ended) = bounded::<()>(0);
    client.write_all(&request(3, 1, 0, 0)).unwrap();
    held.recv_timeout(LONG).unwrap();
    running.handle.finish(id, LONG, Box::new(move || drop(over)));
    // As long as the node has not answered, requests are taken on.
    client.write_all(&request(3, 2, 0, 0)).unwrap();
    held.recv_timeout(LONG).unwrap();
    client.write_all(&request(1, 3, 0, 512)).unwrap();
    client.write_all(&[7; 512]).unwrap();
    ask(&running.handle, AdminOp::Drain).recv_timeout(LONG).unwrap();
    let mut answered = [(); 3].map(|()| reply(&mut client));
    answered.sort();
    assert_eq!(answered, [(0, 1), (0, 2), (0, 3)]);
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(client.write(&[0]).unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    assert!(ended.recv_timeout(LONG).unwrap_err().is_disconnected());
    running.end().unwrap();
}

#[test]
fn a_request_that_is_not_answered_does_not_hold_up_the_end() {
    let (tell, held) = unbounded();
    let running = start(Outside::default(), holding(tell));
    let (mut client, id) = served(&running.handle);
    let (over, ended) = bounded::<()>(0);
    client.write_all(&request(3, 1, 0, 0)).unwrap();
    held.recv_timeout(LONG).unwrap();
    client.write_all(&request(1, 2, 0, 512)).unwrap();
    client.write_all(&[7; 512]).unwrap();
    assert_eq!(reply(&mut client), (0, 2));
    running.handle.finish(id, Duration::from_millis(50), Box::new(move || drop(over)));
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    assert!(ended.recv_timeout(LONG).unwrap_err().is_disconnected());
    // The node's late answer is heard by nobody.
    ask(&running.handle, AdminOp::Drain).recv_timeout(LONG).unwrap();
    running.end().unwrap();
}
