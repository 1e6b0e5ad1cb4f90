//! Connections to peers, on the ring.
//!
//! Owns: their sockets, and the bytes on the way in and out. Invariant: a link's number is never
//! used again; `LinkUp` comes first and `LinkDown` last, once each; messages keep their order.

use super::acceptor::Acceptor;
use super::encoders::Encoders;
use super::frames::{Assembler, Transport};
use super::reactor::Tag;
use crate::format::message::Message;
use crate::node::event::{Event, LinkId};
use crate::sys::net;
use crate::sys::process::random;
use crate::sys::uring::{Completion, Fd, Key, Operation, Ring};
use crate::units::SECONDS;
use bytes::{Bytes, BytesMut};
use nix::libc;
use slab::Slab;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;

/// Most connections at a time; more are closed at once. Peers are few; the rest is noise.
const MAX_LINKS: usize = 64;
/// Received at a time, bytes.
const RECEIVE: usize = 128 << 10;
/// Pieces gathered into one send.
const GATHER: usize = 256;
/// How long an attempt to connect to one address may take.
const CONNECT: u64 = 3 * SECONDS;
/// How long a closing link may take to send what is queued.
const LINGER: u64 = 2 * SECONDS;
/// Bits of a link's number that say where it is in the table.
const SLOT_BITS: u32 = 16;

/// What an operation on a link was for.
#[derive(Clone, Copy, Debug)]
pub(super) enum LinkTag {
    Accept,
    Connect(usize),
    Receive(usize),
    Send(usize),
}

struct Link {
    id: LinkId,
    fd: Fd,
    transport: Transport,
    assembler: Assembler,
    /// Wire bytes not yet given to the kernel.
    queue: VecDeque<Bytes>,
    receiving: bool,
    sending: bool,
    listed: bool,
    /// Close once all is sent, or at this time.
    closing: Option<u64>,
    /// `LinkDown` was told.
    down: bool,
}

struct Dial {
    peer: usize,
    fd: Fd,
    rest: Vec<SocketAddr>,
    connect: Option<Key>,
    deadline: u64,
}

/// All links of the group.
pub(super) struct Links {
    links: Slab<Link>,
    dials: Slab<Dial>,
    serial: u64,
    acceptor: Option<Acceptor>,
    /// host:port of each peer that can be dialled.
    peers: Vec<Option<String>>,
    /// Links with something to send.
    ready: Vec<usize>,
    /// Links with a bound on their closing.
    closing: usize,
    messages: Vec<Message>,
}

impl Links {
    pub fn new(listener: Option<Fd>, peers: Vec<Option<String>>) -> Links {
        Links {
            links: Slab::new(),
            dials: Slab::new(),
            serial: 0,
            acceptor: listener.map(Acceptor::new),
            peers,
            ready: Vec::new(),
            closing: 0,
            messages: Vec::new(),
        }
    }

    /// Begins to accept.
    pub fn start(&mut self, ring: &mut Ring<Tag>) {
        if let Some(acceptor) = &mut self.acceptor {
            acceptor.arm(ring, Tag::Link(LinkTag::Accept));
        }
    }

    /// Dials the peer with this index.
    pub fn dial(
        &mut self,
        peer: usize,
        ring: &mut Ring<Tag>,
        encoders: &Encoders,
        now: u64,
        events: &mut VecDeque<Event>,
    ) {
        match self.peers.get(peer).and_then(Option::as_ref) {
            None => events.push_back(Event::DialFailed { peer }),
            Some(name) => match name.parse() {
                Ok(address) => self.connect(peer, vec![address], ring, now, events),
                Err(_) => encoders.resolve(peer, name.clone()),
            },
        }
    }

    /// A peer's name was looked up.
    pub fn resolved(
        &mut self,
        peer: usize,
        addresses: std::io::Result<Vec<SocketAddr>>,
        ring: &mut Ring<Tag>,
        now: u64,
        events: &mut VecDeque<Event>,
    ) {
        match addresses {
            Ok(mut addresses) => {
                addresses.reverse();
                self.connect(peer, addresses, ring, now, events);
            }
            Err(error) => {
                let name = self.peers.get(peer).and_then(Option::as_deref).unwrap_or_default();
                tracing::debug!("looking up {name} failed: {error}");
                events.push_back(Event::DialFailed { peer });
            }
        }
    }

    /// Tries the last of `rest`, and the others after it.
    fn connect(
        &mut self,
        peer: usize,
        mut rest: Vec<SocketAddr>,
        ring: &mut Ring<Tag>,
        now: u64,
        events: &mut VecDeque<Event>,
    ) {
        while let Some(address) = rest.pop() {
            match net::tcp_socket(&address) {
                Ok(fd) => {
                    let entry = self.dials.vacant_entry();
                    let operation = Operation::Connect { fd: fd.clone(), address: net::storage(address) };
                    let connect = Some(ring.submit(operation, Tag::Link(LinkTag::Connect(entry.key()))));
                    entry.insert(Dial { peer, fd, rest, connect, deadline: now + CONNECT });
                    return;
                }
                Err(error) => tracing::warn!("no socket to connect to {address}: {error}"),
            }
        }
        events.push_back(Event::DialFailed { peer });
    }

    fn add(&mut self, fd: Fd, dialed: Option<usize>, ring: &mut Ring<Tag>, events: &mut VecDeque<Event>) {
        let entry = self.links.vacant_entry();
        let slot = entry.key();
        self.serial += 1;
        let id = LinkId(self.serial << SLOT_BITS | slot as u64);
        entry.insert(Link {
            id,
            fd,
            transport: Transport::Plain,
            assembler: Assembler::default(),
            queue: VecDeque::new(),
            receiving: false,
            sending: false,
            listed: false,
            closing: None,
            down: false,
        });
        events.push_back(Event::LinkUp { link: id, dialed, nonce: random() });
        self.receive(slot, BytesMut::with_capacity(RECEIVE), ring);
    }

    fn accept(
        &mut self,
        done: Completion<Tag>,
        ring: &mut Ring<Tag>,
        now: u64,
        events: &mut VecDeque<Event>,
    ) {
        let Some(acceptor) = &mut self.acceptor else { return };
        let accepted: Option<OwnedFd> = acceptor.accepted(done, now);
        if acceptor.retry_at().is_none() {
            acceptor.arm(ring, Tag::Link(LinkTag::Accept));
        }
        let Some(fd) = accepted else { return };
        if self.links.len() >= MAX_LINKS {
            tracing::warn!("more than {MAX_LINKS} connections from peers: closing the newest");
        } else if net::tune(&fd).is_ok() {
            self.add(Rc::new(fd), None, ring, events);
        }
    }

    fn connected(
        &mut self,
        key: usize,
        done: Completion<Tag>,
        ring: &mut Ring<Tag>,
        now: u64,
        events: &mut VecDeque<Event>,
    ) {
        let dial = self.dials.remove(key);
        match done.result {
            Ok(_) => self.add(dial.fd, Some(dial.peer), ring, events),
            Err(errno) => {
                tracing::debug!(
                    "connecting to peer {} failed: {}",
                    dial.peer,
                    std::io::Error::from_raw_os_error(errno)
                );
                self.connect(dial.peer, dial.rest, ring, now, events);
            }
        }
    }

    fn receive(&mut self, slot: usize, mut buf: BytesMut, ring: &mut Ring<Tag>) {
        let link = &mut self.links[slot];
        buf.clear();
        link.receiving = true;
        ring.submit(
            Operation::Receive { fd: link.fd.clone(), buf, exactly: None },
            Tag::Link(LinkTag::Receive(slot)),
        );
    }

    /// Takes a finished operation.
    pub fn complete(
        &mut self,
        tag: LinkTag,
        done: Completion<Tag>,
        ring: &mut Ring<Tag>,
        now: u64,
        events: &mut VecDeque<Event>,
    ) {
        match tag {
            LinkTag::Accept => self.accept(done, ring, now, events),
            LinkTag::Connect(key) => self.connected(key, done, ring, now, events),
            LinkTag::Receive(slot) => self.received(slot, done, ring, events),
            LinkTag::Send(slot) => self.sent(slot, done, events),
        }
    }

    fn received(
        &mut self,
        slot: usize,
        done: Completion<Tag>,
        ring: &mut Ring<Tag>,
        events: &mut VecDeque<Event>,
    ) {
        let link = &mut self.links[slot];
        link.receiving = false;
        let Operation::Receive { buf, .. } = done.operation else { return };
        match done.result {
            Ok(n) if n > 0 && !link.down => match link.take_in(&buf, &mut self.messages) {
                Ok(()) => {
                    let (link, closing) = (link.id, link.closing.is_some());
                    let messages = self.messages.drain(..).filter(|_| !closing);
                    events.extend(messages.map(|message| Event::Message { link, message }));
                    self.mark(slot);
                    return self.receive(slot, buf, ring);
                }
                Err(error) => {
                    tracing::warn!("closing a link: what came over it is not a message: {error}");
                    // What came before the damage was good.
                    let link = link.id;
                    events.extend(self.messages.drain(..).map(|message| Event::Message { link, message }));
                }
            },
            Err(errno) if errno != libc::ECANCELED => {
                tracing::debug!("a link broke: {}", std::io::Error::from_raw_os_error(errno));
            }
            _ => {}
        }
        self.bring_down(slot, events);
    }

    fn sent(&mut self, slot: usize, done: Completion<Tag>, events: &mut VecDeque<Event>) {
        let link = &mut self.links[slot];
        link.sending = false;
        if done.result.is_err() || link.down {
            return self.bring_down(slot, events);
        }
        self.mark(slot);
    }

    fn find(&mut self, id: LinkId) -> Option<usize> {
        let slot = (id.0 & ((1 << SLOT_BITS) - 1)) as usize;
        self.links.get(slot).filter(|l| l.id == id && !l.down).map(|_| slot)
    }

    /// Queues a message; one for a link that is gone is dropped.
    pub fn send(&mut self, id: LinkId, message: &Message) {
        let Some(slot) = self.find(id) else { return };
        let link = &mut self.links[slot];
        if link.closing.is_none() {
            link.transport.seal(message.encode(), &mut link.queue);
            self.mark(slot);
        }
    }

    /// Closes a link once everything queued is sent.
    pub fn close(&mut self, id: LinkId, now: u64) {
        let Some(slot) = self.find(id) else { return };
        if self.links[slot].closing.is_none() {
            self.links[slot].closing = Some(now + LINGER);
            self.closing += 1;
            self.mark(slot);
        }
    }

    fn mark(&mut self, slot: usize) {
        let link = &mut self.links[slot];
        if !link.listed && (!link.queue.is_empty() || link.closing.is_some()) {
            link.listed = true;
            self.ready.push(slot);
        }
    }

    /// Starts the sends that are due; once per round, so that messages of one round share a send.
    pub fn flush(&mut self, ring: &mut Ring<Tag>, events: &mut VecDeque<Event>) {
        while let Some(slot) = self.ready.pop() {
            let Some(link) = self.links.get_mut(slot) else { continue };
            link.listed = false;
            if link.down {
                self.bring_down(slot, events);
                continue;
            }
            if link.sending {
                continue;
            }
            if link.queue.is_empty() {
                if link.closing.is_some() {
                    self.bring_down(slot, events);
                }
                continue;
            }
            let pieces = link.queue.drain(..link.queue.len().min(GATHER)).collect();
            link.sending = true;
            ring.submit(Operation::Send { fd: link.fd.clone(), pieces }, Tag::Link(LinkTag::Send(slot)));
        }
    }

    /// Ends a link; it is forgotten when its last operation has completed.
    fn bring_down(&mut self, slot: usize, events: &mut VecDeque<Event>) {
        let link = &mut self.links[slot];
        if !link.down {
            link.down = true;
            link.queue.clear();
            net::hang_up(&link.fd);
            events.push_back(Event::LinkDown { link: link.id });
            if link.closing.take().is_some() {
                self.closing -= 1;
            }
        }
        if !link.receiving && !link.sending && !link.listed {
            self.links.remove(slot);
        }
    }

    /// When [`Links::expire`] is due.
    pub fn deadline(&self) -> Option<u64> {
        let closing = self.links.iter().filter_map(|(_, l)| l.closing).filter(|_| self.closing > 0);
        let dials = self.dials.iter().filter(|(_, d)| d.connect.is_some()).map(|(_, d)| d.deadline);
        closing.chain(dials).chain(self.acceptor.as_ref().and_then(Acceptor::retry_at)).min()
    }

    /// Gives up on what took too long.
    pub fn expire(&mut self, now: u64, ring: &mut Ring<Tag>, events: &mut VecDeque<Event>) {
        for (_, dial) in &mut self.dials {
            if dial.deadline <= now
                && let Some(key) = dial.connect.take()
            {
                ring.cancel(key);
            }
        }
        if self.closing > 0 {
            let late: Vec<usize> = self
                .links
                .iter()
                .filter(|(_, l)| l.closing.is_some_and(|at| at <= now))
                .map(|(slot, _)| slot)
                .collect();
            for slot in late {
                self.bring_down(slot, events);
            }
        }
        if let Some(acceptor) = &mut self.acceptor
            && acceptor.retry_at().is_some_and(|at| at <= now)
        {
            acceptor.arm(ring, Tag::Link(LinkTag::Accept));
        }
    }
}

impl Link {
    fn take_in(&mut self, received: &[u8], messages: &mut Vec<Message>) -> Result<(), String> {
        let plain = self.transport.open(received, &mut self.queue).map_err(|e| e.to_string())?;
        self.assembler.feed(plain, messages).map_err(|e| e.to_string())
    }
}
