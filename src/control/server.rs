//! The daemon's end of the control socket, on a thread with a tokio-uring runtime.
//!
//! Owns: the socket and the connections on it. Invariant: one request per connection; at most
//! [`MAX_CLIENTS`] at a time, and one that goes away while it waits is forgotten.

use super::fronts::Fronts;
use super::{DeviceKind, Kind, MAX_REQUEST, Reply, Verb, parse_request};
use crate::daemon::Handle;
use crate::node::event::{AdminOp, Answer, At, Promote, Refresh};
use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio_uring::net::UnixStream;

/// Most connections at a time.
pub const MAX_CLIENTS: usize = 64;

/// The front ends of a node.
pub struct Open {
    /// Of its volumes.
    pub volumes: Fronts,
    /// Of a view of it.
    pub view: Fronts,
}

/// Makes the directory and the socket in it, mode 0700 and 0600, and serves it on a thread.
///
/// The caller holds the group's lock, so a socket that is there already is a dead daemon's.
pub fn start(socket: &Path, handle: Handle, fronts: Arc<Open>) -> io::Result<JoinHandle<()>> {
    if let Some(dir) = socket.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))?;
    }
    match std::fs::remove_file(socket) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    let run = move || {
        // A kernel without io_uring fails the group's loop first, with a reason.
        tokio_uring::start(async move {
            // tokio-uring's own listener asks for SO_REUSEPORT, which newer kernels refuse on a unix socket.
            match tokio::net::UnixListener::from_std(listener) {
                Ok(listener) => accept(listener, handle, fronts).await,
                Err(e) => {
                    tracing::error!("the control socket can't be watched: {e}; stop the daemon with a signal")
                }
            }
        });
    };
    std::thread::Builder::new().name("control".into()).spawn(run)
}

async fn next(listener: &tokio::net::UnixListener) -> io::Result<UnixStream> {
    let (stream, _) = listener.accept().await?;
    let stream = stream.into_std()?;
    // A ring waits by itself; on a non-blocking socket it would give EAGAIN instead.
    stream.set_nonblocking(false)?;
    Ok(UnixStream::from_std(stream))
}

async fn accept(listener: tokio::net::UnixListener, handle: Handle, fronts: Arc<Open>) {
    let clients = Rc::new(Cell::new(0));
    loop {
        match next(&listener).await {
            Ok(stream) if clients.get() < MAX_CLIENTS => {
                clients.set(clients.get() + 1);
                let (clients, handle, fronts) = (clients.clone(), handle.clone(), fronts.clone());
                tokio_uring::spawn(async move {
                    serve(stream, handle, fronts).await;
                    clients.set(clients.get() - 1);
                });
            }
            Ok(stream) => {
                tracing::warn!("a control connection was refused: {MAX_CLIENTS} are open");
                let busy = Reply::refused(
                    Kind::Busy,
                    format!("{MAX_CLIENTS} commands wait already: try again later"),
                );
                tokio_uring::spawn(async move { send(&stream, &busy).await });
            }
            Err(e) => {
                tracing::error!("the control socket can't accept (out of descriptors?): {e}");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn serve(stream: UnixStream, handle: Handle, fronts: Arc<Open>) {
    let reply = match read_line(&stream).await {
        Ok(Some(line)) => match parse_request(&line) {
            Ok(verb) => {
                tracing::debug!(?verb, "control request");
                let Some(reply) = whole_or_unless_gone(&stream, verb, handle, fronts).await else { return };
                reply
            }
            Err(refused) => refused,
        },
        Ok(None) => {
            Reply::refused(Kind::Failed, format!("a request is one line of at most {MAX_REQUEST} bytes"))
        }
        Err(_) => return,
    };
    send(&stream, &reply).await;
}

/// A verb of several steps goes on to its end without its client: half of one would leave an image frozen, or
/// devices taken away for nothing.
async fn whole_or_unless_gone(
    stream: &UnixStream,
    verb: Verb,
    handle: Handle,
    fronts: Arc<Open>,
) -> Option<Reply> {
    let whole = matches!(
        verb,
        Verb::View { .. } | Verb::ViewClose { .. } | Verb::Rejoin { .. } | Verb::Promote { .. }
    );
    if !whole {
        return unless_gone(stream, answer(verb, &handle, &fronts)).await;
    }
    let (tell, told) = oneshot::channel();
    tokio_uring::spawn(async move { drop(tell.send(answer(verb, &handle, &fronts).await)) });
    unless_gone(stream, told).await?.ok()
}

/// The line without its end; `None` if it is too long or cut short.
async fn read_line(stream: &UnixStream) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let mut buf = vec![0; 4096];
    loop {
        let (n, back) = stream.read(buf).await;
        let n = n?;
        buf = back;
        if n == 0 {
            return Ok(None);
        }
        line.extend_from_slice(&buf[..n]);
        if let Some(end) = line.iter().position(|b| *b == b'\n') {
            line.truncate(end);
            return Ok(Some(line));
        }
        if line.len() > MAX_REQUEST {
            return Ok(None);
        }
    }
}

/// Runs `work`, unless the client hangs up (or talks out of turn) before it is done.
async fn unless_gone<T>(stream: &UnixStream, work: impl Future<Output = T>) -> Option<T> {
    let mut work = pin!(work);
    let mut gone = pin!(stream.read(vec![0; 1]));
    poll_fn(|cx| match work.as_mut().poll(cx) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending => gone.as_mut().poll(cx).map(|_| None),
    })
    .await
}

async fn send(stream: &UnixStream, reply: &Reply) {
    let mut line = serde_json::to_vec(reply).unwrap_or_else(|e| {
        format!(r#"{{"reply":"refused","kind":"failed","text":"the reply can't be written: {e}"}}"#)
            .into_bytes()
    });
    line.push(b'\n');
    // A client that is gone needs no answer.
    let _ = stream.write_all(line).await;
    let _ = stream.shutdown(std::net::Shutdown::Both);
}

/// Asks the node, and waits.
async fn admin(handle: &Handle, op: AdminOp) -> Answer {
    let (tell, told) = oneshot::channel();
    handle.admin(op, Box::new(move |answer| drop(tell.send(answer))));
    told.await.unwrap_or_else(|_| {
        Answer::Refused(crate::node::event::Refusal::Busy, "the daemon is stopping: start it again".into())
    })
}

/// Runs what blocks (mounting waits for the very loop that serves the mount) on a thread of its own.
async fn blocking(work: impl FnOnce() -> Reply + Send + 'static) -> Reply {
    let (tell, told) = oneshot::channel();
    let spawned =
        std::thread::Builder::new().name("front-ends".into()).spawn(move || drop(tell.send(work())));
    if let Err(e) = spawned {
        return Reply::refused(Kind::Failed, format!("no thread for it: {e}"));
    }
    told.await
        .unwrap_or_else(|_| Reply::refused(Kind::Failed, "it failed in a way it should not; see the log"))
}

fn reply(answer: Answer) -> Reply {
    match answer {
        Answer::Status(status) => Reply::Status { status },
        Answer::Marked(mark) => Reply::Marked { mark },
        Answer::Done(text) => Reply::Done { text },
        Answer::Refused(refusal, text) => Reply::Refused { kind: refusal.into(), text },
    }
}

async fn answer(verb: Verb, handle: &Handle, fronts: &Arc<Open>) -> Reply {
    match verb {
        Verb::Status => match admin(handle, AdminOp::Status).await {
            Answer::Status(mut status) => {
                fronts.volumes.complete(&mut status);
                fronts.view.complete(&mut status);
                Reply::Status { status }
            }
            other => reply(other),
        },
        Verb::Attach { device } => match admin(handle, AdminOp::Open).await {
            Answer::Done(_) => {
                let fronts = fronts.clone();
                blocking(move || fronts.volumes.attach(device)).await
            }
            other => reply(other),
        },
        Verb::Detach => {
            let fronts = fronts.clone();
            match blocking(move || fronts.volumes.detach(true)).await {
                Reply::Done { .. } => reply(admin(handle, AdminOp::Drain).await),
                refused => refused,
            }
        }
        Verb::Mark { text } => reply(admin(handle, AdminOp::Mark { text }).await),
        Verb::Switchover { to, dry_run } => reply(admin(handle, AdminOp::Switchover { to, dry_run }).await),
        Verb::Outdate { member, fenced, dry_run } => {
            reply(admin(handle, AdminOp::Outdate { member, fenced, dry_run }).await)
        }
        Verb::Lease { ns } => reply(admin(handle, AdminOp::Lease { ns }).await),
        Verb::Promote { fenced, dry_run, at, accept_outdated } => {
            let wish = Promote { fenced, accept_outdated, dry_run, at };
            let done = reply(admin(handle, AdminOp::Promote(wish)).await);
            if !dry_run && matches!(done, Reply::Done { .. }) && fronts.view.is_open() {
                // It shows nothing any more.
                let fronts = fronts.clone();
                blocking(move || fronts.view.close(true)).await;
            }
            done
        }
        Verb::Refresh { peer, quick, verify, rate, in_place, suspend_delay } => {
            let refresh = Refresh { peer, quick, verify, rate, in_place, suspend_delay };
            reply(admin(handle, AdminOp::Refresh(refresh)).await)
        }
        Verb::View { scratch, at, device } => view(scratch, at, device, handle, fronts).await,
        Verb::ViewClose { force } => close_view(force, handle, fronts).await,
        Verb::RefreshStop => reply(admin(handle, AdminOp::RefreshStop).await),
        Verb::Rejoin { keep, dry_run } => rejoin(keep, dry_run, handle, fronts).await,
    }
}

/// The devices go first: one that is left would show another history's image to whoever has it open, should this
/// node be promoted again.
async fn rejoin(keep: Option<String>, dry_run: bool, handle: &Handle, fronts: &Arc<Open>) -> Reply {
    let plan = admin(handle, AdminOp::Rejoin { keep: keep.clone(), dry_run: true }).await;
    if dry_run || !matches!(plan, Answer::Done(_)) {
        return reply(plan);
    }
    let state = admin(handle, AdminOp::Status).await;
    let serves = !matches!(state, Answer::Status(s) if matches!(&*s.state, "Retiring" | "Retired"));
    let fronts = fronts.clone();
    match blocking(move || fronts.volumes.detach(serves)).await {
        Reply::Done { .. } => match reply(admin(handle, AdminOp::Rejoin { keep, dry_run: false }).await) {
            Reply::Refused { kind, text } => {
                Reply::refused(kind, format!("the devices are taken away, but nothing was given up: {text}"))
            }
            done => done,
        },
        Reply::Refused { kind, text } => Reply::refused(
            kind,
            format!("nothing was given up, because the device can't be taken away: {text}"),
        ),
        other => other,
    }
}

/// Freezes the image, then offers it; what can't be offered is not kept frozen.
async fn view(
    scratch: bool,
    at: Option<At>,
    device: DeviceKind,
    handle: &Handle,
    fronts: &Arc<Open>,
) -> Reply {
    if fronts.view.is_open() {
        return Reply::refused(Kind::Busy, "the devices of a view are there still: close it first (--close)");
    }
    match admin(handle, AdminOp::View { scratch, at }).await {
        Answer::Done(_) => {}
        other => return reply(other),
    }
    let shown = fronts.clone();
    let shown = blocking(move || shown.view.show(device, !scratch)).await;
    if !matches!(shown, Reply::Attached { .. }) {
        admin(handle, AdminOp::ViewClose).await;
    }
    shown
}

async fn close_view(force: bool, handle: &Handle, fronts: &Arc<Open>) -> Reply {
    let closing = fronts.clone();
    match blocking(move || closing.view.close(force)).await {
        Reply::Done { .. } => reply(admin(handle, AdminOp::ViewClose).await),
        refused => refused,
    }
}
