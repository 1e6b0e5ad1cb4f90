//! The way into a running group from other threads.
//!
//! Owns: the queue to the loop and what may be posted on it. Invariant: every post is answered
//! exactly once, also when the loop ends or has ended (with ESHUTDOWN, or a refusal).

use crate::disk::IoError;
use crate::front::Submit;
use crate::front::knbd::Serve;
use crate::front::nbd::Export;
use crate::front::ublk::{Host, Queue, QueueId};
use crate::node::event::{AdminOp, Answer, Event, Op, Refusal, RequestId};
use crate::sys::wake::Waker;
use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A listener that [`Handle::listen_nbd`] handed over, or a connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ListenId(pub(super) u64);

/// What a front end offers. A request says it, so that nothing that is meant for a view can reach a volume,
/// whatever the node has become meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Offered {
    /// The volumes of a primary.
    #[default]
    Volumes,
    /// The view of a shadow.
    View,
}

impl Offered {
    /// A request, as the node hears of it.
    pub fn event(self, id: RequestId, op: Op) -> Event {
        match self {
            Offered::Volumes => Event::Request { id, op },
            Offered::View => Event::View { id, op },
        }
    }
}

/// What other threads ask of the loop.
#[derive(Debug)]
pub(super) enum Command {
    Submit(Offered, Op, Reply<Result<Bytes, IoError>>),
    Admin(AdminOp, Reply<Answer>),
    ListenNbd(ListenId, Offered, UnixListener, Arc<[Export]>),
    ServeNbd(ListenId, Offered, OwnedFd, Export),
    FinishNbd(ListenId, Duration, Reply<()>),
    CloseNbd(ListenId),
    OpenQueue(QueueId, Offered, Box<Queue>, Reply<io::Result<()>>),
    ParkQueue(QueueId),
    CloseQueue(QueueId, Reply<io::Result<()>>),
    Stop,
}

/// Somebody's callback, called exactly once: with the answer, or when dropped with "no longer".
pub(super) struct Reply<R: Gone> {
    done: Option<Box<dyn FnOnce(R) + Send>>,
}

/// The answer when there is nobody left to give one.
pub(super) trait Gone {
    fn gone() -> Self;
}

impl Gone for Result<Bytes, IoError> {
    fn gone() -> Self {
        Err(IoError::ESHUTDOWN)
    }
}

impl Gone for io::Result<()> {
    fn gone() -> Self {
        Err(io::Error::other("the daemon is stopping"))
    }
}

impl Gone for Answer {
    fn gone() -> Self {
        Answer::Refused(Refusal::Failed, "the daemon is stopping: start it again first".into())
    }
}

impl Gone for () {
    fn gone() {}
}

impl<R: Gone> Reply<R> {
    fn new(done: Box<dyn FnOnce(R) + Send>) -> Reply<R> {
        Reply { done: Some(done) }
    }

    /// One whose answer is received elsewhere; when the loop is gone that is an answer, too.
    fn channel() -> (Reply<R>, Receiver<R>)
    where
        R: Send + 'static,
    {
        let (tell, told) = crossbeam_channel::bounded(1);
        (Reply::new(Box::new(move |answer| drop(tell.send(answer)))), told)
    }

    #[cfg(test)]
    pub(super) fn nobody() -> Reply<R> {
        Reply { done: None }
    }

    pub(super) fn send(mut self, answer: R) {
        if let Some(done) = self.done.take() {
            done(answer);
        }
    }
}

impl<R: Gone> Drop for Reply<R> {
    fn drop(&mut self) {
        if let Some(done) = self.done.take() {
            done(R::gone());
        }
    }
}

impl<R: Gone> fmt::Debug for Reply<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reply")
    }
}

/// Posts to a running group. Cheap to clone; every method returns at once.
#[derive(Clone, Debug)]
pub struct Handle {
    queue: Sender<Command>,
    waker: Arc<Waker>,
    listeners: Arc<AtomicU64>,
    link_address: Option<SocketAddr>,
    offered: Offered,
}

impl Handle {
    pub(super) fn new(queue: Sender<Command>, waker: Arc<Waker>, link_address: Option<SocketAddr>) -> Handle {
        Handle { queue, waker, listeners: Arc::default(), link_address, offered: Offered::Volumes }
    }

    /// The way for front ends that offer the view of a shadow.
    pub fn for_view(&self) -> Handle {
        Handle { offered: Offered::View, ..self.clone() }
    }

    fn post(&self, command: Command) {
        // When the loop is gone the command is dropped here, which answers it.
        if self.queue.send(command).is_ok() {
            self.waker.wake();
        }
    }

    /// Asks the node; `done` is called on the loop's thread and must not block.
    pub fn admin(&self, op: AdminOp, done: Box<dyn FnOnce(Answer) + Send>) {
        self.post(Command::Admin(op, Reply::new(done)));
    }

    /// Serves NBD to those who connect to `listener`.
    pub fn listen_nbd(&self, listener: UnixListener, exports: Vec<Export>) -> ListenId {
        let id = self.new_id();
        self.post(Command::ListenNbd(id, self.offered, listener, exports.into()));
        id
    }

    fn new_id(&self) -> ListenId {
        ListenId(self.listeners.fetch_add(1, Ordering::Relaxed))
    }

    /// Closes the listener and its sessions. Their requests still finish, unheard.
    pub fn close_nbd(&self, id: ListenId) {
        self.post(Command::CloseNbd(id));
    }

    /// Makes the loop return. Nothing is drained: ask for `Shutdown` and await its answer before.
    pub fn stop(&self) {
        self.post(Command::Stop);
    }

    /// Where the group listens for its peers; the port is the real one.
    pub fn link_address(&self) -> Option<SocketAddr> {
        self.link_address
    }
}

impl Host for Handle {
    fn open(&self, id: QueueId, queue: Queue) -> Receiver<io::Result<()>> {
        let (reply, told) = Reply::channel();
        self.post(Command::OpenQueue(id, self.offered, Box::new(queue), reply));
        told
    }

    fn park(&self, id: QueueId) {
        self.post(Command::ParkQueue(id));
    }

    fn close(&self, id: QueueId) -> Receiver<io::Result<()>> {
        let (reply, told) = Reply::channel();
        self.post(Command::CloseQueue(id, reply));
        told
    }
}

impl Serve for Handle {
    fn serve(&self, socket: OwnedFd, export: Export) -> u64 {
        let id = self.new_id();
        self.post(Command::ServeNbd(id, self.offered, socket, export));
        id.0
    }

    fn finish(&self, connection: u64, limit: Duration, done: Box<dyn FnOnce() + Send>) {
        self.post(Command::FinishNbd(ListenId(connection), limit, Reply::new(Box::new(|()| done()))));
    }

    fn close(&self, connection: u64) {
        self.close_nbd(ListenId(connection));
    }
}

impl Submit for Handle {
    fn submit(&self, op: Op, done: Box<dyn FnOnce(Result<Bytes, IoError>) + Send>) {
        self.post(Command::Submit(self.offered, op, Reply::new(done)));
    }
}
