//! The ring against files and socket pairs.

use super::*;
use crate::disk::{aligned, freeze};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

fn finish<T>(ring: &mut Ring<T>) -> Vec<Completion<T>> {
    let mut out = Vec::new();
    while ring.in_flight() > 0 {
        ring.turn(None).unwrap();
        ring.reap(&mut out);
    }
    out
}

fn fd(file: impl Into<OwnedFd>) -> Fd {
    Rc::new(file.into())
}

#[test]
fn many_more_operations_than_entries_all_complete() {
    let mut file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..1000u32).flat_map(|i| [i as u8; 512]).collect();
    file.write_all(&bytes).unwrap();
    let fd = fd(file);
    let mut ring = Ring::new(4).unwrap();
    for i in 0..1000u64 {
        ring.submit(Operation::Read { fd: fd.clone(), offset: i * 512, len: 512, buf: aligned(512) }, i);
    }
    let done = finish(&mut ring);
    assert_eq!(done.len(), 1000);
    for c in done {
        let Operation::Read { buf, .. } = c.operation else { panic!() };
        assert_eq!((c.result, buf[0], buf[511]), (Ok(512), c.tag as u8, c.tag as u8));
    }
}

#[test]
fn a_read_past_the_end_says_how_much_there_was() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[1; 700]).unwrap();
    let mut ring = Ring::new(4).unwrap();
    ring.submit(Operation::Read { fd: fd(file), offset: 0, len: 4096, buf: aligned(4096) }, ());
    let done = finish(&mut ring).pop().unwrap();
    let Operation::Read { buf, .. } = done.operation else { panic!() };
    assert_eq!((done.result, buf.len()), (Ok(700), 700));
}

#[test]
fn a_send_of_many_pieces_arrives_whole_and_in_order() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let pieces: Vec<Bytes> = (0..3000u32).map(|i| Bytes::from(vec![i as u8; 1 + i as usize % 700])).collect();
    let expected: Vec<u8> = pieces.iter().flatten().copied().collect();
    let total = expected.len();
    let reader = std::thread::spawn(move || {
        let mut got = vec![0; total];
        theirs.read_exact(&mut got).unwrap();
        got
    });
    let mut ring = Ring::new(4).unwrap();
    let ours = fd(ours);
    ring.submit(Operation::Send { fd: ours.clone(), pieces }, 1);
    assert_eq!(finish(&mut ring).pop().unwrap().result, Ok(total));
    assert_eq!(reader.join().unwrap(), expected);
    // The other end is gone: an error, not a signal.
    ring.submit(Operation::Send { fd: ours, pieces: vec![freeze(aligned(0)), Bytes::from_static(b"x")] }, 2);
    assert_eq!(finish(&mut ring).pop().unwrap().result, Err(libc::EPIPE));
}

#[test]
fn an_exact_receive_takes_what_was_asked_for_and_no_more() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut ring = Ring::new(4).unwrap();
    let buf = BytesMut::with_capacity(64);
    ring.submit(Operation::Receive { fd: fd(ours), buf, exactly: Some(10) }, ());
    ring.turn(Some(0)).unwrap();
    for part in [&b"0123"[..], b"456", b"789abc"] {
        theirs.write_all(part).unwrap();
    }
    let done = finish(&mut ring).pop().unwrap();
    let Operation::Receive { buf, .. } = done.operation else { panic!() };
    assert_eq!((done.result, &buf[..]), (Ok(10), &b"0123456789"[..]));
}

#[test]
fn dropping_the_ring_ends_what_would_wait_for_ever() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = fd(ours);
    let mut ring = Ring::new(4).unwrap();
    for _ in 0..20 {
        let buf = BytesMut::with_capacity(4096);
        ring.submit(Operation::Receive { fd: ours.clone(), buf, exactly: None }, ());
    }
    ring.submit(Operation::Accept { fd: fd(listener), accepted: None }, ());
    ring.turn(Some(0)).unwrap();
    drop(ring);
    // Nobody but us holds the socket now.
    assert_eq!(Rc::strong_count(&ours), 1);
    drop(theirs);
}

#[test]
fn a_cancelled_operation_completes_and_a_turn_ends_in_time() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut ring = Ring::new(4).unwrap();
    let buf = BytesMut::with_capacity(16);
    let key = ring.submit(Operation::Receive { fd: fd(ours), buf, exactly: None }, ());
    let began = std::time::Instant::now();
    ring.turn(Some(20_000_000)).unwrap();
    assert!(began.elapsed() >= std::time::Duration::from_millis(19));
    ring.cancel(key);
    assert_eq!(finish(&mut ring).pop().unwrap().result, Err(libc::ECANCELED));
}

#[test]
fn a_plain_ring_as_on_older_kernels_does_the_same() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut ring = Ring::over(IoUring::new(4).unwrap()).unwrap();
    let buf = BytesMut::with_capacity(16);
    ring.submit(Operation::Receive { fd: fd(ours), buf, exactly: Some(2) }, ());
    ring.turn(Some(1_000_000)).unwrap();
    theirs.write_all(b"ab").unwrap();
    assert_eq!(finish(&mut ring).pop().unwrap().result, Ok(2));
}
