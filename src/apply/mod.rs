//! Putting batches of writes into the backing: write-back on a primary, apply on a shadow, redo.
//!
//! Owns: the requests to the backing that change it. Invariants: one batch at a time, so writes that
//! overlap are never in flight together (I2); a batch counts as applied only when all of it is in the
//! backing; a checkpoint counts only after the sync of every backing that was written (I3); a failed
//! write or sync latches (I10), until another target is chosen.
//!
//! `stage` is the other target: what a resync makes, until it is shown. `backlog` knows what the journal holds and the
//! image lacks, for those who don't wait for it.

pub mod backlog;
pub mod stage;

use crate::disk::{DiskOp, DiskRequest, DiskResult, File, IoError, Token, aligned, freeze};
use crate::extents::Piece;
use crate::units::{BLOCK, Extent};
use bytes::Bytes;
use std::collections::{BTreeSet, VecDeque};

/// Where the bytes of an extent are.
#[derive(Clone, Debug)]
pub enum Source {
    /// There are none: zeroes.
    Zeroes,
    /// In the write cache's ring, at this position; they stay until the batch is done.
    Ring(u64),
    /// Here.
    Bytes(Bytes),
}

impl Piece for Source {
    fn skip(&self, bytes: u64) -> Source {
        match self {
            Source::Zeroes => Source::Zeroes,
            Source::Ring(at) => Source::Ring(at + bytes),
            Source::Bytes(b) => Source::Bytes(b.slice(bytes as usize..)),
        }
    }
}

/// Writes in flight at once.
const DEPTH: usize = 32;
/// Adjacent writes are joined up to this many bytes.
const JOINED: u64 = 256 << 10;

/// What an answer brought about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// Nothing yet.
    More,
    /// The batch is in the backing.
    Applied,
    /// Everything applied before the sync began is durable.
    Synced,
}

/// See the module's documentation.
pub struct Applier {
    owner: u8,
    queue: VecDeque<(Extent, Source)>,
    in_flight: usize,
    busy: bool,
    /// Batches go into the stage.
    staged: bool,
    written: BTreeSet<File>,
    syncs: usize,
    failed: bool,
    next_id: u64,
}

const SYNC: u64 = 1 << 55;

impl Applier {
    /// `owner` marks its requests' tokens.
    pub fn new(owner: u8) -> Applier {
        Applier {
            owner,
            queue: VecDeque::new(),
            in_flight: 0,
            busy: false,
            staged: false,
            written: BTreeSet::new(),
            syncs: 0,
            failed: false,
            next_id: 0,
        }
    }

    /// A batch is not done yet.
    pub fn is_busy(&self) -> bool {
        self.busy
    }
    /// A sync is not done yet.
    pub fn is_syncing(&self) -> bool {
        self.syncs > 0
    }

    /// No request is in flight.
    pub fn is_quiet(&self) -> bool {
        self.in_flight == 0 && self.syncs == 0
    }
    /// A write or a sync has failed.
    pub fn has_failed(&self) -> bool {
        self.failed
    }
    /// Later batches go into the stage of these volumes, or into their backings. Only when quiet. What was
    /// begun and failed is forgotten: the caller has given up what it was for. The next sync covers all of
    /// them: an earlier process may have written what is found there and is not durable.
    pub fn aim(&mut self, staged: bool, volumes: impl Iterator<Item = u8>) {
        debug_assert!(self.is_quiet());
        self.staged = staged;
        self.queue.clear();
        self.written = volumes.map(|v| self.file(v)).collect();
        (self.busy, self.failed) = (false, false);
    }

    fn file(&self, volume: u8) -> File {
        if self.staged { File::Stage(volume) } else { File::Backing(volume) }
    }

    /// Begins a batch: extents that do not overlap, in order. Not while one is busy.
    pub fn begin(&mut self, batch: impl Iterator<Item = (Extent, Source)>) {
        debug_assert!(!self.busy);
        self.queue.extend(batch);
        self.busy = true;
    }

    /// Submits what fits. `ring` gives the bytes of [`Source::Ring`]. True when there was nothing at
    /// all to do: the batch is applied.
    pub fn pump<'a>(&mut self, ring: impl Fn(u64, u64) -> &'a [u8], out: &mut Vec<DiskRequest>) -> bool {
        while self.in_flight < DEPTH && !self.failed {
            let Some((extent, source)) = self.queue.pop_front() else { break };
            let file = self.file(extent.address().volume());
            let offset = extent.address().offset();
            let op = if matches!(source, Source::Zeroes) {
                DiskOp::Zero { offset, len: extent.len() }
            } else {
                DiskOp::Write { offset, data: self.join(extent, source, &ring), dsync: false }
            };
            self.written.insert(file);
            self.in_flight += 1;
            self.next_id += 1;
            out.push(DiskRequest { token: Token::new(self.owner, self.next_id), file, op });
        }
        let idle = self.busy && self.in_flight == 0 && self.queue.is_empty() && !self.failed;
        if idle {
            self.busy = false;
        }
        idle
    }

    /// The bytes of `extent`, with those of the extents that follow it without a gap.
    fn join<'a>(&mut self, extent: Extent, source: Source, ring: &impl Fn(u64, u64) -> &'a [u8]) -> Bytes {
        let mut end = extent.end();
        let mut parts = 0;
        for (next, source) in &self.queue {
            let adjacent = next.start() == end && next.address().volume() == extent.address().volume();
            if !adjacent || matches!(source, Source::Zeroes) || next.end() - extent.start() > JOINED {
                break;
            }
            end = next.end();
            parts += 1;
        }
        if let (0, Source::Bytes(bytes)) = (parts, &source)
            && bytes.as_ptr().addr().is_multiple_of(BLOCK as usize)
        {
            return bytes.slice(..extent.len() as usize);
        }
        let mut buf = aligned((end - extent.start()) as usize);
        let mut add = |extent: Extent, source: Source| match source {
            Source::Ring(at) => buf.extend_from_slice(ring(at, extent.len())),
            Source::Bytes(b) => buf.extend_from_slice(&b[..extent.len() as usize]),
            Source::Zeroes => unreachable!("zeroes are not joined"),
        };
        add(extent, source);
        for (extent, source) in self.queue.drain(..parts) {
            add(extent, source);
        }
        freeze(buf)
    }

    /// Makes what was applied durable. Not while a sync is under way; a batch may be. `false` when
    /// nothing was written since the last one.
    pub fn sync(&mut self, out: &mut Vec<DiskRequest>) -> bool {
        debug_assert!(self.syncs == 0);
        // A batch under way writes on: its volumes stay marked for the next sync.
        let files: Vec<File> = self.written.iter().copied().collect();
        if !self.busy {
            self.written.clear();
        }
        for (i, file) in files.iter().enumerate() {
            self.syncs += 1;
            let token = Token::new(self.owner, SYNC + i as u64);
            out.push(DiskRequest { token, file: *file, op: DiskOp::Sync });
        }
        !files.is_empty()
    }

    /// The answer to one of its requests.
    pub fn complete(&mut self, id: u64, result: DiskResult) -> Result<Progress, IoError> {
        let synced = id & SYNC != 0;
        if synced {
            self.syncs -= 1;
        } else {
            self.in_flight -= 1;
        }
        if let Err(e) = result {
            self.failed = true;
            return Err(e);
        }
        if self.failed {
            return Err(IoError::EIO);
        }
        if synced {
            return Ok(if self.syncs == 0 { Progress::Synced } else { Progress::More });
        }
        if self.in_flight > 0 || !self.queue.is_empty() {
            return Ok(Progress::More);
        }
        self.busy = false;
        Ok(Progress::Applied)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Address;

    fn extent(volume: u8, at: u64, len: u64) -> Extent {
        Extent::new(Address::new(volume, at).unwrap(), len).unwrap()
    }

    #[test]
    fn adjacent_writes_are_joined_and_zeroes_are_not() {
        let mut applier = Applier::new(1);
        let ring = vec![7u8; 4096];
        let data = |b: u8, n| Source::Bytes(Bytes::from(vec![b; n]));
        let batch = [
            (extent(0, 0, 512), data(1, 512)),
            (extent(0, 512, 1024), Source::Ring(512)),
            (extent(0, 1536, 512), Source::Zeroes),
            (extent(0, 2048, 512), data(3, 512)),
            (extent(1, 0, 512), data(4, 512)),
        ];
        let mut out = Vec::new();
        applier.begin(batch.into_iter());
        applier.pump(|at, len| &ring[at as usize..(at + len) as usize], &mut out);
        let shape: Vec<_> = out
            .iter()
            .map(|r| match &r.op {
                DiskOp::Write { offset, data, .. } => {
                    (r.file, *offset, data.len() as u64, data[data.len() - 1])
                }
                DiskOp::Zero { offset, len } => (r.file, *offset, *len, 0),
                other => panic!("{other:?}"),
            })
            .collect();
        let b = File::Backing;
        assert_eq!(
            shape,
            [(b(0), 0, 1536, 7), (b(0), 1536, 512, 0), (b(0), 2048, 512, 3), (b(1), 0, 512, 4)]
        );
        let ids: Vec<_> = out.iter().map(|r| r.token.id()).collect();
        for (i, id) in ids.iter().enumerate() {
            let expected = if i == 3 { Progress::Applied } else { Progress::More };
            assert_eq!(applier.complete(*id, Ok(Bytes::new())), Ok(expected));
        }
        out.clear();
        assert!(applier.sync(&mut out));
        assert_eq!(out.len(), 2);
        assert_eq!(applier.complete(out[0].token.id(), Ok(Bytes::new())), Ok(Progress::More));
        assert_eq!(applier.complete(out[1].token.id(), Ok(Bytes::new())), Ok(Progress::Synced));
        assert!(!applier.sync(&mut out), "nothing was written since");
    }

    #[test]
    fn the_first_sync_covers_what_an_earlier_process_wrote() {
        let mut applier = Applier::new(1);
        applier.aim(true, [0, 3].into_iter());
        let mut out = Vec::new();
        assert!(applier.sync(&mut out));
        assert_eq!(out.iter().map(|r| r.file).collect::<Vec<_>>(), [File::Stage(0), File::Stage(3)]);
    }

    #[test]
    fn a_failed_write_latches() {
        let mut applier = Applier::new(1);
        let mut out = Vec::new();
        applier
            .begin([(extent(0, 0, 512), Source::Zeroes), (extent(0, 4096, 512), Source::Zeroes)].into_iter());
        applier.pump(|_, _| &[], &mut out);
        assert!(applier.complete(out[0].token.id(), Err(IoError::EIO)).is_err());
        assert!(applier.complete(out[1].token.id(), Ok(Bytes::new())).is_err());
        assert!(!applier.pump(|_, _| &[], &mut out));
    }

    /// Writes that touch nothing of each other.
    fn apart(count: u64) -> impl Iterator<Item = (Extent, Source)> {
        (0..count).map(|i| (extent(0, i * 8192, 512), Source::Bytes(Bytes::from(vec![i as u8; 512]))))
    }

    fn pump(applier: &mut Applier) -> (bool, Vec<DiskRequest>) {
        let mut out = Vec::new();
        (applier.pump(|_, _| &[], &mut out), out)
    }

    #[test]
    fn a_piece_of_a_source_is_what_lies_there() {
        assert!(matches!(Source::Ring(4096).skip(512), Source::Ring(4608)));
        assert!(matches!(Source::Zeroes.skip(512), Source::Zeroes));
        let bytes = Source::Bytes(Bytes::from_static(b"abcdef"));
        assert!(matches!(bytes.skip(2), Source::Bytes(b) if b == "cdef"));
    }

    #[test]
    fn a_batch_is_busy_until_the_last_of_its_writes() {
        let mut applier = Applier::new(1);
        assert!(!applier.is_busy() && applier.is_quiet() && !applier.has_failed());
        assert!(!pump(&mut applier).0, "there is no batch");
        applier.begin(apart(DEPTH as u64 + 2));
        assert!(applier.is_busy() && applier.is_quiet(), "nothing is in flight yet");
        let (done, mut flying) = pump(&mut applier);
        assert!(!done && flying.len() == DEPTH && applier.is_busy() && !applier.is_quiet());
        assert!(pump(&mut applier).1.is_empty(), "no more at once");
        for i in 0..DEPTH + 2 {
            assert!(applier.is_busy() && !applier.is_quiet());
            let one = flying.remove(0);
            let DiskOp::Write { offset, data, dsync: false } = &one.op else { panic!("{one:?}") };
            assert_eq!((*offset, &data[..]), (i as u64 * 8192, &[i as u8; 512][..]));
            let last = i == DEPTH + 1;
            let expected = if last { Progress::Applied } else { Progress::More };
            assert_eq!(applier.complete(one.token.id(), Ok(Bytes::new())), Ok(expected));
            let (done, more) = pump(&mut applier);
            assert!(!done && more.len() == usize::from(i < 2));
            flying.extend(more);
            assert!(flying.iter().all(|r| r.token.id() != one.token.id()), "each has a token of its own");
        }
        assert!(!applier.is_busy() && applier.is_quiet());
        applier.begin(std::iter::empty());
        assert_eq!((pump(&mut applier).0, applier.is_busy()), (true, false), "nothing to do is done");
    }

    #[test]
    fn writes_are_joined_within_a_volume_and_a_bound() {
        let lengths = |batch: &[(u8, u64, u64)]| {
            let mut applier = Applier::new(1);
            let data = |len: u64| Source::Bytes(Bytes::from(vec![1; len as usize]));
            applier.begin(batch.iter().map(|(v, at, len)| (extent(*v, *at, *len), data(*len))));
            let len = |r: DiskRequest| match r.op {
                DiskOp::Write { data, .. } => data.len() as u64,
                other => panic!("{other:?}"),
            };
            pump(&mut applier).1.into_iter().map(len).collect::<Vec<_>>()
        };
        let (half, far) = (JOINED / 2, 5 * JOINED);
        assert_eq!(lengths(&[(0, far, half), (0, far + half, half)]), [JOINED]);
        assert_eq!(lengths(&[(0, far, half), (0, far + half, half), (0, far + JOINED, 512)]), [JOINED, 512]);
        assert_eq!(lengths(&[(0, far, half), (0, far + half, half + 512)]), [half, half + 512]);
        assert_eq!(lengths(&[(0, far, 512), (0, far + 1024, 512)]), [512, 512]);
        // The end of a volume is where the next one begins, and in another file.
        assert_eq!(lengths(&[(0, crate::units::MAX_VOLUME - 512, 512), (1, 0, 512)]), [512, 512]);
    }

    #[test]
    fn a_sync_under_a_batch_leaves_its_volumes_to_the_next() {
        let mut applier = Applier::new(1);
        let mut out = Vec::new();
        applier.begin(apart(1));
        let (_, write) = pump(&mut applier);
        assert!(applier.sync(&mut out) && applier.is_syncing() && !applier.is_quiet());
        assert_eq!(applier.complete(write[0].token.id(), Ok(Bytes::new())), Ok(Progress::Applied));
        assert!(!applier.is_quiet() && !applier.is_busy());
        assert_eq!(applier.complete(out[0].token.id(), Ok(Bytes::new())), Ok(Progress::Synced));
        assert!(!applier.is_syncing() && applier.is_quiet());
        assert!(applier.sync(&mut out), "what the batch wrote after the sync began");
        assert_eq!(applier.complete(out[1].token.id(), Ok(Bytes::new())), Ok(Progress::Synced));
        assert!(!applier.sync(&mut out));
    }

    #[test]
    fn after_a_failure_nothing_is_sent_until_there_is_another_target() {
        let mut applier = Applier::new(1);
        applier.begin(apart(DEPTH as u64 + 2));
        let (_, flying) = pump(&mut applier);
        assert!(applier.complete(flying[0].token.id(), Err(IoError::EIO)).is_err() && applier.has_failed());
        let (done, more) = pump(&mut applier);
        assert!(!done && more.is_empty());
        for one in &flying[1..] {
            assert!(applier.complete(one.token.id(), Ok(Bytes::new())).is_err());
        }
        let (done, more) = pump(&mut applier);
        assert!(!done && more.is_empty());
        assert!(applier.has_failed() && applier.is_busy() && applier.is_quiet());
        applier.aim(false, [2].into_iter());
        assert!(!applier.has_failed() && !applier.is_busy());
        // A failed sync is as bad.
        let mut out = Vec::new();
        assert!(applier.sync(&mut out) && out[0].file == File::Backing(2));
        assert!(applier.complete(out[0].token.id(), Err(IoError::EIO)).is_err() && applier.has_failed());
    }
}
