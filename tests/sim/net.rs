//! The network model: connections that carry frames in order, late, damaged, or not at all.
//!
//! Owns: every connection and what is under way on it. Invariant: without an injected fault each
//! direction delivers exactly what was sent, in order; a cut loses a suffix of each direction.

use crate::prng::Prng;
use bytes::{Bytes, BytesMut};
use std::collections::{BTreeMap, VecDeque};
use volrep::format::message::{FRAME, FrameHeader, Message};
use volrep::node::event::LinkId;

/// One end of a connection.
pub struct End {
    /// Whose.
    pub node: usize,
    /// Its name for the connection.
    pub link: LinkId,
    /// The dialled peer's index there.
    pub dialed: Option<usize>,
    /// It was told of the connection.
    pub up: bool,
    /// It was told that the connection is gone, or is itself gone.
    pub down: bool,
    /// It has given the connection up: what still arrives is not read.
    pub closed: bool,
    /// Frames on their way to it.
    inbound: VecDeque<Bytes>,
    /// Nothing arrives before this.
    not_before: u64,
    /// Frames that may still arrive; the rest is lost.
    allowance: Option<usize>,
}

/// A connection.
pub struct Connection {
    /// The dialler's end, the acceptor's end.
    pub ends: [End; 2],
    /// Bytes per millisecond.
    rate: u64,
    latency: u64,
}

/// All connections.
#[derive(Default)]
pub struct Network {
    /// By number.
    pub connections: BTreeMap<u64, Connection>,
    by_link: BTreeMap<u64, (u64, usize)>,
    next_link: u64,
    next: u64,
    /// Pairs of nodes that cannot reach each other, and until when.
    pub partitions: BTreeMap<(usize, usize), u64>,
}

impl Network {
    /// A connection between a dialler and an acceptor.
    pub fn open(&mut self, from: usize, peer: usize, to: usize, rng: &mut Prng) -> u64 {
        self.next += 1;
        let mut end = |side: usize, node: usize, dialed| {
            self.next_link += 1;
            self.by_link.insert(self.next_link, (self.next, side));
            End {
                node,
                link: LinkId(self.next_link),
                dialed,
                up: false,
                down: false,
                closed: false,
                inbound: VecDeque::new(),
                not_before: 0,
                allowance: None,
            }
        };
        let ends = [end(0, from, Some(peer)), end(1, to, None)];
        let rate = rng.log(2_000, 2_000_000);
        let latency = rng.log(5_000, 5_000_000);
        self.connections.insert(self.next, Connection { ends, rate, latency });
        self.next
    }
    /// Connection and side of a link.
    pub fn find(&self, link: LinkId) -> Option<(u64, usize)> {
        self.by_link.get(&link.0).copied()
    }
    /// Until when there is no traffic between them, if there is none now.
    pub fn parted(&self, a: usize, b: usize) -> Option<u64> {
        self.partitions.get(&(a.min(b), a.max(b))).copied()
    }
    /// Connections with an end at the node that still thinks it is up.
    pub fn of_node(&self, node: usize) -> Vec<u64> {
        let touches = |c: &Connection| c.ends.iter().any(|e| e.node == node && !e.down);
        self.connections.iter().filter(|(_, c)| touches(c)).map(|(id, _)| *id).collect()
    }
    /// Connections with both ends up.
    pub fn standing(&self) -> Vec<u64> {
        let both = |c: &Connection| c.ends.iter().all(|e| e.up && !e.down);
        self.connections.iter().filter(|(_, c)| both(c)).map(|(id, _)| *id).collect()
    }
}

impl Connection {
    /// When the end may be told that the connection stands.
    pub fn up_time(&mut self, side: usize, now: u64, rng: &mut Prng) -> u64 {
        let at = now + self.latency / 2 + rng.below(self.latency + 1);
        self.ends[side].not_before = at;
        at
    }
    /// Puts a frame under way to `side`; when it arrives.
    pub fn send(&mut self, side: usize, now: u64, frame: Bytes, rng: &mut Prng) -> u64 {
        let end = &mut self.ends[side];
        let transfer = frame.len() as u64 * 1_000_000 / self.rate;
        let jitter =
            if rng.permille(20) { rng.below(10 * self.latency) } else { rng.below(self.latency / 4 + 1) };
        end.not_before = (now + self.latency + jitter).max(end.not_before) + transfer;
        end.inbound.push_back(frame);
        end.not_before
    }
    /// Everything still to arrive at `side` arrives later than this.
    pub fn hold(&mut self, side: usize, until: u64) {
        self.ends[side].not_before = self.ends[side].not_before.max(until);
    }
    /// When the last frame under way arrives, or a later `at`.
    pub fn after_all(&self, side: usize, at: u64) -> u64 {
        self.ends[side].not_before.max(at)
    }
    /// The next frame to arrive, unless it was lost.
    pub fn arrive(&mut self, side: usize) -> Option<Bytes> {
        let end = &mut self.ends[side];
        let frame = end.inbound.pop_front()?;
        if let Some(left) = &mut end.allowance {
            *left = left.checked_sub(1)?;
        }
        (!end.down).then_some(frame)
    }
    /// Frames to `side` under way.
    pub fn under_way(&self, side: usize) -> usize {
        self.ends[side].inbound.len()
    }
    /// From now on at most `frames` of those under way arrive.
    pub fn cut(&mut self, side: usize, frames: usize) {
        let end = &mut self.ends[side];
        end.allowance = Some(end.allowance.map_or(frames, |a| a.min(frames)));
    }
}

/// A message's bytes in one piece.
pub fn frame(message: &Message) -> Bytes {
    let frame = message.encode();
    let mut out = BytesMut::with_capacity(frame.head.len() + frame.record.len());
    out.extend_from_slice(&frame.head);
    out.extend_from_slice(&frame.record);
    out.freeze()
}

/// The message of a frame, as the shell's reader decodes it.
pub fn parse(frame: &Bytes) -> Result<Message, String> {
    let head: &[u8; FRAME] = frame.first_chunk().ok_or("short")?;
    let header = FrameHeader::decode(head).map_err(|e| e.to_string())?;
    // A damaged length makes the reader wait for bytes of later frames: never a whole message.
    header.body(frame.slice(FRAME..)).map_err(|e| e.to_string())
}

/// The frame with one bit turned.
pub fn flip(frame: &Bytes, rng: &mut Prng) -> Bytes {
    let mut bytes = frame.to_vec();
    let at = rng.below(bytes.len() as u64) as usize;
    bytes[at] ^= 1 << rng.below(8);
    bytes.into()
}

/// In order, bytes unchanged; a cut loses a suffix; no flipped bit decodes.
pub fn check() {
    let mut rng = Prng::new(5);
    let mut net = Network::default();
    let id = net.open(0, 0, 1, &mut rng);
    let c = net.connections.get_mut(&id).expect("just opened");
    let message = |n| Message::Durable { lsn: volrep::units::Lsn(n) };
    let times: Vec<u64> = (0..50).map(|n| c.send(1, n, frame(&message(n)), &mut rng)).collect();
    assert!(times.is_sorted());
    for n in 0..20 {
        let bytes = c.arrive(1).expect("sent");
        assert_eq!(parse(&bytes), Ok(message(n)));
        (0..40).for_each(|_| assert!(parse(&flip(&bytes, &mut rng)).is_err()));
    }
    c.cut(1, 3);
    let arrived = (0..30).filter(|_| c.arrive(1).is_some()).count();
    assert_eq!(arrived, 3);
    assert!(net.find(LinkId(1)).is_some() && net.standing().is_empty());
}

/// Index of a peer in a host's configuration, as a node number.
pub fn peer_node(node: usize, peer: usize) -> usize {
    if peer < node { peer } else { peer + 1 }
}
