//! Memory that outlives a simulated process: the write cache's ring and the dirty maps.
//!
//! Owns: what a kill keeps and what a power cut loses of it. Invariant: what a completed sync covered
//! is there after a power cut; any other page is its synced or its last content.
//!
//! A node owns its memory while it lives. What a sync covers is copied lazily, just before the next
//! mutable access, so the simulator never looks at memory that a node has borrowed.

use crate::prng::Prng;
use std::sync::{Arc, Mutex, MutexGuard};
use volrep::disk::Memory;

const PAGE: usize = 4096;

#[derive(Default)]
struct Inner {
    /// The content while no node has it.
    parked: Vec<u8>,
    /// What the last completed sync covered.
    synced: Vec<u8>,
    /// Syncs that cover the content as it is now.
    wanted: Option<u64>,
    /// The content that each sync up to this number covers.
    copies: Vec<(u64, Vec<u8>)>,
    completed: u64,
    next: u64,
}

impl Inner {
    fn copy(&mut self, data: &[u8]) {
        if let Some(last) = self.wanted.take() {
            self.copies.push((last, data.to_vec()));
        }
    }
    fn settle(&mut self) {
        if let Some(at) = self.copies.iter().position(|(last, _)| *last >= self.completed)
            && self.completed > 0
        {
            self.synced.clone_from(&self.copies[at].1);
            self.copies.drain(..at);
        }
    }
}

/// The place where the memory rests between processes.
#[derive(Clone)]
pub struct Slot(Arc<Mutex<Inner>>);

impl Slot {
    /// `len` zeroes, synced.
    pub fn new(len: usize) -> Slot {
        Slot::of(vec![0; len], vec![0; len])
    }
    /// `len` zeroes in memory: no sync is asked of it, and a power cut leaves nothing of it.
    pub fn volatile(len: usize) -> Slot {
        Slot::of(vec![0; len], Vec::new())
    }
    fn of(parked: Vec<u8>, synced: Vec<u8>) -> Slot {
        Slot(Arc::new(Mutex::new(Inner { parked, synced, next: 1, ..Inner::default() })))
    }
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("one thread")
    }
    /// Hands the memory to a node.
    pub fn lend(&self) -> Box<dyn Memory> {
        Box::new(Lent { data: std::mem::take(&mut self.inner().parked), slot: self.clone() })
    }
    /// A sync begins: it covers the content as it is now.
    pub fn sync(&self) -> u64 {
        let mut inner = self.inner();
        let id = inner.next;
        inner.next += 1;
        inner.wanted = Some(id);
        id
    }
    /// That sync is done.
    pub fn synced(&self, id: u64) {
        let mut inner = self.inner();
        inner.completed = inner.completed.max(id);
        inner.settle();
    }
    /// Power is lost; the node is gone already.
    pub fn power_loss(&self, rng: &mut Prng) {
        let mut inner = self.inner();
        inner.settle();
        let inner = &mut *inner;
        for (page, synced) in inner.parked.chunks_mut(PAGE).zip(inner.synced.chunks(PAGE)) {
            if page != synced && rng.permille(500) {
                page.copy_from_slice(synced);
            }
        }
        inner.synced.clone_from(&inner.parked);
        inner.copies.clear();
        (inner.wanted, inner.completed) = (None, 0);
    }
    /// The content while no node has it.
    pub fn content(&self) -> Vec<u8> {
        self.inner().parked.clone()
    }
    /// Back to a copy, durably.
    pub fn restore(&self, copy: &[u8]) {
        let mut inner = self.inner();
        (inner.parked, inner.synced) = (copy.to_vec(), copy.to_vec());
        inner.copies.clear();
    }
    /// Back to zeroes: it lived in memory and the power was cut.
    pub fn clear(&self) {
        let mut inner = self.inner();
        inner.synced.fill(0);
        inner.copies.clear();
        let len = inner.parked.len();
        inner.parked = Vec::new(); // most of fresh zeroes is never touched
        inner.parked = vec![0; len];
    }
}

struct Lent {
    data: Vec<u8>,
    slot: Slot,
}

impl Memory for Lent {
    fn bytes(&self) -> &[u8] {
        &self.data
    }
    fn bytes_mut(&mut self) -> &mut [u8] {
        self.slot.inner().copy(&self.data);
        &mut self.data
    }
    fn publish(&mut self, at: usize, word: u64) {
        assert!(at.is_multiple_of(8), "publish at {at}");
        self.slot.inner().copy(&self.data);
        self.data[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // A poisoned lock here means that the run has failed already; nothing to save.
        if let Ok(mut inner) = self.slot.0.lock() {
            inner.copy(&self.data);
            inner.settle();
            inner.parked = std::mem::take(&mut self.data);
        }
    }
}

/// A completed sync's content survives; a later change may or may not.
pub fn check() {
    let mut seen = [false; 2];
    for seed in 0..64 {
        let slot = Slot::new(2 * PAGE);
        let mut lent = slot.lend();
        lent.bytes_mut()[0] = 1;
        let first = slot.sync();
        lent.publish(8, 2);
        slot.synced(first);
        lent.bytes_mut()[PAGE] = 3;
        let second = slot.sync();
        lent.publish(PAGE + 8, 4);
        drop(lent);
        if seed % 2 == 0 {
            slot.synced(second);
        }
        slot.power_loss(&mut Prng::new(seed));
        let lent = slot.lend();
        let b = lent.bytes();
        assert_eq!(b[0], 1, "covered by the first sync");
        assert!(seed % 2 == 1 || b[PAGE] == 3, "covered by the second sync");
        seen[usize::from(b[8] == 2)] = true;
        assert!(b[PAGE + 8] != 4 || b[PAGE] == 3, "a page is of one moment");
    }
    assert_eq!(seen, [true; 2], "an uncovered change is sometimes kept, sometimes lost");
}
