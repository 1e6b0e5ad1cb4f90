//! The backing's content: which record it stands at, and which record redo would start after.
//!
//! Owns: batches of records on their way into the backing, and the checkpoint. Invariants: the image
//! moves by whole records (I1); a checkpoint is told to the superblock only when the backings and the
//! dirty maps were synced after it was applied, and when everything that has overwritten it since is
//! durable in the journal.

use super::feed::{Fetched, Reader};
use super::meta::Ticket;
use super::primary::Primary;
use super::remake::{self, Finish, Staged};
use super::run::{Part, Run, fetch};
use super::{APPLY, INDEX, MAPS, STAGE};
use crate::apply::{Applier, Progress, Source};
use crate::disk::{DiskOp, DiskRequest, DiskResult, File, IoError, Token};
use crate::extents::ExtentMap;
use crate::format::record::{Content, Record};
use crate::format::superblock::Superblock;
use crate::journal::{Tail, tail_of};
use crate::units::{Extent, Lsn, Now};

/// Where a checkpoint stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Check {
    Idle,
    /// The syncs of mapped files that it waits for; those of the backings are the applier's.
    Syncing {
        tail: Tail,
        fence: u64,
        left: [bool; 3],
    },
    /// Synced; what overwrote it is not durable yet.
    Fenced {
        tail: Tail,
        fence: u64,
    },
    Saving {
        tail: Tail,
        ticket: Ticket,
    },
}

/// A mapped file that a checkpoint syncs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum CheckPart {
    Maps,
    Index,
    Stage,
}

/// See the module's documentation.
pub struct Image {
    pub(super) applier: Applier,
    pub(super) reader: Reader,
    /// Newest record in the backing.
    pub(super) applied: Tail,
    /// Newest record of the batch under way.
    upto: Option<Tail>,
    check: Check,
    checked_at: u64,
    /// A checkpoint is wanted now, whatever its time.
    pub(super) hurry: bool,
    rotated_at: u64,
    /// Repairs have their turn before the next records.
    repair_next: bool,
    /// Repairs were written that no sync covers.
    pub(super) repaired: bool,
    pub(super) staged: Staged,
    pub(super) finish: Finish,
    /// What the batch under way puts into the stage.
    staging: Vec<Extent>,
    /// What it puts into the backings, on a shadow.
    pub(super) under_way: Vec<Extent>,
    /// The shell has not answered the last [`OpenStage`](super::event::Action::OpenStage).
    pub(super) making: bool,
}

impl Image {
    /// The image that a superblock vouches for; `time`: when its last record was sealed.
    pub fn new(owner: u8, sb: &Superblock, time: u64, now: Now) -> Image {
        debug_assert_eq!(owner, APPLY);
        let applied = Tail {
            point: sb.checkpoint,
            generation: sb.checkpoint_generation,
            last_write: sb.checkpoint_write,
            time,
            durable: Lsn(0),
        };
        let mut applier = Applier::new(owner);
        applier.aim(false, sb.volumes.iter().map(|v| v.number));
        Image {
            applier,
            reader: Reader::default(),
            applied,
            upto: None,
            check: Check::Idle,
            checked_at: now.mono,
            hurry: false,
            rotated_at: 0,
            repair_next: false,
            repaired: false,
            staged: Staged::default(),
            finish: Finish::default(),
            staging: Vec::new(),
            under_way: Vec::new(),
            making: false,
        }
    }

    /// Where the parts of `extent` of this image lie.
    pub fn image_reads(&self, extent: Extent) -> Vec<(Extent, File)> {
        let number = extent.address().volume();
        match &self.staged {
            Staged::Open { stage, .. } => {
                let file = |staged| if staged { File::Stage(number) } else { File::Backing(number) };
                stage.parts(extent).into_iter().map(|(part, staged)| (part, file(staged))).collect()
            }
            Staged::Absent | Staged::Opening { .. } => vec![(extent, File::Backing(number))],
        }
    }

    /// No request that changes the image is in flight, whatever became of the last ones.
    pub fn is_quiet(&self) -> bool {
        self.applier.is_quiet() && self.reader.is_idle()
    }

    /// The newest record that is in the image, or on its way.
    pub fn underway(&self) -> Tail {
        self.upto.unwrap_or(self.applied)
    }

    /// Nothing of the backing is being changed.
    pub fn is_idle(&self) -> bool {
        !self.applier.is_busy() && self.reader.is_idle()
    }

    /// The journal was cut back: its bytes are counted anew.
    pub fn journal_cut(&mut self) {
        self.reader.reset();
        self.rotated_at = 0;
        (self.upto, self.repaired) = (None, false);
        self.staging.clear();
        self.under_way.clear();
    }
}

impl Run {
    /// The newest record that may go from the journal into the backing now.
    fn apply_limit(&self) -> Lsn {
        match &self.part {
            // Until it is durable that this is the primary, a restart finds a shadow whose image may hold nothing of
            // records that it holds back, or that its primary may not have.
            Part::Primary(_) if self.admin.is_promoting() => Lsn(0),
            Part::Primary(p) if p.is_redoing() => self.journal.tail().point.lsn,
            // What it holds is a shadow's soon, which goes on with it.
            Part::Primary(p) if p.is_sealed() && (self.is_retiring() || self.is_moving_over()) => Lsn(0),
            Part::Primary(Primary { drain: Some(upto), .. }) => *upto,
            Part::Primary(_) => Lsn(0),
            Part::Shadow(s) if s.is_cutting() || self.is_choosing() => Lsn(0),
            Part::Shadow(s) => self.journal.durable().min(s.vouched()).min(s.wanted()).min(s.delay.limit()),
        }
    }

    /// Batches of records, submissions, checkpoints; whether anything moved.
    pub(super) fn pump_image(&mut self) -> bool {
        let mut moved = false;
        if !self.image.applier.is_busy() && !self.image_waits() {
            let due = self.image.applied.point.lsn < self.apply_limit();
            // In turn, so that neither waits for the end of the other.
            let repair = self.has_repairs() && (!due || self.image.repair_next);
            self.image.repair_next = !repair;
            moved |= match (repair, due) {
                (true, _) => self.begin_repairs(),
                (false, true) => self.begin_records(),
                (false, false) => false,
            };
        }
        let cache = match &self.part {
            Part::Primary(p) => p.cache.as_ref(),
            Part::Shadow(_) => None,
        };
        let ring = |at, len| cache.expect("only write-back uses the ring").ring_data(at, len);
        if self.image.applier.pump(ring, &mut self.disk) {
            self.batch_done();
            moved = true;
        }
        moved | self.pump_checkpoint()
    }

    /// Gathers the next records into a batch, newest version of each sector.
    fn begin_records(&mut self) -> bool {
        let limit = self.apply_limit();
        let mut batch: ExtentMap<Source> = ExtentMap::default();
        let mut upto: Option<Tail> = None;
        let mut bytes = 0;
        while bytes < self.cfg.batch_bytes {
            let next = upto.map_or(self.image.applied.point.lsn, |t| t.point.lsn).next();
            if next > limit {
                break;
            }
            match fetch!(self, self.image.reader, next) {
                Fetched::Ready(record) => match gather(&record, &mut batch) {
                    Ok(n) => {
                        bytes += n;
                        upto = Some(tail_of(&record));
                    }
                    Err(e) => {
                        self.fail(format!("record {next} can't be unpacked: {e}; its journal is damaged"));
                        return false;
                    }
                },
                Fetched::Pending => break,
                Fetched::Lost => {
                    self.fail(format!(
                        "record {next} is not readable in the journal, but the image needs it: the journal's \
                         disk has lost data. Promote another shadow or resync this node"
                    ));
                    return false;
                }
            }
        }
        let Some(upto) = upto else { return false };
        self.begin_batch(batch.iter().map(|(e, s)| (e, s.clone())).collect(), Some(upto));
        true
    }

    /// Begins a batch of writes into the image: extents that do not overlap, in order. Not while one is
    /// busy. `upto`: it is the records up to there; `None`: the image stays at its record.
    pub(super) fn begin_batch(&mut self, batch: Vec<(Extent, Source)>, upto: Option<Tail>) {
        self.image.upto = upto;
        self.touch_image(batch.iter().map(|(e, _)| *e));
        if self.is_staging() {
            self.image.staging = batch.iter().map(|(e, _)| *e).collect();
        } else {
            batch.iter().for_each(|(e, _)| self.index.forget(*e));
        }
        self.image.applier.begin(batch.into_iter());
    }

    /// The answer to a request of the applier.
    pub(super) fn applied(&mut self, id: u64, result: DiskResult) -> Result<(), IoError> {
        match self.image.applier.complete(id, result)? {
            Progress::More => {}
            Progress::Applied => self.batch_done(),
            Progress::Synced => self.check_synced(),
        }
        Ok(())
    }

    fn batch_done(&mut self) {
        if let Staged::Open { stage, .. } = &mut self.image.staged {
            self.image.staging.drain(..).for_each(|e| stage.mark(e));
        }
        self.image.under_way.clear();
        if self.merged() {
            return;
        }
        let Some(upto) = self.image.upto.take() else { return self.repairs_written() };
        self.image.applied = upto;
        self.backlog.applied(upto.point.lsn);
        match &mut self.part {
            Part::Primary(Primary { drain: Some(_), .. }) => self.drained(upto.point.lsn),
            Part::Primary(p) => p.written_back(&upto),
            Part::Shadow(_) => self.note_applied(upto.point.lsn),
        }
    }

    /// The last write sequence that must be durable before what is in the backing now may count.
    fn fence(&self) -> u64 {
        match &self.part {
            Part::Primary(p) => p.cache.as_ref().map_or(0, |c| c.last_seq()),
            Part::Shadow(_) => 0,
        }
    }

    /// Asks for a checkpoint now. Whoever asks after [`Run::pump_image`] had its turn must ask in this
    /// way: a wish alone would wait for whatever event comes next.
    pub(super) fn hurry_checkpoint(&mut self) -> bool {
        self.image.hurry = true;
        self.pump_checkpoint()
    }

    fn pump_checkpoint(&mut self) -> bool {
        match self.image.check {
            Check::Idle => self.begin_checkpoint(),
            Check::Syncing { .. } => false,
            Check::Fenced { tail, fence } => {
                let durable = match &self.part {
                    Part::Primary(p) => p.durable_write(),
                    Part::Shadow(_) => fence,
                };
                if durable < fence {
                    let newest = self.journal.tail().point.lsn;
                    self.journal.want(newest);
                    return false;
                }
                self.save_checkpoint(tail);
                true
            }
            Check::Saving { tail, ticket } => {
                if !self.meta.is_saved(ticket) {
                    return false;
                }
                self.image.check = Check::Idle;
                self.index.synced();
                self.maps.settled();
                self.links.checkpoint = tail.point.lsn;
                self.update_keep();
                true
            }
        }
    }

    fn begin_checkpoint(&mut self) -> bool {
        if matches!(&self.part, Part::Shadow(s) if s.is_cutting() || s.is_turning()) {
            return false; // the superblock would name as durable what is being cut off
        }
        if self.is_rewinding() {
            return false; // the same
        }
        if self.is_moving() {
            return false; // it is being moved, and stays the one that it is
        }
        let tail = self.image.applied;
        let learned = self.image.repaired || self.index.has_pending();
        let news = tail.point.lsn > self.meta.sb.checkpoint.lsn || learned;
        if !news || self.image.applier.is_syncing() {
            self.image.hurry = false;
            return false;
        }
        let (used, size) = self.journal.usage();
        let due = self.image.checked_at + self.cfg.timing.checkpoint_after;
        // What is held back on purpose keeps a journal fuller than that.
        let much = if self.cfg.apply_delay > 0 { size / 4 * 3 } else { size / 2 };
        if !self.image.hurry && self.now.mono < due && used < much {
            self.wake_at(due);
            return false;
        }
        self.image.hurry = false;
        self.image.checked_at = self.now.mono;
        // What a resync compares is told by boundaries from before it.
        if self.journal.bytes() - self.image.rotated_at >= size / 2 && self.meta.sb.resync.is_none() {
            self.image.rotated_at = self.journal.bytes();
            self.maps.rotate(self.journal.tail().point);
        }
        let fence = self.fence();
        self.image.repaired = self.image.applier.is_busy() && self.image.repaired;
        self.job_syncing();
        let left = [true, self.index.sync(), self.is_staging()];
        let files =
            [(MAPS, 0, File::DirtyMaps), (INDEX, 0, File::HashIndex), (STAGE, remake::MAP, File::StageMap)];
        for ((owner, id, file), _) in files.into_iter().zip(left).filter(|(_, wanted)| *wanted) {
            self.disk.push(DiskRequest { token: Token::new(owner, id), file, op: DiskOp::Sync });
        }
        self.image.applier.sync(&mut self.disk);
        self.image.check = Check::Syncing { tail, fence, left };
        true
    }

    /// The sync of a mapped file was answered.
    pub(super) fn map_synced(&mut self, part: CheckPart, result: DiskResult) -> Result<(), IoError> {
        if let Check::Syncing { left, .. } = &mut self.image.check
            && (result.is_ok() || part == CheckPart::Stage)
        {
            left[part as usize] = false;
        }
        result?;
        self.check_synced();
        Ok(())
    }

    pub(super) fn check_synced(&mut self) {
        if let Check::Syncing { tail, fence, left: [false, false, false] } = self.image.check
            && !self.image.applier.is_syncing()
            && !self.image.applier.has_failed()
        {
            self.image.check = Check::Fenced { tail, fence };
        }
    }

    fn save_checkpoint(&mut self, tail: Tail) {
        let segment = self.journal.segment_of(tail.point.lsn);
        let durable = self.journal.durable();
        let sb = &mut self.meta.sb;
        sb.checkpoint = tail.point;
        sb.checkpoint_write = tail.last_write;
        sb.checkpoint_generation = tail.generation;
        sb.checkpoint_segment = segment;
        sb.floor = sb.floor.max(durable);
        sb.maps = self.maps.ranges().to_vec();
        if let Some(resync) = &mut sb.resync {
            let progress = self.compare.job.as_ref().map_or(0, super::job::Job::resync_progress);
            resync.progress = resync.progress.max(progress);
        }
        self.note_job();
        let ticket = self.meta.save(false);
        self.image.check = Check::Saving { tail, ticket };
    }

    /// Ends a checkpoint that can't succeed; whether none is under way.
    pub(super) fn abandon_checkpoint(&mut self) -> bool {
        if matches!(
            self.image.check,
            Check::Syncing { left: [false, false, false], .. } | Check::Fenced { .. }
        ) {
            self.image.check = Check::Idle;
            self.index.abandoned();
        }
        self.checkpoint_idle()
    }

    /// No checkpoint is under way.
    pub(super) fn checkpoint_idle(&self) -> bool {
        self.image.check == Check::Idle
    }
}

/// Adds a record's writes to a batch; payload bytes.
fn gather(record: &Record, batch: &mut ExtentMap<Source>) -> Result<u64, crate::format::FormatError> {
    let payload = record.payload()?;
    let mut at = 0;
    for (extent, content) in record.extents() {
        let source = match content {
            Content::Zeroes => Source::Zeroes,
            Content::Data => {
                let end = at + extent.len() as usize;
                let bytes = payload.slice(at..end);
                at = end;
                Source::Bytes(bytes)
            }
        };
        batch.insert(extent, source);
    }
    Ok(payload.len() as u64)
}
