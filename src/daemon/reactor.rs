//! The loop: completions -> step -> actions, on one thread and one ring.
//!
//! Owns: the order of a round, and who asked for what. Invariant: every event is stepped and all
//! its actions are performed before the next; a round ends with one system call, which submits
//! everything and waits.

use super::Error;
use super::clients::{ClientTag, Clients};
use super::encoders::{Encoders, Finished};
use super::handle::{Command, Reply};
use super::history::HistoryFile;
use super::links::{LinkTag, Links};
use super::salvage::SalvageFiles;
use super::stage::StageFiles;
use super::ublk::{Queues, UblkTag};
use crate::disk::IoError;
use crate::node::Node;
use crate::node::event::{Action, Actions, AdminId, Answer, Event, Level, RequestId};
use crate::sys::clock;
use crate::sys::disk::{self, Answers, Disk};
use crate::sys::uring::{Completion, Fd, Operation, Ring};
use crate::sys::wake::Waker;
use crate::units::Now;
use bytes::Bytes;
use crossbeam_channel::Receiver;
use slab::Slab;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

/// Submissions between two system calls.
const ENTRIES: u32 = 512;

/// What the loop drives.
pub(super) trait Machine {
    fn start(&mut self, now: Now, actions: &mut Actions);
    fn step(&mut self, now: Now, event: Event, actions: &mut Actions);
}

impl Machine for Node {
    fn start(&mut self, now: Now, actions: &mut Actions) {
        Node::start(self, now, actions);
    }
    fn step(&mut self, now: Now, event: Event, actions: &mut Actions) {
        Node::step(self, now, event, actions);
    }
}

/// Whose an operation on the ring is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Tag {
    /// The eventfd was raised.
    Wake,
    Disk(disk::Tag),
    Link(LinkTag),
    Client(ClientTag),
    Ublk(UblkTag),
}

impl From<disk::Tag> for Tag {
    fn from(tag: disk::Tag) -> Tag {
        Tag::Disk(tag)
    }
}

/// Who waits for the answer to a request.
#[derive(Debug)]
pub(super) enum Origin {
    /// An NBD client.
    Client { slot: usize, cookie: u64, held: usize },
    /// A tag of a ublk queue.
    Ublk { slot: usize, tag: u16 },
    /// A caller of `Handle::submit`.
    Caller(Reply<Result<Bytes, IoError>>),
}

/// What the loop is made of.
pub(super) struct Parts<M> {
    pub machine: M,
    pub disk: Disk,
    pub stage: StageFiles,
    pub salvage: SalvageFiles,
    pub history: HistoryFile,
    pub links: Links,
    pub workers: usize,
    pub waker: Arc<Waker>,
    pub commands: Receiver<Command>,
}

/// The loop.
pub(super) struct Reactor<M> {
    // Dropped first: it waits for the kernel to let go of what the others lent it.
    ring: Ring<Tag>,
    machine: M,
    disk: Disk,
    stage: StageFiles,
    salvage: SalvageFiles,
    history: HistoryFile,
    links: Links,
    clients: Clients,
    queues: Queues,
    encoders: Encoders,
    commands: Receiver<Command>,
    waker: Arc<Waker>,
    wake_fd: Fd,
    now: Now,
    wake_at: Option<u64>,
    events: VecDeque<Event>,
    actions: Actions,
    answers: Answers,
    done: Vec<Completion<Tag>>,
    requests: Slab<Origin>,
    admins: Slab<Reply<Answer>>,
    end: Option<Result<(), Error>>,
}

impl<M: Machine> Reactor<M> {
    pub fn new(parts: Parts<M>) -> Result<Reactor<M>, Error> {
        let Parts { machine, disk, stage, salvage, history, links, workers, waker, commands } = parts;
        let ring = Ring::new(ENTRIES).map_err(Error::Ring)?;
        let encoders = Encoders::start(workers, &waker).map_err(Error::Thread)?;
        let wake_fd = Rc::new(waker.descriptor().map_err(Error::Ring)?);
        Ok(Reactor {
            ring,
            machine,
            disk,
            stage,
            salvage,
            history,
            links,
            clients: Clients::default(),
            queues: Queues::default(),
            encoders,
            commands,
            waker,
            wake_fd,
            now: Now::default(),
            wake_at: None,
            events: VecDeque::new(),
            actions: Actions::default(),
            answers: Vec::new(),
            done: Vec::new(),
            requests: Slab::new(),
            admins: Slab::new(),
            end: None,
        })
    }

    /// Runs until `Handle::stop` or a fatal error.
    pub fn run(mut self) -> Result<(), Error> {
        self.listen_for_wakes();
        self.links.start(&mut self.ring);
        self.now = clock::now();
        self.machine.start(self.now, &mut self.actions);
        self.perform();
        loop {
            self.posts();
            self.step_all();
            if let Some(end) = self.end.take() {
                return end;
            }
            self.turn()?;
            self.now = clock::now();
            self.completions();
            self.timers();
        }
    }

    fn listen_for_wakes(&mut self) {
        let operation = Operation::Event { fd: self.wake_fd.clone(), count: Box::new(0) };
        self.ring.submit(operation, Tag::Wake);
    }

    /// Submits, and sleeps until there is something to do.
    fn turn(&mut self) -> Result<(), Error> {
        let deadline =
            [self.wake_at, self.links.deadline(), self.clients.deadline()].into_iter().flatten().min();
        let mut timeout = deadline.map(|at| at.saturating_sub(clock::now().mono));
        self.waker.going_to_sleep();
        if !(self.commands.is_empty() && self.encoders.is_idle() && self.events.is_empty()) {
            timeout = Some(0);
        }
        let outcome = self.ring.turn(timeout).map_err(Error::Ring);
        self.waker.awake();
        outcome
    }

    /// What other threads have posted.
    fn posts(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Submit(offered, op, reply) => {
                    let id = RequestId(self.requests.insert(Origin::Caller(reply)) as u64);
                    self.events.push_back(offered.event(id, op));
                }
                Command::Admin(op, reply) => {
                    let id = AdminId(self.admins.insert(reply) as u64);
                    self.events.push_back(Event::Admin { id, op });
                }
                Command::ListenNbd(id, offered, listener, exports) => {
                    self.clients.listen((id, offered), listener, exports, &mut self.ring)
                }
                Command::ServeNbd(id, offered, socket, export) => {
                    self.clients.serve((id, offered), socket, &export)
                }
                Command::FinishNbd(id, limit, done) => self.clients.finish(id, self.now.mono, limit, done),
                Command::CloseNbd(id) => self.clients.close(id, &mut self.ring),
                Command::OpenQueue(id, offered, queue, reply) => {
                    reply.send(self.queues.open((id, offered), *queue, &mut self.ring))
                }
                Command::ParkQueue(id) => self.queues.park(id),
                Command::CloseQueue(id, reply) => self.queues.close(id, reply),
                Command::Stop => self.end = Some(Ok(())),
            }
        }
        while let Some(finished) = self.encoders.finished() {
            match finished {
                Finished::Encoded(token, encoded) => self.events.push_back(Event::Encoded { token, encoded }),
                Finished::Compared(token, product) => {
                    self.events.push_back(Event::Compared { token, product });
                }
                Finished::Resolved(peer, addresses) => {
                    self.links.resolved(peer, addresses, &mut self.ring, self.now.mono, &mut self.events);
                }
            }
        }
    }

    fn completions(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        self.ring.reap(&mut done);
        let (ring, events, now) = (&mut self.ring, &mut self.events, self.now.mono);
        for completion in done.drain(..) {
            match completion.tag {
                Tag::Wake => {
                    let operation = Operation::Event { fd: self.wake_fd.clone(), count: Box::new(0) };
                    ring.submit(operation, Tag::Wake);
                }
                Tag::Disk(tag) => {
                    self.disk.complete(ring, tag, completion, &mut self.answers);
                    let answers = self.answers.drain(..);
                    events.extend(answers.map(|(token, result)| Event::Disk { token, result }));
                }
                Tag::Link(tag) => self.links.complete(tag, completion, ring, now, events),
                Tag::Client(tag) => {
                    self.clients.complete(tag, completion, ring, now, &mut self.requests, events)
                }
                Tag::Ublk(tag) => self.queues.complete(tag, completion, ring, &mut self.requests, events),
            }
        }
        self.done = done;
    }

    fn timers(&mut self) {
        let now = self.now.mono;
        if self.wake_at.is_some_and(|at| at <= now) {
            self.wake_at = None;
            self.events.push_back(Event::Wake);
        }
        self.links.expire(now, &mut self.ring, &mut self.events);
        self.clients.expire(now, &mut self.ring);
    }

    /// Steps the machine with everything that has happened, and with what comes of it at once; then
    /// starts the sends and receives that are due, which may end a link, which is an event again.
    fn step_all(&mut self) {
        loop {
            while self.end.is_none()
                && let Some(event) = self.events.pop_front()
            {
                self.machine.step(self.now, event, &mut self.actions);
                self.perform();
            }
            self.clients.flush(&mut self.ring, self.now.mono, &mut self.requests, &mut self.events);
            self.links.flush(&mut self.ring, &mut self.events);
            if self.events.is_empty() || self.end.is_some() {
                return;
            }
        }
    }

    fn perform(&mut self) {
        if let Some(at) = self.actions.wake.take() {
            self.wake_at = Some(at);
        }
        let mut list = std::mem::take(&mut self.actions.list);
        for action in list.drain(..) {
            self.act(action);
        }
        self.actions.list = list;
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Disk(request) => {
                self.disk.submit(&mut self.ring, request, &mut self.answers);
                for (token, result) in self.answers.drain(..) {
                    self.events.push_back(Event::Disk { token, result });
                }
            }
            Action::Encode { token, job } => {
                if let Some(encoded) = self.encoders.encode(token, job) {
                    self.events.push_back(Event::Encoded { token, encoded });
                    // That took a while: what follows is later.
                    self.now = clock::now();
                }
            }
            Action::Compare { token, job } => {
                if let Some(product) = self.encoders.compare(token, job) {
                    self.events.push_back(Event::Compared { token, product });
                    self.now = clock::now();
                }
            }
            Action::OpenStage { fresh } => {
                let result = self.stage.open(fresh, &mut self.disk);
                self.events.push_back(Event::Stage { result });
                self.now = clock::now();
            }
            Action::DropStage => {
                self.stage.remove();
                self.now = clock::now();
            }
            Action::Salvage(part) => {
                let result = self.salvage.write(part);
                self.events.push_back(Event::Salvaged { result });
                self.now = clock::now();
            }
            Action::History(event) => {
                self.history.keep(&event);
                self.now = clock::now();
            }
            Action::Complete { id, result } => self.answer(id, result),
            Action::Dial { peer } => {
                self.links.dial(peer, &mut self.ring, &self.encoders, self.now.mono, &mut self.events);
            }
            Action::Send { link, message } => self.links.send(link, &message),
            Action::Close { link } => self.links.close(link, self.now.mono),
            Action::Answer { id, answer } => match self.admins.try_remove(id.0 as usize) {
                Some(reply) => reply.send(answer),
                None => tracing::error!("an answer to the unknown {id:?}: a defect of this program"),
            },
            Action::Log { level, text } => log(level, &text),
            Action::Stop { text } => self.end = Some(Err(Error::Stopped(text))),
        }
    }

    fn answer(&mut self, id: RequestId, result: Result<Bytes, IoError>) {
        match self.requests.try_remove(id.0 as usize) {
            Some(Origin::Client { slot, cookie, held }) => self.clients.answer(slot, cookie, held, result),
            Some(Origin::Ublk { slot, tag }) => self.queues.answer(slot, tag, result, &mut self.ring),
            Some(Origin::Caller(reply)) => reply.send(result),
            None => tracing::error!("an answer to the unknown {id:?}: a defect of this program"),
        }
    }
}

fn log(level: Level, text: &str) {
    match level {
        Level::Error => tracing::error!("{text}"),
        Level::Warn => tracing::warn!("{text}"),
        Level::Info => tracing::info!("{text}"),
        Level::Debug => tracing::debug!("{text}"),
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
