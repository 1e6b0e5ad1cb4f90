//! The primary's side of the comparison: it reads, hashes and answers.
//!
//! Owns: the windows that one shadow has open here. Invariants: whatever a shadow asks, at most
//! [`MAX_OPEN`] windows are remembered and at most [`READING`] bytes (and one batch) are being read; an
//! answer carries the touched sectors as they are when it is given, so they include every write that may
//! be in its bytes.

use super::hash::{HashKey, Hashes, Job, Product, UNKNOWN, window_root};
use super::leaves::{Leaves, Wanted};
use super::touched::Touched;
use super::{CHUNK, MAX_OPEN, READING, extents, leaves, part, runs};
use crate::format::compare::{Compare, EXTENT, EXTENT_LEAVES, ExtentLeaves, LEAF, MAX_BATCH, Root, Run};
use crate::units::{Extent, Lsn};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What a read or a piece of work is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// To hash: extents from this one on.
    Hash(usize),
    /// Part of a batch of leaves.
    Leaves(u32, usize),
    /// All of a batch.
    Batch(u32),
}

/// What the machine asks for.
#[derive(Debug)]
pub enum Task {
    /// Read this of the image; answer with [`Source::read`] and the number.
    Read(u32, Purpose, Extent),
    /// Do this; answer with [`Source::worked`] and the number.
    Work(u32, Purpose, Job),
    /// Say this.
    Say(Compare),
    /// The extents (by number) of this window have these roots now.
    Learn(Extent, Vec<(usize, Root)>),
    /// Say [`Compare::Closed`] of this window once everything that was accepted is in records.
    Cover(u32),
}

struct Batch {
    parts: Vec<Bytes>,
    missing: usize,
    leaves: Vec<usize>,
}

struct Window {
    /// Its own number, for reads and work: a shadow may give one of its numbers to several windows in turn.
    id: u32,
    extent: Extent,
    touched: Touched,
    wanted: Wanted,
    /// Roots that are known; the index's until the bytes are read.
    roots: Vec<Root>,
    /// Those of the index.
    indexed: Vec<Root>,
    rotten: Vec<u16>,
    leaves: Leaves,
    /// Reads to be hashed that are wanted and not begun: (first extent, how many).
    chunks: VecDeque<(usize, usize)>,
    /// Reads and hashings under way.
    hashing: usize,
    rooted: bool,
    asked_roots: bool,
    asked_leaves: Option<Vec<u16>>,
    batches: BTreeMap<u32, Batch>,
}

/// See the module's documentation.
pub struct Source {
    key: HashKey,
    windows: BTreeMap<u32, Window>,
    /// Parts of batches to be read: window's id, batch, part.
    parts: VecDeque<(u32, u32, usize, Extent)>,
    reading: u64,
    /// Windows opened so far.
    opened: u32,
    /// Numbers of those of which something is still to be read.
    unread: BTreeSet<u32>,
}

type Refusal = &'static str;

impl Source {
    /// No window is open.
    pub fn new(key: HashKey) -> Source {
        Source {
            key,
            windows: BTreeMap::new(),
            parts: VecDeque::new(),
            reading: 0,
            opened: 0,
            unread: BTreeSet::new(),
        }
    }

    /// No window is open.
    pub fn is_idle(&self) -> bool {
        self.windows.is_empty()
    }

    /// Opens a window at `lsn`, the journal's tail. `newer` are the accepted writes that are not in
    /// records up to it, `indexed` what the hash index knows of the window's extents.
    #[expect(clippy::too_many_arguments, reason = "what the message says, and what the node knows")]
    pub fn open(
        &mut self,
        number: u32,
        extent: Extent,
        wanted: &[u8],
        quick: bool,
        lsn: Lsn,
        newer: impl Iterator<Item = Extent>,
        indexed: Vec<Root>,
        out: &mut Vec<Task>,
    ) -> Result<(), Refusal> {
        if self.windows.len() >= MAX_OPEN || self.windows.contains_key(&number) {
            return Err("more windows than it may open");
        }
        let count = extents(extent);
        let wanted = Wanted::new(wanted.to_vec(), count);
        let mut touched = Touched::new(extent);
        newer.for_each(|e| touched.touch(e));
        let chunks = wanted.reads(quick, &indexed);
        self.opened = self.opened.wrapping_add(1);
        let window = Window {
            id: self.opened,
            extent,
            touched,
            roots: if quick { wanted.only(indexed.clone()) } else { vec![UNKNOWN; count] },
            indexed,
            wanted,
            rotten: Vec::new(),
            leaves: Leaves::default(),
            chunks,
            hashing: 0,
            rooted: false,
            asked_roots: false,
            asked_leaves: None,
            batches: BTreeMap::new(),
        };
        self.windows.insert(number, window);
        self.unread.insert(number);
        out.push(Task::Say(Compare::At { window: number, lsn }));
        self.pump(out);
        self.answer_root(number, out);
        Ok(())
    }

    /// A write was accepted.
    pub fn touch(&mut self, extent: Extent) {
        self.windows.values_mut().for_each(|w| w.touched.touch(extent));
    }

    /// A word of the shadow about an open window.
    pub fn heard(&mut self, word: &Compare, out: &mut Vec<Task>) -> Result<(), Refusal> {
        match word {
            Compare::AskRoots { window } => {
                let w = self.windows.get_mut(window).ok_or("a window that is not open")?;
                if !w.rooted || std::mem::replace(&mut w.asked_roots, true) {
                    return Err("roots out of turn");
                }
                out.push(Task::Say(Compare::Roots { window: *window, roots: w.roots.clone() }));
            }
            Compare::AskLeaves { window, extents } => {
                let w = self.windows.get_mut(window).ok_or("a window that is not open")?;
                let known = |i: &u16| w.wanted.has(usize::from(*i));
                let ascending = extents.windows(2).all(|p| p[0] < p[1]);
                if !w.rooted || w.asked_leaves.is_some() || !ascending || !extents.iter().all(known) {
                    return Err("leaves that it can't ask for");
                }
                let lacking = |i: usize| extents.binary_search(&(i as u16)).is_ok() && !w.leaves.has(i);
                w.chunks.extend(runs(w.wanted.len(), (CHUNK / EXTENT) as usize, lacking));
                w.asked_leaves = Some(extents.clone());
                self.unread.insert(*window);
                self.answer_leaves(*window, out);
            }
            Compare::AskData { window, batch, runs } => self.ask_data(*window, *batch, runs)?,
            Compare::Close { window } => {
                let w = self.windows.remove(window).ok_or("a window that is not open")?;
                self.parts.retain(|(id, ..)| *id != w.id);
                out.push(Task::Learn(w.extent, w.learned().collect()));
                let clean = w.touched.is_clean();
                let closed = Compare::Closed { window: *window, lsn: Lsn(0) };
                out.push(if clean { Task::Say(closed) } else { Task::Cover(*window) });
            }
            _ => return Err("a word that a shadow does not say"),
        }
        self.pump(out);
        Ok(())
    }

    fn ask_data(&mut self, window: u32, batch: u32, asked: &[Run]) -> Result<(), Refusal> {
        let w = self.windows.get_mut(&window).ok_or("a window that is not open")?;
        let mut list = Vec::new();
        for (first, count) in asked {
            let (first, count) = (usize::from(*first), usize::from(*count));
            let fits = count > 0 && first + count <= leaves(w.extent) && list.len() + count <= MAX_BATCH;
            if !fits || list.last().is_some_and(|last| *last >= first) {
                return Err("leaves that it can't ask for");
            }
            list.extend(first..first + count);
        }
        if list.is_empty() || w.batches.contains_key(&batch) || w.batches.len() >= 64 {
            return Err("a batch that it can't ask for");
        }
        for (i, (first, count)) in asked.iter().enumerate() {
            let extent = part(w.extent, LEAF, usize::from(*first), usize::from(*count));
            self.parts.push_back((w.id, batch, i, extent.expect("bounds were checked")));
        }
        let parts = vec![Bytes::new(); asked.len()];
        w.batches.insert(batch, Batch { parts, missing: asked.len(), leaves: list });
        Ok(())
    }

    /// The answer to a [`Task::Read`].
    pub fn read(&mut self, id: u32, purpose: Purpose, bytes: Bytes, out: &mut Vec<Task>) {
        let window = self.windows.values_mut().find(|w| w.id == id);
        // What waits to be hashed is in memory, too.
        let work = matches!(purpose, Purpose::Hash(_)) && window.is_some();
        if !work {
            self.reading -= bytes.len() as u64;
        }
        if let Some(w) = window {
            match purpose {
                Purpose::Hash(_) => {
                    out.push(Task::Work(id, purpose, Job::Hash(self.key, bytes)));
                }
                Purpose::Leaves(batch, i) => {
                    if let Some(b) = w.batches.get_mut(&batch) {
                        b.parts[i] = bytes;
                        b.missing -= 1;
                        if b.missing == 0 {
                            let job = Job::Pack(std::mem::take(&mut b.parts));
                            out.push(Task::Work(id, Purpose::Batch(batch), job));
                        }
                    }
                }
                Purpose::Batch(_) => {}
            }
        }
        self.pump(out);
    }

    /// A read failed, whose bytes nobody will see.
    pub fn unreadable(&mut self, len: u64) {
        self.reading -= len;
    }

    /// The answer to a [`Task::Work`].
    pub fn worked(&mut self, id: u32, purpose: Purpose, product: Product, out: &mut Vec<Task>) {
        if let Product::Hashed(hashes) = &product {
            self.reading -= hashes.len;
        }
        if let Some((&number, w)) = self.windows.iter_mut().find(|(_, w)| w.id == id) {
            match (purpose, product) {
                (Purpose::Hash(first), Product::Hashed(hashes)) => {
                    w.hashed(first, &hashes);
                    self.answer_root(number, out);
                    self.answer_leaves(number, out);
                }
                (Purpose::Batch(batch), Product::Packed(payload)) => {
                    if let Some(b) = w.batches.remove(&batch) {
                        let touched = b.leaves.iter().map(|leaf| w.touched.leaf(*leaf)).collect();
                        out.push(Task::Say(Compare::Data { window: number, batch, touched, payload }));
                    }
                }
                _ => {}
            }
        }
        self.pump(out);
    }

    fn answer_root(&mut self, number: u32, out: &mut Vec<Task>) {
        let Some(w) = self.windows.get_mut(&number) else { return };
        if w.rooted || w.hashing > 0 || !w.chunks.is_empty() {
            return;
        }
        w.rooted = true;
        let touched = w.wanted.of(w.touched.extents());
        let root = window_root(&self.key, &w.roots, &touched);
        let rotten = w.rotten.clone();
        out.push(Task::Say(Compare::Root { window: number, touched, root, rotten }));
    }

    fn answer_leaves(&mut self, number: u32, out: &mut Vec<Task>) {
        let Some(w) = self.windows.get_mut(&number) else { return };
        let whole = |list: &Vec<u16>| list.iter().all(|i| w.leaves.has(usize::from(*i)));
        let Some(list) = w.asked_leaves.take_if(|list| whole(list)) else { return };
        let leaves = |i: &u16| {
            let first = usize::from(*i) * EXTENT_LEAVES;
            let hash = |n| w.leaves.hash(first + n);
            ExtentLeaves {
                index: *i,
                touched: w.touched.extent(usize::from(*i)),
                hashes: std::array::from_fn(hash),
                rotten: w.rotten.contains(i),
            }
        };
        let extents = list.iter().map(leaves).collect();
        out.push(Task::Say(Compare::Leaves { window: number, extents }));
    }

    /// Begins what may be read now: first what completes windows.
    fn pump(&mut self, out: &mut Vec<Task>) {
        while self.reading < READING {
            if let Some((id, batch, i, extent)) = self.parts.pop_front() {
                self.reading += extent.len();
                out.push(Task::Read(id, Purpose::Leaves(batch, i), extent));
                continue;
            }
            let Some(&number) = self.unread.first() else { break };
            let window = self.windows.get_mut(&number);
            let Some((w, (first, count))) = window.and_then(|w| w.chunks.pop_front().map(|c| (w, c))) else {
                self.unread.remove(&number);
                continue;
            };
            w.hashing += 1;
            let extent = part(w.extent, EXTENT, first, count).expect("chunks lie in the window");
            self.reading += extent.len();
            out.push(Task::Read(w.id, Purpose::Hash(first), extent));
        }
    }
}

impl Window {
    /// Extents that were read and not written since the window was opened.
    fn learned(&self) -> impl Iterator<Item = (usize, Root)> {
        let read = self.leaves.read().map(|i| (i, self.roots[i]));
        read.filter(|(i, _)| !self.touched.is_touched(*i) && !self.rotten.contains(&(*i as u16)))
    }

    fn hashed(&mut self, first: usize, hashes: &Hashes) {
        self.hashing -= 1;
        self.leaves.put(self.extent, first, hashes);
        for (i, root) in (first..).zip(&hashes.roots) {
            self.roots[i] = *root;
            let other = self.indexed[i] != UNKNOWN && self.indexed[i] != *root;
            if other && !self.touched.is_touched(i) {
                self.rotten.push(i as u16);
            }
        }
    }
}
