//! A group in memory: one thread that takes block requests in order and answers them out of order.
//!
//! Owns: the counts of what arrived, and the means to hold answers back or fail requests.

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use volrep::disk::IoError;
use volrep::front::Submit;
use volrep::node::event::Op;
use volrep::units::Extent;

type Answer = Result<Bytes, IoError>;
type Done = Box<dyn FnOnce(Answer) + Send>;

/// The group.
pub struct MemoryGroup {
    queue: Sender<(Op, Done)>,
    state: Arc<State>,
}

struct State {
    data: Mutex<Vec<u8>>,
    held: Mutex<Held>,
    more_held: Condvar,
    failure: AtomicI32,
    reads: AtomicUsize,
    writes: AtomicUsize,
    fua: AtomicUsize,
    flushes: AtomicUsize,
    zeroes: AtomicUsize,
}

/// What is not answered for now.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub enum Hold {
    #[default]
    Nothing,
    Writes,
    Flushes,
}

#[derive(Default)]
struct Held {
    hold: Hold,
    answers: Vec<(Done, Answer)>,
}

#[allow(dead_code, reason = "each test program uses its part")]
impl MemoryGroup {
    pub fn new(size: u64) -> Arc<MemoryGroup> {
        let state = Arc::new(State {
            data: Mutex::new(vec![0; size as usize]),
            held: Mutex::default(),
            more_held: Condvar::new(),
            failure: AtomicI32::new(0),
            reads: AtomicUsize::new(0),
            writes: AtomicUsize::new(0),
            fua: AtomicUsize::new(0),
            flushes: AtomicUsize::new(0),
            zeroes: AtomicUsize::new(0),
        });
        let (queue, requests) = unbounded();
        let worker = state.clone();
        std::thread::spawn(move || worker.run(&requests));
        Arc::new(MemoryGroup { queue, state })
    }
    pub fn size(&self) -> u64 {
        self.state.data.lock().unwrap().len() as u64
    }
    pub fn bytes(&self, offset: u64, len: u64) -> Vec<u8> {
        self.state.data.lock().unwrap()[offset as usize..(offset + len) as usize].to_vec()
    }
    pub fn reads(&self) -> usize {
        self.state.reads.load(SeqCst)
    }
    pub fn writes(&self) -> usize {
        self.state.writes.load(SeqCst)
    }
    pub fn fua(&self) -> usize {
        self.state.fua.load(SeqCst)
    }
    pub fn flushes(&self) -> usize {
        self.state.flushes.load(SeqCst)
    }
    pub fn zeroes(&self) -> usize {
        self.state.zeroes.load(SeqCst)
    }
    /// Every request but reads fails with this errno; 0: none does.
    pub fn fail_with(&self, errno: i32) {
        self.state.failure.store(errno, SeqCst);
    }
    /// Keeps back the answers to these requests.
    pub fn hold(&self, hold: Hold) {
        self.state.held.lock().unwrap().hold = hold;
    }
    /// Waits until that many answers are kept back.
    pub fn wait_held(&self, count: usize) {
        let held = self.state.held.lock().unwrap();
        let limit = std::time::Duration::from_secs(30);
        let (held, _) =
            self.state.more_held.wait_timeout_while(held, limit, |h| h.answers.len() < count).unwrap();
        assert!(held.answers.len() >= count, "only {} requests in flight together", held.answers.len());
    }
    /// Gives the answers that were kept back, and keeps no more.
    pub fn let_go(&self) {
        let held = std::mem::take(&mut *self.state.held.lock().unwrap());
        held.answers.into_iter().for_each(|(done, answer)| done(answer));
    }
}

impl Submit for MemoryGroup {
    fn submit(&self, op: Op, done: Done) {
        self.queue.send((op, done)).unwrap();
    }
}

impl State {
    /// Ends with the last sender.
    fn run(&self, requests: &Receiver<(Op, Done)>) {
        let mut random = 0x9E37_79B9_7F4A_7C15u64;
        while let Ok(first) = requests.recv() {
            let batch = std::iter::once(first).chain(requests.try_iter());
            let mut answers: Vec<_> = batch.filter_map(|(op, done)| self.take(op, done)).collect();
            while !answers.is_empty() {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let (done, answer) = answers.swap_remove(random as usize % answers.len());
                done(answer);
            }
        }
    }

    /// Executes a request; its answer, unless that is kept back.
    fn take(&self, op: Op, done: Done) -> Option<(Done, Answer)> {
        let kind = match op {
            Op::Write { .. } => Hold::Writes,
            Op::Flush => Hold::Flushes,
            Op::Read(_) | Op::Zero { .. } => Hold::Nothing,
        };
        let answer = self.execute(op);
        let mut held = self.held.lock().unwrap();
        if kind != Hold::Nothing && held.hold == kind {
            held.answers.push((done, answer));
            self.more_held.notify_all();
            return None;
        }
        Some((done, answer))
    }

    fn execute(&self, op: Op) -> Answer {
        let range = |extent: Extent| extent.start() as usize..extent.end() as usize;
        let mut data = self.data.lock().unwrap();
        if let Op::Read(extent) = op {
            self.reads.fetch_add(1, SeqCst);
            return Ok(Bytes::copy_from_slice(&data[range(extent)]));
        }
        match self.failure.load(SeqCst) {
            0 => {}
            errno => return Err(IoError { errno }),
        }
        match op {
            Op::Read(_) => unreachable!(),
            Op::Write { extent, data: new, fua } => {
                new.copy(&mut data[range(extent)])?;
                self.writes.fetch_add(1, SeqCst);
                self.fua.fetch_add(usize::from(fua), SeqCst);
            }
            Op::Zero { extent, fua } => {
                data[range(extent)].fill(0);
                self.zeroes.fetch_add(1, SeqCst);
                self.fua.fetch_add(usize::from(fua), SeqCst);
            }
            Op::Flush => {
                self.flushes.fetch_add(1, SeqCst);
            }
        }
        Ok(Bytes::new())
    }
}
