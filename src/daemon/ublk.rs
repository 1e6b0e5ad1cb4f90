//! Queues of ublk devices on the ring.
//!
//! Owns: which of a queue's tags the kernel has, and which requests the node has. Invariants: a request
//! that the node has accepted is answered when its answer comes, all answers of a round in the round's
//! one system call; once a queue is parked nothing more is taken from it, and no refusal of a node that
//! shuts down reaches it: what is left is the next server's.

use super::handle::{Offered, Reply};
use super::reactor::{Origin, Tag};
use crate::disk::IoError;
use crate::front::ublk::{Command, Queue, QueueId};
use crate::node::event::{Event, RequestId};
use crate::sys::process::without_admin;
use crate::sys::uring::{Completion, Fd, Operation, Ring};
use bytes::Bytes;
use nix::libc;
use slab::Slab;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;

/// What a command was for.
#[derive(Clone, Copy, Debug)]
pub(super) struct UblkTag {
    slot: usize,
    tag: u16,
}

struct Served {
    id: QueueId,
    offered: Offered,
    queue: Queue,
    fd: Fd,
    /// Commands that the kernel has.
    waiting: usize,
    /// Requests that the node has.
    requests: usize,
    parked: bool,
    /// Who waits for the end of it.
    closing: Option<Reply<io::Result<()>>>,
}

/// All queues of the group.
#[derive(Default)]
pub(super) struct Queues {
    served: Slab<Served>,
}

impl Queues {
    /// Serves a queue from now on.
    pub fn open(
        &mut self,
        (id, offered): (QueueId, Offered),
        queue: Queue,
        ring: &mut Ring<Tag>,
    ) -> io::Result<()> {
        let (fd, depth) = (Rc::new(queue.descriptor()?), queue.depth());
        if u32::from(depth) > ring.capacity() {
            let text =
                format!("{}: {depth} requests at a time is more than this version serves", queue.name());
            return Err(io::Error::other(text));
        }
        let served = Served { id, offered, queue, fd, waiting: 0, requests: 0, parked: false, closing: None };
        let slot = self.served.insert(served);
        let served = &mut self.served[slot];
        // See `Queue::fetch`: all in one call, so nothing else may be in the way, and without privilege.
        ring.turn(Some(0))?;
        for tag in 0..depth {
            let command = served.queue.fetch(tag);
            served.give(slot, tag, command, ring);
        }
        without_admin(|| ring.turn(Some(0)))??;
        served.queue.map()
    }

    /// Takes nothing more from a queue.
    pub fn park(&mut self, id: QueueId) {
        self.served.iter_mut().filter(|(_, s)| s.id == id).for_each(|(_, s)| s.parked = true);
    }

    /// Tells when the kernel and the node have nothing of the queue any more and it is closed. The
    /// device has been stopped.
    pub fn close(&mut self, id: QueueId, reply: Reply<io::Result<()>>) {
        match self.served.iter_mut().find(|(_, s)| s.id == id) {
            None => reply.send(Ok(())),
            Some((slot, served)) => {
                served.closing = Some(reply);
                self.sweep(slot);
            }
        }
    }

    /// Takes a finished command; the request that it brought goes to `requests` and `events`.
    pub fn complete(
        &mut self,
        UblkTag { slot, tag }: UblkTag,
        done: Completion<Tag>,
        ring: &mut Ring<Tag>,
        requests: &mut Slab<Origin>,
        events: &mut VecDeque<Event>,
    ) {
        let served = &mut self.served[slot];
        served.waiting -= 1;
        match done.result {
            Ok(_) if served.parked => {}
            Ok(_) => match served.queue.request(tag) {
                Ok(op) => {
                    served.requests += 1;
                    let id = requests.insert(Origin::Ublk { slot, tag });
                    events.push_back(served.offered.event(RequestId(id as u64), op));
                }
                Err(fault) => {
                    tracing::error!("{}: a request that was not offered ({fault:?})", served.queue.name());
                    let command = served.queue.refuse(tag, fault);
                    served.give(slot, tag, command, ring);
                }
            },
            Err(errno) => {
                if errno != libc::ENODEV {
                    let error = io::Error::from_raw_os_error(errno);
                    tracing::error!("{}: the driver refused a command: {error}", served.queue.name());
                }
                self.sweep(slot);
            }
        }
    }

    /// The node's answer to a request.
    pub fn answer(&mut self, slot: usize, tag: u16, result: Result<Bytes, IoError>, ring: &mut Ring<Tag>) {
        let served = &mut self.served[slot];
        served.requests -= 1;
        // A node that shuts down has not done it: the next one will.
        if result != Err(IoError::ESHUTDOWN) {
            let command = served.queue.finish(tag, result);
            served.give(slot, tag, command, ring);
        }
        self.sweep(slot);
    }

    /// Forgets a queue of which nothing is left.
    fn sweep(&mut self, slot: usize) {
        let served = &mut self.served[slot];
        if served.waiting == 0 && served.requests == 0 && served.closing.is_some() {
            let served = self.served.remove(slot);
            let reply = served.closing;
            drop((served.queue, served.fd));
            if let Some(reply) = reply {
                reply.send(Ok(()));
            }
        }
    }
}

impl Served {
    fn give(&mut self, slot: usize, tag: u16, command: Command, ring: &mut Ring<Tag>) {
        self.waiting += 1;
        let Command { code, argument } = command;
        ring.submit(
            Operation::Command { fd: self.fd.clone(), code, argument },
            Tag::Ublk(UblkTag { slot, tag }),
        );
    }
}
