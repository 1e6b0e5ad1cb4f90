//! The new image of a shadow that is being resynced: the stage, the flip, the merge.
//!
//! Owns: the stage while it is open, and the steps from "all compared" to "shown". Invariants: while staging
//! nothing is written to the backings; one superblock write shows the new image, once every record that it
//! may hold parts of is in it and durable on the primary; from then on the image is the stage over the
//! backings, whatever happens, until the one is in the others (I1). A copy in place is told to be consistent
//! by the same rule.

use super::STAGE;
use super::event::{Action, Level};
use super::history::Happening;
use super::meta::Ticket;
use super::run::{Part, Run};
use crate::apply::Source;
use crate::apply::stage::Stage;

use crate::disk::{DiskOp, DiskRequest, DiskResult, File, Memory, Token};
use crate::format::mapped::Owner;
use crate::format::message::Message;
use crate::format::superblock::{Resync, ResyncStage};
use crate::journal::maps::joined;
use crate::units::{Extent, Lsn};
use bytes::Bytes;

/// Most extents that are kept to be compared; beyond it neighbours are joined.
const MOST: usize = 1 << 18;
/// Bytes of one step of the merge, and of one read in it.
const STEP: u64 = 4 << 20;
const PIECE: u64 = 256 << 10;
/// The token of the sync of the stage's map; reads of the merge have higher ones.
pub(super) const MAP: u64 = 0;

/// Where the stage is.
#[derive(Default)]
pub enum Staged {
    /// There is none.
    #[default]
    Absent,
    /// The shell opens it, or makes it.
    Opening { fresh: bool, job: u64 },
    /// It is open.
    Open { stage: Stage, job: u64 },
}

/// From the last comparison to the image that is shown.
#[derive(Default)]
pub enum Finish {
    /// Not there yet.
    #[default]
    Idle,
    /// The superblock is told to show it.
    Showing(Ticket),
    /// The stage goes into the backings.
    Merging(Merge),
    /// The superblock is told that it is there.
    Clearing(Ticket),
}

/// A step of the merge.
#[derive(Default)]
pub struct Merge {
    /// Everything before this position is in the backings.
    at: u64,
    pieces: Vec<(Extent, Option<Bytes>)>,
    step: MergeStep,
}

#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum MergeStep {
    #[default]
    Next,
    Reading,
    Writing,
    Syncing,
}

impl Run {
    fn resync_stage(&self) -> Option<ResyncStage> {
        self.meta.sb.resync.as_ref().map(|r| r.stage)
    }

    /// Changes go into the stage.
    pub(super) fn is_staging(&self) -> bool {
        self.resync_stage() == Some(ResyncStage::Staging)
    }

    /// The image that may be shown is not that of the journal.
    pub(super) fn is_remaking(&self) -> bool {
        let making = matches!(self.resync_stage(), Some(ResyncStage::Copying | ResyncStage::Staging));
        making || matches!(self.image.finish, Finish::Showing(_))
    }

    /// The LSN of the image that the backings hold beside a new one.
    pub(super) fn old_image(&self) -> Option<Lsn> {
        self.meta.sb.resync.as_ref()?.old.as_ref().map(|old| old.at.point.lsn)
    }

    /// Nothing may be put into the image now.
    pub(super) fn image_waits(&self) -> bool {
        if self.view_holds() || matches!(&self.part, Part::Shadow(s) if s.is_turning()) {
            return true;
        }
        let Some(resync) = &self.meta.sb.resync else { return !matches!(self.image.finish, Finish::Idle) };
        match resync.stage {
            ResyncStage::Merging => true,
            ResyncStage::Staging if !matches!(self.image.staged, Staged::Open { .. }) => true,
            _ => resync.compared.is_some_and(|upto| self.image.applied.point.lsn >= upto),
        }
    }

    /// Number of the resync that is under way, or of the next.
    pub(super) fn resync_number(&self) -> u64 {
        match (&self.meta.sb.resync, &self.image.staged) {
            (Some(r), _) => r.job,
            (None, Staged::Open { job, .. } | Staged::Opening { job, .. }) => *job,
            // No superblock that was ever written had this sequence.
            (None, Staged::Absent) => self.meta.sb.sequence + 1,
        }
    }

    /// At the start: takes up the stage, or has one removed that was left behind.
    pub(super) fn find_stage(&mut self) {
        match self.meta.sb.resync.as_ref().map(|r| (r.stage, r.job)) {
            Some((ResyncStage::Staging | ResyncStage::Merging, job)) => self.open_stage(false, job),
            Some((ResyncStage::Copying, _)) | None => self.out.push(Action::DropStage),
        }
    }

    fn open_stage(&mut self, fresh: bool, job: u64) {
        self.image.staged = Staged::Opening { fresh, job };
        self.ask_for_stage(fresh);
    }

    fn ask_for_stage(&mut self, fresh: bool) {
        self.image.making = true;
        self.out.push(Action::OpenStage { fresh });
    }

    /// The shell makes a stage, or opens one: another one would be taken for it.
    pub(super) fn is_making_stage(&self) -> bool {
        self.image.making
    }

    /// A view needs what a resync has: files beside the journal.
    pub(super) fn make_overlay(&mut self) {
        self.ask_for_stage(true);
    }

    /// A resync goes on, or is about to change what the image and the journal are.
    pub(super) fn is_resyncing(&self) -> bool {
        let way = matches!(&self.part, Part::Shadow(s) if s.rebase.is_some() || s.retreat.is_some());
        way || !matches!(self.image.finish, Finish::Idle) || !matches!(self.image.staged, Staged::Absent)
    }

    /// The image is between two places, and nothing may sync what is there of it.
    pub(super) fn is_moving(&self) -> bool {
        match &self.image.finish {
            Finish::Idle => false,
            Finish::Merging(merge) => merge.step != MergeStep::Syncing,
            Finish::Showing(_) | Finish::Clearing(_) => true,
        }
    }

    /// There is a stage; if not, one is being made.
    pub(super) fn stage_ready(&mut self) -> bool {
        match &self.image.staged {
            Staged::Open { .. } => true,
            Staged::Opening { .. } => false,
            Staged::Absent if self.image.making => false,
            Staged::Absent => {
                let job = self.resync_number();
                self.open_stage(true, job);
                false
            }
        }
    }

    /// The answer to [`Action::OpenStage`].
    pub(super) fn stage_opened(&mut self, result: Result<Box<dyn Memory>, String>) {
        self.image.making = false;
        if self.view_mut().is_some_and(|v| v.is_making()) {
            return self.overlay_opened(result);
        }
        let Staged::Opening { fresh, job } = self.image.staged else { return };
        self.image.staged = Staged::Absent;
        let sb = &self.meta.sb;
        let id = Owner { group: sb.group, node: sb.node, number: job };
        let volumes: Vec<_> = sb.volumes.iter().map(|v| (v.number, v.size)).collect();
        let opened = result.and_then(|memory| {
            let stage = Stage::new(memory, &volumes, id, fresh);
            stage.ok_or_else(|| "the stage's files are those of another resync".to_owned())
        });
        match opened {
            Ok(stage) => {
                self.image.staged = Staged::Open { stage, job };
                if self.is_staging() {
                    self.aim();
                }
            }
            Err(why) if fresh => self.retreat(Some(format!("there is no room for the new image: {why}"))),
            Err(why) if self.is_staging() => self.retreat(Some(why)),
            Err(why) => self.lose_stage(&why),
        }
    }

    /// Whatever is applied from now on goes where it belongs.
    pub(super) fn aim(&mut self) {
        let staging = self.is_staging();
        let volumes = self.meta.sb.volumes.iter().map(|v| v.number);
        self.image.applier.aim(staging, volumes);
    }

    /// The stage is not needed any more.
    pub(super) fn drop_stage(&mut self) {
        self.image.staged = Staged::Absent;
        self.image.finish = Finish::Idle;
        self.out.push(Action::DropStage);
    }

    /// Half of the new image is gone: the image here is neither the old one nor the new one.
    fn lose_stage(&mut self, why: &str) {
        self.log(
            Level::Error,
            format!("the new image can't be put in place: {why}. It is copied from the primary again"),
        );
        let job = self.resync_number();
        self.meta.sb.resync = Some(Resync {
            job,
            stage: ResyncStage::Copying,
            since: None,
            progress: 0,
            compared: None,
            old: None,
        });
        self.meta.sb.consistent = false;
        self.meta.save(true);
        self.drop_stage();
        self.close_links("the image has to be copied again");
    }

    /// All is compared and repaired as of this record: the new image is whole once it is durable.
    pub(super) fn all_compared(&mut self, upto: Lsn) {
        if let Some(resync) = &mut self.meta.sb.resync {
            resync.compared = Some(upto);
        }
    }

    /// Moves the new image on to where it is shown; whether anything moved.
    pub(super) fn pump_finish(&mut self) -> bool {
        if matches!(&self.part, Part::Shadow(s) if s.is_turning()) {
            return false;
        }
        match &self.image.finish {
            Finish::Idle => self.begin_finish(),
            Finish::Showing(ticket) if self.meta.is_saved(*ticket) => {
                self.image.finish = Finish::Idle;
                if self.resync_stage().is_none() {
                    self.image_made();
                }
                true
            }
            Finish::Merging(_) => self.pump_merge(),
            Finish::Clearing(ticket) if self.meta.is_saved(*ticket) => {
                self.drop_stage();
                self.image_made();
                true
            }
            Finish::Showing(_) | Finish::Clearing(_) => false,
        }
    }

    fn begin_finish(&mut self) -> bool {
        let Some(resync) = &self.meta.sb.resync else { return false };
        let applied = self.image.applied.point.lsn;
        if resync.stage == ResyncStage::Merging {
            if matches!(self.image.staged, Staged::Open { .. }) && self.image.is_idle() {
                self.aim();
                self.image.finish = Finish::Merging(Merge::default());
                return true;
            }
            return false;
        }
        if resync.compared.is_none_or(|upto| applied < upto) || !self.image.is_idle() {
            return false;
        }
        if self.links.checkpoint < applied || self.image.repaired || !self.checkpoint_idle() {
            return self.hurry_checkpoint();
        }
        let sb = &mut self.meta.sb;
        match &mut sb.resync {
            Some(r) if r.stage == ResyncStage::Staging => (r.stage, r.old) = (ResyncStage::Merging, None),
            _ => (sb.resync, sb.consistent) = (None, true),
        }
        self.image.finish = Finish::Showing(self.meta.save(true));
        true
    }

    fn pump_merge(&mut self) -> bool {
        let settled = !self.image.repaired && self.checkpoint_idle();
        let (Finish::Merging(merge), Staged::Open { stage, .. }) =
            (&mut self.image.finish, &self.image.staged)
        else {
            return false;
        };
        match merge.step {
            MergeStep::Next => {
                let (mut at, mut bytes) = (merge.at, 0);
                while bytes < STEP
                    && let Some(extent) = stage.next(at, PIECE)
                {
                    at = extent.start() + extent.len();
                    bytes += extent.len();
                    merge.pieces.push((extent, None));
                    let token = Token::new(STAGE, merge.pieces.len() as u64);
                    let file = File::Stage(extent.address().volume());
                    let op = DiskOp::Read { offset: extent.address().offset(), len: extent.len() as usize };
                    self.disk.push(DiskRequest { token, file, op });
                }
                merge.step = if bytes > 0 { MergeStep::Reading } else { MergeStep::Syncing };
                // A checkpoint makes it durable, and with it what the hash index has forgotten.
                self.image.repaired |= bytes == 0;
                merge.at = at;
                true
            }
            MergeStep::Syncing if settled => {
                self.meta.sb.resync = None;
                self.image.finish = Finish::Clearing(self.meta.save(true));
                true
            }
            MergeStep::Syncing => self.hurry_checkpoint(),
            MergeStep::Reading | MergeStep::Writing => false,
        }
    }

    /// The answer to a read of the stage.
    pub(super) fn stage_read(&mut self, id: u64, result: DiskResult) {
        let Finish::Merging(merge) = &mut self.image.finish else { return };
        match result {
            Ok(bytes) => merge.pieces[id as usize - 1].1 = Some(bytes),
            Err(e) => {
                let why = format!("reading the stage failed: {e}");
                return self.fail(format!(
                    "{why}. The image here is half old, half new; check the disk that holds the stage, then \
                     restart: what is left is put in place"
                ));
            }
        }
        if merge.pieces.iter().any(|(_, bytes)| bytes.is_none()) {
            return;
        }
        merge.step = MergeStep::Writing;
        let pieces = std::mem::take(&mut merge.pieces).into_iter();
        let batch = pieces.filter_map(|(extent, bytes)| {
            let bytes = bytes?;
            // What is all zeroes stays a hole where there was one.
            let zero = bytes.iter().all(|b| *b == 0);
            Some((extent, if zero { Source::Zeroes } else { Source::Bytes(bytes) }))
        });
        let batch = batch.collect();
        self.begin_batch(batch, None);
    }

    /// A step of the merge is in the backings; `false`: what was written was no such step.
    pub(super) fn merged(&mut self) -> bool {
        let Finish::Merging(merge) = &mut self.image.finish else { return false };
        merge.step = MergeStep::Next;
        true
    }

    /// The image is that of the journal again.
    fn image_made(&mut self) {
        self.rejoined();
        self.tell(Happening::ResyncDone);
        let lsn = self.image.applied.point.lsn;
        self.log(Level::Info, format!("the image is that of the primary's history again, at LSN {lsn}"));
        if let Some(link) = self.links.receiving() {
            self.send(link, Message::Resynced);
        }
    }

    /// Begins the comparison that the new image needs, or goes on with it; whether anything moved.
    pub(super) fn pump_resync_job(&mut self) -> bool {
        let (now, pause) = (self.now.mono, self.cfg.timing.redial * 10);
        if !self.is_remaking() || self.links.receiving().is_none() || self.image_waits() {
            return false;
        }
        let Some(resync) = self.meta.sb.resync.as_ref().filter(|r| r.compared.is_none()) else {
            return false;
        };
        let cause = if resync.stage == ResyncStage::Copying { "first copy" } else { "resync" };
        let (since, progress) = (resync.since, resync.progress);
        if self.is_comparing(cause) {
            return false;
        }
        let Part::Shadow(s) = &mut self.part else { return false };
        if s.stopped.is_some() {
            return false;
        }
        if now < s.compare_at {
            let at = s.compare_at;
            self.wake_at(at);
            return false;
        }
        s.compare_at = now + pause;
        let candidates = since.map(|p| joined(self.maps.since(p.lsn), MOST));
        self.begin_resync_job(cause, candidates, progress);
        true
    }
}
