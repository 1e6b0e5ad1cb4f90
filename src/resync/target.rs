//! The shadow's side of the comparison: it asks, compares, and says what is to be repaired.
//!
//! Owns: the windows that are open. Invariants: a sector is compared or repaired only if no record after
//! the window's LSN has touched it on either side, looked at again when the repair is submitted; a window is
//! behind us only when the image has the records that did; what the primary sends is believed only where it was asked for and has the size that it must have.

use super::hash::{HashKey, Job, Product, UNKNOWN, window_root};
use super::leaves::{Leaves, Wanted};
use super::source::{Purpose, Task};
use super::touched::{Touched, whole};
use super::window::{Batch, Stage, Want, Window};
use super::{READING, extent_of, extents, part, runs};
use crate::format::compare::{Compare, EXTENT, EXTENT_LEAVES, LEAF, MAX_BATCH, Root};
use crate::units::{Extent, Lsn, SECTOR};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Batches of one window that are under way.
const MAX_BATCHES: usize = 32;
/// Bytes of leaves asked for and not yet repaired.
const ASKING: u64 = 16 << 20;

/// Sectors of a leaf to be written.
struct Repair {
    window: u32,
    leaf: usize,
    sectors: u8,
    bytes: Bytes,
}

/// A window that is done with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finished {
    /// Its number.
    pub window: u32,
    /// What it covered.
    pub extent: Extent,
    /// Leaves that differed.
    pub different: Vec<Extent>,
    /// Bytes that were not read, because the index knew them or nobody wanted them.
    pub skipped: u64,
    /// Roots of extents that are now known to be what both sides have.
    pub learned: Vec<(usize, Root)>,
    /// Extents of ours whose bytes are not what our index says was written.
    pub rotten: Vec<Extent>,
    /// The primary's likewise. Its bytes were not taken over.
    pub their_rotten: Vec<Extent>,
}

/// See the module's documentation.
pub struct Target {
    key: HashKey,
    /// Only compare.
    verify: bool,
    /// Its windows have this number at least; what comes of others was for a job before.
    first: u32,
    windows: BTreeMap<u32, Window>,
    /// Those that have an LSN which the image has not reached.
    waiting: BTreeSet<u32>,
    /// Those of which something is still to be read.
    unread: BTreeSet<u32>,
    /// Those that could ask for bytes if fewer were under way.
    hungry: BTreeSet<u32>,
    parts: VecDeque<(u32, u32, usize, Extent)>,
    repairs: VecDeque<Repair>,
    submitted: Vec<(u32, u64)>,
    reading: u64,
    asking: u64,
    finished: Vec<Finished>,
    /// Windows done with whose touched sectors may still be older here: where they start, and the record
    /// that ends that, once the primary has told it. Until then they count for nothing if the link breaks.
    closing: BTreeMap<u32, (u64, Option<Lsn>)>,
    /// Bytes repaired since the start.
    pub repaired: u64,
}

type Refusal = &'static str;

impl Target {
    /// Nothing is open. Windows will have the numbers from `first` on, which no other of this link had.
    pub fn new(key: HashKey, verify: bool, first: u32) -> Target {
        Target {
            key,
            verify,
            first,
            windows: BTreeMap::new(),
            waiting: BTreeSet::new(),
            unread: BTreeSet::new(),
            hungry: BTreeSet::new(),
            parts: VecDeque::new(),
            repairs: VecDeque::new(),
            submitted: Vec::new(),
            reading: 0,
            asking: 0,
            finished: Vec::new(),
            closing: BTreeMap::new(),
            repaired: 0,
        }
    }

    /// Windows open.
    pub fn open_windows(&self) -> usize {
        self.windows.len()
    }

    /// Their numbers.
    pub fn open_numbers(&self) -> Vec<u32> {
        self.windows.keys().copied().collect()
    }

    /// Every window is done with, and what was passed over in it has come by record.
    pub fn is_idle(&self) -> bool {
        self.windows.is_empty() && self.closing.is_empty()
    }

    /// The first byte of a window that is open, or whose touched sectors have not come by record.
    pub fn first_open(&self) -> Option<u64> {
        // They are opened in order.
        let open = self.windows.values().next().map(|w| w.extent.start());
        let closing = self.closing.values().next().map(|(start, _)| *start);
        open.into_iter().chain(closing).min()
    }

    /// Opens a window.
    pub fn open(&mut self, number: u32, extent: Extent, wanted: Vec<u8>, quick: bool, out: &mut Vec<Task>) {
        let window = Window {
            extent,
            touched: Touched::new(extent),
            lsn: None,
            quick,
            begun: false,
            roots: Vec::new(),
            leaves: Leaves::default(),
            skipped: 0,
            chunks: VecDeque::new(),
            wanted: Wanted::new(wanted.clone(), extents(extent)),
            indexed: Vec::new(),
            hashing: 0,
            theirs: None,
            their_rotten: Vec::new(),
            their_roots: Vec::new(),
            stage: Stage::Rooting,
            asked: Vec::new(),
            their_leaves: None,
            need: VecDeque::new(),
            batches: BTreeMap::new(),
            next_batch: 0,
            repairing: 0,
            different: Vec::new(),
        };
        self.windows.insert(number, window);
        out.push(Task::Say(Compare::Open { window: number, extent, wanted, quick }));
    }

    /// A record touches `extent`.
    pub fn touch(&mut self, lsn: Lsn, extent: Extent) {
        for w in self.windows.values_mut().filter(|w| w.lsn.is_some_and(|at| lsn > at)) {
            w.touched.touch(extent);
        }
    }

    /// Every record up to `lsn` is in the image, and none of them is being written: windows up to there
    /// begin. `index` is what the hash index knows of a window's extents now.
    pub fn applied(&mut self, lsn: Lsn, index: impl Fn(Extent) -> Vec<Root>, out: &mut Vec<Task>) {
        let at = |number: &u32| self.windows.get(number).and_then(|w| w.lsn);
        let ready: Vec<u32> =
            self.waiting.iter().copied().filter(|n| at(n).is_none_or(|at| at <= lsn)).collect();
        for number in ready {
            self.waiting.remove(&number);
            if let Some(w) = self.windows.get_mut(&number) {
                w.begin(index(w.extent));
                self.unread.insert(number);
            }
            self.pump(number, out);
        }
        self.closing.retain(|_, (_, upto)| upto.is_none_or(|upto| upto > lsn));
    }

    /// A word of the primary.
    pub fn heard(&mut self, word: Compare, out: &mut Vec<Task>) -> Result<(), Refusal> {
        const CLOSED: Refusal = "of a window that is not open";
        let number = word.window().unwrap_or(0);
        if number < self.first {
            return Ok(());
        }
        match word {
            Compare::At { window, lsn } => {
                let w = self.windows.get_mut(&window).ok_or(CLOSED)?;
                if w.lsn.replace(lsn).is_some() {
                    return Err("a window's LSN twice");
                }
                self.waiting.insert(window);
            }
            Compare::Root { window, touched, root, rotten } => {
                let w = self.windows.get_mut(&window).ok_or(CLOSED)?;
                let known = rotten.iter().all(|i| usize::from(*i) < w.wanted.len());
                if w.lsn.is_none() || touched.len() != w.wanted.len().div_ceil(8) || !known {
                    return Err("a root of another shape than was asked for");
                }
                if w.theirs.replace((touched, root)).is_some() {
                    return Err("a window's root twice");
                }
                w.their_rotten = rotten;
                self.compare_root(window, out);
            }
            Compare::Roots { window, roots } => {
                let w = self.windows.get_mut(&window).ok_or(CLOSED)?;
                if w.stage != Stage::Listing || roots.len() != w.wanted.len() {
                    return Err("roots of another shape than was asked for");
                }
                w.their_roots = roots;
                self.compare_roots(window, out);
            }
            Compare::Leaves { window, extents } => {
                let w = self.windows.get_mut(&window).ok_or(CLOSED)?;
                let fits = extents.iter().map(|e| e.index).eq(w.asked.iter().copied());
                if w.stage != Stage::Leafing || w.their_leaves.is_some() || !fits {
                    return Err("leaves that were not asked for");
                }
                w.their_leaves = Some(extents);
                self.compare_leaves(window, out);
            }
            Compare::Data { window, batch, touched, payload } => {
                let w = self.windows.get_mut(&window).ok_or(CLOSED)?;
                let extent = w.extent;
                let b = w.batches.get_mut(&batch).filter(|b| b.touched.is_none());
                let b = b.ok_or("bytes that were not asked for")?;
                if touched.len() != b.leaves.len() {
                    return Err("bytes of another shape than was asked for");
                }
                b.touched = Some(touched);
                let raw: u64 = b.leaves.iter().map(|(leaf, _)| leaf_len(extent, *leaf)).sum();
                out.push(Task::Work(
                    window,
                    Purpose::Batch(batch),
                    Job::Unpack(self.key, payload, raw as usize),
                ));
            }
            Compare::Closed { window, lsn } => {
                let closing = self.closing.get_mut(&window).filter(|(_, upto)| upto.is_none());
                closing.ok_or("the end of a window that was not closed")?.1 = Some(lsn);
            }
            _ => return Err("a word that a primary does not say"),
        }
        self.pump(number, out);
        Ok(())
    }

    /// The answer to a [`Task::Read`].
    pub fn read(
        &mut self,
        number: u32,
        purpose: Purpose,
        bytes: Bytes,
        out: &mut Vec<Task>,
    ) -> Result<(), Refusal> {
        let mut filled = Ok(());
        // What waits to be hashed is in memory, too.
        let work = matches!(purpose, Purpose::Hash(_)) && self.windows.contains_key(&number);
        if !work {
            self.reading -= bytes.len() as u64;
        }
        match (purpose, self.windows.get_mut(&number)) {
            (Purpose::Hash(_), Some(_)) => out.push(Task::Work(number, purpose, Job::Hash(self.key, bytes))),
            (Purpose::Leaves(batch, leaf), Some(w)) => {
                if let Some(b) = w.batches.get_mut(&batch) {
                    b.own.insert(leaf, bytes);
                    b.own_missing -= 1;
                    filled = self.fill(number, batch);
                }
            }
            _ => {}
        }
        self.pump(number, out);
        filled
    }

    /// The answer to a [`Task::Work`].
    pub fn worked(
        &mut self,
        number: u32,
        purpose: Purpose,
        product: Product,
        out: &mut Vec<Task>,
    ) -> Result<(), Refusal> {
        if let Product::Hashed(hashes) = &product {
            self.reading -= hashes.len;
        }
        match (purpose, product, self.windows.get_mut(&number)) {
            (Purpose::Hash(first), Product::Hashed(hashes), Some(w)) => {
                w.hashed(first, &hashes);
                self.compare_root(number, out);
                self.compare_leaves(number, out);
            }
            (Purpose::Batch(batch), Product::Unpacked(bytes), Some(w)) => {
                let bytes = bytes.ok_or("bytes that can't be unpacked to what was asked for")?;
                if let Some(b) = w.batches.get_mut(&batch) {
                    b.data = Some(bytes);
                    self.fill(number, batch)?;
                }
            }
            _ => {}
        }
        self.pump(number, out);
        Ok(())
    }

    /// Both roots are there: which extents have to be looked at closer?
    fn compare_root(&mut self, number: u32, out: &mut Vec<Task>) {
        let key = self.key;
        let Some(w) = self.windows.get_mut(&number) else { return };
        if w.stage != Stage::Rooting || !w.begun || w.hashing > 0 || !w.chunks.is_empty() {
            return;
        }
        let Some((touched, root)) = &w.theirs else { return };
        if window_root(&key, &w.roots, touched) == *root {
            let clean = w.touched.is_clean() && touched.iter().all(|b| *b == 0);
            let all = if clean { 0..0 } else { 0..w.wanted.len() };
            let doubtful = all.filter(|i| w.is_touched(*i)).map(|i| i as u16).collect();
            w.descend(number, doubtful, out);
            self.unread.insert(number);
        } else {
            w.stage = Stage::Listing;
            out.push(Task::Say(Compare::AskRoots { window: number }));
        }
    }

    fn compare_roots(&mut self, number: u32, out: &mut Vec<Task>) {
        let Some(w) = self.windows.get_mut(&number) else { return };
        let other = |i: &usize| w.wanted.has(*i) && (w.is_touched(*i) || w.roots[*i] != w.their_roots[*i]);
        let doubtful = (0..w.wanted.len()).filter(other).map(|i| i as u16).collect();
        w.descend(number, doubtful, out);
        self.unread.insert(number);
    }

    fn compare_leaves(&mut self, number: u32, _out: &mut Vec<Task>) {
        let verify = self.verify;
        let Some(w) = self.windows.get_mut(&number) else { return };
        let known = |i: &u16| w.leaves.has(usize::from(*i));
        if w.stage != Stage::Leafing || !w.asked.iter().all(known) {
            return;
        }
        let Some(theirs) = w.their_leaves.take() else { return };
        for extent in &theirs {
            w.compare_extent(extent, verify);
        }
        w.stage = Stage::Filling;
    }

    /// A batch's bytes are there, and ours where they have to be looked at.
    fn fill(&mut self, number: u32, batch: u32) -> Result<(), Refusal> {
        let Some(w) = self.windows.get_mut(&number) else { return Ok(()) };
        let there = |b: &&mut Batch| b.own_missing == 0 && b.touched.is_some() && b.data.is_some();
        if w.batches.get_mut(&batch).filter(there).is_none() {
            return Ok(());
        }
        let Some(Batch { leaves, own, touched: Some(touched), data: Some((bytes, hashes)), .. }) =
            w.batches.remove(&batch)
        else {
            return Ok(());
        };
        let mut at = 0;
        for (((leaf, want), touched), hash) in leaves.into_iter().zip(touched).zip(hashes) {
            let len = leaf_len(w.extent, leaf) as usize;
            let theirs = bytes.slice(at..at + len);
            at += len;
            let mut sectors = whole(w.extent, leaf) & !touched & !w.touched.leaf(leaf);
            match want {
                // What was written since may be in the bytes, and was not in the hash.
                Want::Other(said) if touched == 0 && hash != said => {
                    return Err("other bytes than those whose hash it gave");
                }
                Want::Other(_) => {}
                Want::Look => {
                    sectors &= own.get(&leaf).map_or(0xff, |own| differing(own, &theirs));
                    if sectors != 0 {
                        w.different.push(leaf);
                    }
                }
            }
            if sectors == 0 || self.verify {
                self.asking -= LEAF;
                continue;
            }
            w.repairing += 1;
            self.repairs.push_back(Repair { window: number, leaf, sectors, bytes: theirs });
        }
        Ok(())
    }

    /// Something waits to be repaired.
    pub fn has_repairs(&self) -> bool {
        !self.repairs.is_empty() && self.submitted.is_empty()
    }

    /// What to write now: disjoint extents in order, with their bytes (`None`: zeroes). Nobody may write
    /// a record into the image until [`Target::repaired`] is told.
    pub fn take_repairs(&mut self, most: u64) -> Vec<(Extent, Option<Bytes>)> {
        let mut batch = BTreeMap::new();
        let mut taken = 0;
        while taken < most
            && let Some(r) = self.repairs.pop_front()
        {
            taken += LEAF;
            self.submitted.push((r.window, LEAF));
            let Some(w) = self.windows.get(&r.window) else { continue };
            let sectors = r.sectors & !w.touched.leaf(r.leaf);
            let zero = r.bytes.iter().all(|b| *b == 0);
            for (first, count) in runs(8, 8, |i| sectors >> i & 1 == 1) {
                let leaf = w.extent.start() + r.leaf as u64 * LEAF;
                let (start, len) = (leaf + first as u64 * SECTOR, count as u64 * SECTOR);
                let from = first * SECTOR as usize;
                let bytes = (!zero).then(|| r.bytes.slice(from..from + len as usize));
                batch.insert(start, (len, bytes));
                self.repaired += len;
            }
        }
        join_zeroes(batch)
    }

    /// What was taken is in the image.
    pub fn written(&mut self, out: &mut Vec<Task>) {
        let written = std::mem::take(&mut self.submitted);
        for (window, len) in &written {
            self.asking -= len;
            if let Some(w) = self.windows.get_mut(window) {
                w.repairing -= 1;
            }
        }
        let windows: BTreeSet<u32> = written.into_iter().map(|(window, _)| window).collect();
        windows.into_iter().for_each(|number| self.pump(number, out));
    }

    /// Windows that are done with since the last call.
    pub fn take_finished(&mut self) -> Vec<Finished> {
        std::mem::take(&mut self.finished)
    }

    /// What may be done now, of this window and of those that wait for others.
    fn pump(&mut self, number: u32, out: &mut Vec<Task>) {
        self.begin_reads(out);
        self.compare_root(number, out);
        self.ask_data(number, out);
        self.finish(number, out);
        while self.may_ask()
            && let Some(hungry) = self.hungry.pop_first()
        {
            self.ask_data(hungry, out);
        }
    }

    /// There is room for one more batch.
    fn may_ask(&self) -> bool {
        self.asking + MAX_BATCH as u64 * LEAF <= ASKING
    }

    fn begin_reads(&mut self, out: &mut Vec<Task>) {
        while self.reading < READING {
            if let Some((window, batch, leaf, extent)) = self.parts.pop_front() {
                self.reading += extent.len();
                out.push(Task::Read(window, Purpose::Leaves(batch, leaf), extent));
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
            out.push(Task::Read(number, Purpose::Hash(first), extent));
        }
    }

    fn ask_data(&mut self, number: u32, out: &mut Vec<Task>) {
        while self.may_ask()
            && let Some(w) = self.windows.get_mut(&number).filter(|w| !w.need.is_empty())
            && w.batches.len() < MAX_BATCHES
        {
            let take = w.need.len().min(MAX_BATCH);
            let list: Vec<_> = w.need.drain(..take).collect();
            self.asking += list.len() as u64 * LEAF;
            let batch = w.next_batch;
            w.next_batch += 1;
            let mut asked: Vec<(u16, u16)> = Vec::new();
            for (leaf, want) in &list {
                match asked.last_mut() {
                    Some((first, n)) if usize::from(*first + *n) == *leaf => *n += 1,
                    _ => asked.push((*leaf as u16, 1)),
                }
                if *want == Want::Look {
                    let extent = part(w.extent, LEAF, *leaf, 1).expect("leaves lie in the window");
                    self.parts.push_back((number, batch, *leaf, extent));
                }
            }
            let own_missing = list.iter().filter(|(_, want)| *want == Want::Look).count();
            let b = Batch { leaves: list, own: BTreeMap::new(), own_missing, touched: None, data: None };
            w.batches.insert(batch, b);
            out.push(Task::Say(Compare::AskData { window: number, batch, runs: asked }));
        }
        if self.windows.get(&number).is_some_and(|w| !w.need.is_empty() && w.batches.len() < MAX_BATCHES) {
            self.hungry.insert(number);
        }
        if self.reading < READING && !self.parts.is_empty() {
            self.begin_reads(out);
        }
    }

    fn finish(&mut self, number: u32, out: &mut Vec<Task>) {
        let done = |w: &Window| {
            w.stage == Stage::Filling && w.need.is_empty() && w.batches.is_empty() && w.repairing == 0
        };
        if !self.windows.get(&number).is_some_and(done) {
            return;
        }
        let Some(mut w) = self.windows.remove(&number) else { return };
        w.different.sort_unstable();
        let different = runs_of(&w.different);
        let same = |i: &usize| {
            let first = w.different.partition_point(|leaf| leaf / EXTENT_LEAVES < *i);
            let other = w.different.get(first).is_some_and(|leaf| leaf / EXTENT_LEAVES == *i);
            !other && !w.touched.is_touched(*i)
        };
        let rotten = |i: &usize| {
            let other = w.indexed[*i] != UNKNOWN && w.roots[*i] != w.indexed[*i];
            other && !w.touched.is_touched(*i)
        };
        self.finished.push(Finished {
            window: number,
            extent: w.extent,
            different: different.iter().filter_map(|(f, n)| part(w.extent, LEAF, *f, *n)).collect(),
            skipped: w.skipped,
            learned: w.leaves.read().filter(same).map(|i| (i, w.roots[i])).collect(),
            rotten: w.leaves.read().filter(rotten).filter_map(|i| extent_of(w.extent, i)).collect(),
            their_rotten: w.their_rotten.iter().filter_map(|i| extent_of(w.extent, (*i).into())).collect(),
        });
        self.closing.insert(number, (w.extent.start(), None));
        out.push(Task::Say(Compare::Close { window: number }));
    }

    /// What the oldest window waits for.
    pub fn waits_for(&self) -> Option<&'static str> {
        let Some(w) = self.windows.values().next() else {
            let (_, upto) = self.closing.values().next()?;
            return Some(if upto.is_none() { "the link" } else { "writes to be applied" });
        };
        Some(match w.stage {
            _ if w.lsn.is_none() => "the link",
            _ if !w.begun => "writes to be applied",
            Stage::Rooting if !w.chunks.is_empty() || w.hashing > 0 => "the shadow's disk",
            Stage::Rooting => "the primary's disk",
            Stage::Listing | Stage::Leafing => "the link",
            Stage::Filling if w.repairing > 0 => "the shadow's disk",
            Stage::Filling => "the link",
        })
    }
}

fn leaf_len(window: Extent, leaf: usize) -> u64 {
    (window.len() - leaf as u64 * LEAF).min(LEAF)
}

/// Runs of numbers that follow each other: (first, how many).
fn runs_of(sorted: &[usize]) -> Vec<(usize, usize)> {
    let chunks = sorted.chunk_by(|a, b| a + 1 == *b || a == b);
    chunks.map(|c| (c[0], c[c.len() - 1] - c[0] + 1)).collect()
}

/// The sectors in which two leaves differ.
fn differing(a: &[u8], b: &[u8]) -> u8 {
    let sector = SECTOR as usize;
    let pairs = a.chunks(sector).zip(b.chunks(sector)).enumerate();
    pairs.filter(|(_, (a, b))| a != b).fold(0, |bits, (i, _)| bits | 1 << i)
}

/// Zeroes that lie side by side are one range: a hole is punched at once.
fn join_zeroes(batch: BTreeMap<u64, (u64, Option<Bytes>)>) -> Vec<(Extent, Option<Bytes>)> {
    let mut joined: Vec<(u64, u64, Option<Bytes>)> = Vec::new();
    for (start, (len, bytes)) in batch {
        match joined.last_mut() {
            Some((s, l, None)) if bytes.is_none() && *s + *l == start => *l += len,
            _ => joined.push((start, len, bytes)),
        }
    }
    joined.into_iter().filter_map(|(s, l, bytes)| Some((Extent::between(s, s + l)?, bytes))).collect()
}
