//! NBD clients on the ring.
//!
//! Owns: their sockets and the bytes on the way in and out. Invariant: what one client can make us
//! hold is bounded (above [`BOUND`] nothing more of it reaches the node, and nothing is received); a
//! client that vanishes takes nothing with it: its requests finish, and their answers are dropped.

use super::acceptor::Acceptor;
use super::farewell::Farewell;
use super::handle::{ListenId, Offered, Reply};
use super::reactor::{Origin, Tag};
use crate::disk::IoError;
use crate::front::nbd::{Export, Request, Session};
use crate::node::event::{Event, Op, RequestId};
use crate::sys::net;
use crate::sys::uring::{Completion, Fd, Operation, Ring};
use bytes::{Bytes, BytesMut};
use slab::Slab;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of one client's requests and replies above which nothing more is received from it.
const BOUND: usize = 16 << 20;
/// Unfinished requests of one client above which nothing more is received from it.
const REQUESTS: usize = 4096;
/// Most clients at a time; more are closed at once.
const CLIENTS: usize = 256;
/// Bytes of a receive buffer.
const RECEIVE: usize = 256 << 10;
/// A receive buffer with less room than this is renewed (or, when nothing refers to it, rewound).
const ROOM: usize = 64 << 10;

/// What an operation was for.
#[derive(Clone, Copy, Debug)]
pub(super) enum ClientTag {
    Accept(usize),
    Receive(usize),
    Send(usize),
}

struct Listener {
    id: ListenId,
    offered: Offered,
    acceptor: Acceptor,
    exports: Arc<[Export]>,
    closed: bool,
}

struct Client {
    fd: Fd,
    listen: ListenId,
    offered: Offered,
    session: Session,
    buffer: BytesMut,
    receiving: bool,
    /// A send is with the kernel.
    sending: bool,
    /// Requests that the node has not answered.
    requests: usize,
    /// Payload bytes of those, and of replies not yet sent.
    held: usize,
    /// Payload bytes of replies that the kernel has, and of those that it does not have yet.
    replies: [usize; 2],
    /// Requests that the node is to see when there is room again.
    waiting: VecDeque<Request>,
    listed: bool,
    gone: bool,
    /// It is being ended in an orderly way.
    farewell: Option<Farewell>,
}

/// All clients of the group.
#[derive(Default)]
pub(super) struct Clients {
    listeners: Slab<Listener>,
    clients: Slab<Client>,
    /// Clients with something to send or room to receive.
    ready: Vec<usize>,
    taken: Vec<Request>,
}

impl Clients {
    /// Accepts clients from `listener`.
    pub fn listen(
        &mut self,
        (id, offered): (ListenId, Offered),
        listener: UnixListener,
        exports: Arc<[Export]>,
        ring: &mut Ring<Tag>,
    ) {
        // On a non-blocking one io_uring would answer EAGAIN.
        if let Err(error) = listener.set_nonblocking(false) {
            tracing::error!("an NBD listener can't be used: {error}");
            return;
        }
        let entry = self.listeners.vacant_entry();
        let mut acceptor = Acceptor::new(Rc::new(OwnedFd::from(listener)));
        acceptor.arm(ring, Tag::Client(ClientTag::Accept(entry.key())));
        entry.insert(Listener { id, offered, acceptor, exports, closed: false });
    }

    /// Serves a client that knows the export and begins with its requests.
    pub fn serve(&mut self, listen: (ListenId, Offered), socket: OwnedFd, export: &Export) {
        self.add(socket, listen, Session::transmission(export));
    }

    /// Answers all that a client has sent, and closes it; see [`Farewell`].
    pub fn finish(&mut self, id: ListenId, now: u64, limit: Duration, done: Reply<()>) {
        // A client that has gone by itself is dropped here, which answers.
        let Some((slot, client)) = self.clients.iter_mut().find(|(_, c)| c.listen == id) else { return };
        client.farewell = Some(Farewell::begin(now, limit, done));
        self.mark(slot);
    }

    fn add(&mut self, fd: OwnedFd, (listen, offered): (ListenId, Offered), session: Session) {
        let slot = self.clients.insert(Client {
            fd: Rc::new(fd),
            listen,
            offered,
            session,
            buffer: BytesMut::new(),
            receiving: false,
            sending: false,
            requests: 0,
            held: 0,
            replies: [0; 2],
            waiting: VecDeque::new(),
            listed: false,
            gone: false,
            farewell: None,
        });
        self.mark(slot);
    }

    /// Closes a listener and its clients.
    pub fn close(&mut self, id: ListenId, ring: &mut Ring<Tag>) {
        if let Some((key, listener)) = self.listeners.iter_mut().find(|(_, l)| l.id == id && !l.closed) {
            listener.closed = true;
            if listener.acceptor.is_armed() {
                listener.acceptor.cancel(ring);
            } else {
                self.listeners.remove(key);
            }
        }
        let slots: Vec<usize> =
            self.clients.iter().filter(|(_, c)| c.listen == id).map(|(slot, _)| slot).collect();
        for slot in slots {
            self.hang_up(slot);
        }
    }

    /// Takes a finished operation; what a client asks for goes to `requests` and `events`.
    pub fn complete(
        &mut self,
        tag: ClientTag,
        done: Completion<Tag>,
        ring: &mut Ring<Tag>,
        now: u64,
        requests: &mut Slab<Origin>,
        events: &mut VecDeque<Event>,
    ) {
        match tag {
            ClientTag::Accept(key) => self.accept(key, done, ring, now),
            ClientTag::Receive(slot) => self.received(slot, done, now, requests, events),
            ClientTag::Send(slot) => {
                let client = &mut self.clients[slot];
                client.sending = false;
                client.held -= std::mem::take(&mut client.replies[0]);
                if done.result.is_err() {
                    client.hang_up();
                }
                self.mark(slot);
            }
        }
    }

    fn accept(&mut self, key: usize, done: Completion<Tag>, ring: &mut Ring<Tag>, now: u64) {
        let listener = &mut self.listeners[key];
        let accepted = listener.acceptor.accepted(done, now);
        if listener.closed {
            self.listeners.remove(key);
            return;
        }
        let (listen, exports) = ((listener.id, listener.offered), listener.exports.clone());
        if listener.acceptor.retry_at().is_none() {
            listener.acceptor.arm(ring, Tag::Client(ClientTag::Accept(key)));
        }
        let Some(fd) = accepted else { return };
        if self.clients.len() >= CLIENTS {
            tracing::warn!("more than {CLIENTS} NBD clients: closing the newest");
            return;
        }
        self.add(fd, listen, Session::new(exports));
    }

    fn received(
        &mut self,
        slot: usize,
        done: Completion<Tag>,
        now: u64,
        requests: &mut Slab<Origin>,
        events: &mut VecDeque<Event>,
    ) {
        let client = &mut self.clients[slot];
        client.receiving = false;
        let Operation::Receive { mut buf, .. } = done.operation else { return };
        if client.gone || !matches!(done.result, Ok(n) if n > 0) {
            if !client.farewell.as_mut().is_some_and(Farewell::ended) {
                client.hang_up();
            }
            return self.mark(slot);
        }
        if let Some(farewell) = &mut client.farewell {
            farewell.heard(now);
        }
        let input = buf.split().freeze();
        client.buffer = buf;
        let outcome = client.session.receive(input, &mut self.taken);
        for request in self.taken.drain(..) {
            if client.has_room() && client.waiting.is_empty() {
                client.admit(slot, request, requests, events);
            } else {
                client.waiting.push_back(request);
            }
        }
        if let Err(error) = outcome {
            tracing::warn!("closing an NBD connection: {error}");
        }
        self.mark(slot);
    }

    /// The node's answer to a client's request.
    pub fn answer(&mut self, slot: usize, cookie: u64, held: usize, result: Result<Bytes, IoError>) {
        let client = &mut self.clients[slot];
        client.requests -= 1;
        client.held -= held;
        if !client.gone {
            let reply = result.as_ref().map_or(0, Bytes::len);
            client.held += reply;
            client.replies[1] += reply;
            client.session.complete(cookie, result);
        }
        self.mark(slot);
    }

    fn mark(&mut self, slot: usize) {
        let client = &mut self.clients[slot];
        if !client.listed {
            client.listed = true;
            self.ready.push(slot);
        }
    }

    /// Sends and receives for every client that something happened to; once per round.
    pub fn flush(
        &mut self,
        ring: &mut Ring<Tag>,
        now: u64,
        requests: &mut Slab<Origin>,
        events: &mut VecDeque<Event>,
    ) {
        while let Some(slot) = self.ready.pop() {
            let client = &mut self.clients[slot];
            client.listed = false;
            client.part(now);
            client.send(slot, ring);
            while client.has_room()
                && let Some(request) = client.waiting.pop_front()
            {
                client.admit(slot, request, requests, events);
            }
            client.receive(slot, ring);
            if client.is_over() {
                self.clients.remove(slot);
            }
        }
    }

    fn hang_up(&mut self, slot: usize) {
        let client = &mut self.clients[slot];
        client.hang_up();
        self.mark(slot);
    }

    /// When [`Clients::expire`] is due.
    pub fn deadline(&self) -> Option<u64> {
        let accepts = self.listeners.iter().filter_map(|(_, l)| l.acceptor.retry_at());
        let farewells = self.clients.iter().filter_map(|(_, c)| c.farewell.as_ref()?.deadline());
        accepts.chain(farewells).min()
    }

    /// Accepts again where that had failed, and goes on with farewells.
    pub fn expire(&mut self, now: u64, ring: &mut Ring<Tag>) {
        for (key, listener) in &mut self.listeners {
            if listener.acceptor.retry_at().is_some_and(|at| at <= now) {
                listener.acceptor.arm(ring, Tag::Client(ClientTag::Accept(key)));
            }
        }
        let due = |c: &Client| c.farewell.as_ref().and_then(Farewell::deadline).is_some_and(|at| at <= now);
        let slots: Vec<usize> = self.clients.iter().filter(|(_, c)| due(c)).map(|(slot, _)| slot).collect();
        slots.into_iter().for_each(|slot| self.mark(slot));
    }
}

impl Client {
    fn has_room(&self) -> bool {
        self.held <= BOUND && self.requests < REQUESTS
    }

    /// Gives a request to the node.
    fn admit(
        &mut self,
        slot: usize,
        request: Request,
        requests: &mut Slab<Origin>,
        events: &mut VecDeque<Event>,
    ) {
        let Request { cookie, op } = request;
        let held = match &op {
            Op::Read(extent) => extent.len() as usize,
            Op::Write { data, .. } => data.len() as usize,
            Op::Zero { .. } | Op::Flush => 0,
        };
        self.requests += 1;
        self.held += held;
        let id = requests.insert(Origin::Client { slot, cookie, held });
        events.push_back(self.offered.event(RequestId(id as u64), op));
    }

    /// Goes on with the farewell, if there is one.
    fn part(&mut self, now: u64) {
        let idle = self.requests == 0 && self.waiting.is_empty();
        if let Some(farewell) = &mut self.farewell
            && farewell.advance(now, idle)
        {
            net::stop_receiving(&self.fd);
        }
    }

    fn send(&mut self, slot: usize, ring: &mut Ring<Tag>) {
        let held_back = self.farewell.as_ref().is_some_and(Farewell::holds_back) && self.has_room();
        if self.gone || self.sending || held_back {
            return;
        }
        let pieces = self.session.output();
        if !pieces.is_empty() {
            self.sending = true;
            self.replies = [self.replies[1], 0];
            ring.submit(Operation::Send { fd: self.fd.clone(), pieces }, Tag::Client(ClientTag::Send(slot)));
        } else if self.session.closing() || self.farewell.as_ref().is_some_and(Farewell::is_over) {
            self.hang_up();
        }
    }

    fn receive(&mut self, slot: usize, ring: &mut Ring<Tag>) {
        let room = self.has_room() && self.waiting.is_empty() && self.session.outstanding() <= BOUND;
        let deaf = self.farewell.as_ref().is_some_and(|f| !f.hears());
        if self.gone || self.receiving || self.session.closing() || deaf || !room {
            return;
        }
        let needed = self.session.needed();
        let exactly = (needed >= ROOM).then_some(needed);
        let buf = if exactly.is_some() {
            BytesMut::with_capacity(needed)
        } else {
            let mut buf = std::mem::take(&mut self.buffer);
            if buf.capacity() < ROOM {
                buf.reserve(RECEIVE);
            }
            buf
        };
        self.receiving = true;
        let operation = Operation::Receive { fd: self.fd.clone(), buf, exactly };
        ring.submit(operation, Tag::Client(ClientTag::Receive(slot)));
    }

    fn hang_up(&mut self) {
        if !self.gone {
            self.gone = true;
            // What the node has not seen it need not do: no reply was promised.
            self.waiting.clear();
            net::hang_up(&self.fd);
            // Who waits for the end does not wait for requests that the node has not answered.
            self.farewell = None;
        }
    }

    /// Nothing of it is left, with the kernel or with the node.
    fn is_over(&self) -> bool {
        self.gone && !self.receiving && !self.sending && self.requests == 0 && !self.listed
    }
}
