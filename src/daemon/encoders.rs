//! Compression and hashing: small jobs here and now, large ones on threads of their own.
//!
//! Owns: the worker threads, and other work that may take long (name look-ups). Invariant: every
//! job comes back exactly once, in any order; the loop is woken for it.

use crate::disk::Token;
use crate::format::record::{Compressor, EncodeJob, Encoded, encode, room};
use crate::resync::hash::{self as compare, Product};
use crate::sys::wake::Waker;
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::thread::JoinHandle;

/// Largest payload that is encoded on the loop's own thread: cheaper than a thread's wake-up.
const INLINE: usize = 64 << 10;

enum Job {
    Encode(Token, EncodeJob),
    Compare(Token, compare::Job),
    Resolve(usize, String),
}

/// What comes back from the threads.
#[derive(Debug)]
pub(super) enum Finished {
    Encoded(Token, Encoded),
    Compared(Token, Product),
    /// The addresses of the peer with this index, in the order to try them.
    Resolved(usize, io::Result<Vec<SocketAddr>>),
}

/// The threads and the queues to and from them.
pub(super) struct Encoders {
    jobs: Option<Sender<Job>>,
    /// Look-ups block for seconds: they have a thread of their own.
    names: Option<Sender<Job>>,
    finished: Receiver<Finished>,
    threads: Vec<JoinHandle<()>>,
    compressor: Compressor,
}

impl Encoders {
    /// Starts `workers` threads; with none, every job is done on the loop's thread.
    pub fn start(workers: usize, waker: &Arc<Waker>) -> io::Result<Encoders> {
        let (back, finished) = unbounded();
        let (mut jobs, mut names, mut threads) = (None, None, Vec::new());
        let mut spawn = |name: String, queue: Receiver<Job>| -> io::Result<()> {
            let (back, waker) = (back.clone(), waker.clone());
            threads.push(std::thread::Builder::new().name(name).spawn(move || work(&queue, &back, &waker))?);
            Ok(())
        };
        if workers > 0 {
            let (to, from) = unbounded();
            for n in 0..workers {
                spawn(format!("encode-{n}"), from.clone())?;
            }
            jobs = Some(to);
        }
        let (to, from) = unbounded();
        spawn("resolve".into(), from)?;
        names.replace(to);
        Ok(Encoders { jobs, names, finished, threads, compressor: Compressor::default() })
    }

    /// Encodes a small payload at once; hands a large one to a thread.
    pub fn encode(&mut self, token: Token, job: EncodeJob) -> Option<Encoded> {
        let payload = job.buf.len().saturating_sub(room(job.extents.len()));
        if payload > INLINE
            && let Some(jobs) = &self.jobs
        {
            // The threads hold the other end for as long as this end lives.
            let sent = jobs.send(Job::Encode(token, job));
            debug_assert!(sent.is_ok());
            return None;
        }
        Some(encode(job, &mut self.compressor))
    }

    /// Likewise for a comparison, whose jobs are large: these threads come after the records' work only
    /// as far as the queue is fair.
    pub fn compare(&mut self, token: Token, job: compare::Job) -> Option<Product> {
        if job.len() > INLINE
            && let Some(jobs) = &self.jobs
        {
            let sent = jobs.send(Job::Compare(token, job));
            debug_assert!(sent.is_ok());
            return None;
        }
        Some(job.run())
    }

    /// Looks a peer's name up.
    pub fn resolve(&self, peer: usize, name: String) {
        if let Some(names) = &self.names {
            let sent = names.send(Job::Resolve(peer, name));
            debug_assert!(sent.is_ok());
        }
    }

    /// Something that a thread finished.
    pub fn finished(&self) -> Option<Finished> {
        self.finished.try_recv().ok()
    }

    /// Nothing has come back.
    pub fn is_idle(&self) -> bool {
        self.finished.is_empty()
    }
}

impl Drop for Encoders {
    fn drop(&mut self) {
        self.jobs = None;
        self.names = None;
        for thread in self.threads.drain(..) {
            // A name server's silence must not hold up the end of the process.
            if thread.thread().name() != Some("resolve") {
                let _ = thread.join();
            }
        }
    }
}

fn work(jobs: &Receiver<Job>, back: &Sender<Finished>, waker: &Waker) {
    let mut compressor = Compressor::default();
    for job in jobs {
        let finished = match job {
            Job::Encode(token, job) => Finished::Encoded(token, encode(job, &mut compressor)),
            Job::Compare(token, job) => Finished::Compared(token, job.run()),
            Job::Resolve(peer, name) => {
                Finished::Resolved(peer, name.to_socket_addrs().map(|addresses| addresses.collect()))
            }
        };
        if back.send(finished).is_err() {
            return;
        }
        waker.wake();
    }
}
