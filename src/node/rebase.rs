//! A shadow's way onto its primary's history where its own journal does not lead there.
//!
//! What the old journal may still give goes into the image; the primary names a durable point and what has
//! changed there since the newest point that both can prove to share; the journal begins anew after that
//! point, and what may differ is compared (`refresh`) and made good in place or in the stage (`remake`).
//!
//! Owns: that way, and the way back to the old image. Invariants: one superblock write (to both slots in
//! turn) separates the old journal from the new one, and nothing is appended or applied around it; the old
//! image stays as it was until the new one is whole (I1).

use super::event::{Level, LinkId};
use super::history::Happening;
use super::links::LinkState;
use super::meta::Ticket;
use super::run::{Part, Run, fetch};
use super::salvage::Saving;
use super::{JOURNAL, MAPS, STAGE};
use crate::disk::{DiskOp, DiskRequest, File, Token};
use crate::format::message::{Cause, Identity, Message, Opening};
use crate::format::record::origin;
use crate::format::superblock::{Anchor, OldImage, Resync, ResyncStage};
use crate::journal::cursor::Place;
use crate::journal::maps::Gathered;
use crate::journal::{Journal, Tail};
use crate::link::boundary::Search;
use crate::node::feed::Fetched;
use crate::units::{Extent, Generation, HistoryPoint, Lsn, NodeId};

/// The token of the syncs before the change of journals.
pub(super) const MARKED: u64 = 1 << 40;

/// What the primary offered.
struct Offer {
    at: Anchor,
    since: Option<HistoryPoint>,
    members: Vec<NodeId>,
}

/// On the way to another history.
pub struct Rebase {
    link: LinkId,
    openings: Vec<Opening>,
    /// Both images were all zeroes at LSN 0.
    blank: bool,
    /// Everything that was written on either side since the common point, if that can be told so exactly.
    touched: Option<Gathered>,
    step: Step,
}

enum Step {
    /// The old journal goes into the image. The primary's points.
    Draining(Vec<HistoryPoint>),
    Searching(Search),
    /// What is given up is saved.
    Saving(Saving),
    Asked(Option<HistoryPoint>),
    /// The stage is being made.
    Offered(Box<Offer>),
    /// The dirty maps and the stage's map are being synced; so many are not yet.
    Marking(Box<Offer>, u32),
    Turning(Ticket),
}

/// On the way back to the old image.
pub struct Retreat {
    /// What stopped the resync; `None`: it is not wanted any more.
    why: Option<String>,
    ticket: Option<Ticket>,
}

impl Rebase {
    /// What is being saved.
    pub(super) fn saving(&mut self) -> Option<&mut Saving> {
        if let Step::Saving(saving) = &mut self.step { Some(saving) } else { None }
    }

    /// The journal's end is about to be another one.
    pub(super) fn is_turning(&self) -> bool {
        matches!(self.step, Step::Offered(_) | Step::Marking(..) | Step::Turning(_))
    }
}

impl Run {
    /// The primary says that a resync is needed.
    pub(super) fn begin_rebase(
        &mut self,
        link: LinkId,
        cause: Cause,
        primary: &Identity,
        points: Vec<HistoryPoint>,
    ) {
        let blank = self.meta.sb.blank && primary.blank;
        let Part::Shadow(s) = &self.part else { return };
        let stopped = s.stopped.is_some();
        if cause == Cause::Lineage && self.is_staging() {
            // Nobody was shown anything of that lineage: the old image may be of this one.
            return self.retreat(None);
        }
        let own_way = matches!(cause, Cause::Lineage | Cause::Fork) && self.meta.sb.consistent;
        if stopped || (own_way && !self.meta.sb.retired.is_some_and(|r| r.rewinds)) {
            if own_way && !stopped {
                return self.histories_differ(link, self.journal.tail().point.lsn);
            }
            self.be_patient(link);
            return self.drop_link(link, "a resync is needed");
        }
        let rebase = Rebase {
            link,
            openings: primary.openings.clone(),
            blank,
            touched: None,
            step: Step::Draining(points),
        };
        if let Part::Shadow(s) = &mut self.part {
            s.rebase = Some(rebase);
        }
        self.links.follow(primary);
        self.held_no_longer(primary.node);
        self.leave_others(link);
        self.set_state(link, LinkState::Rebasing);
        self.log(Level::Info, format!("resync: {}", cause.text()));
        self.tell(Happening::Resync { cause: cause.text().into() });
    }

    /// Moves the way to another history on; whether anything moved.
    pub(super) fn pump_rebase(&mut self) -> bool {
        let Part::Shadow(s) = &mut self.part else { return false };
        let Some(mut rebase) = s.rebase.take() else { return false };
        let link = rebase.link;
        let linked = self.links.by_id.get(&link).is_some_and(|l| matches!(l.state, LinkState::Rebasing));
        if !linked && !matches!(rebase.step, Step::Turning(_)) {
            return true; // the primary holds nothing for it any more
        }
        let next = match rebase.step {
            Step::Draining(points) if self.is_drained_for_resync() => {
                // Of an image that is not whole no point of the history tells anything.
                let points = if self.meta.sb.consistent { points } else { Vec::new() };
                (Step::Searching(Search::new(points, self.image.applied.point.lsn, rebase.blank)), true)
            }
            Step::Searching(search) => self.search(link, search),
            Step::Offered(offer) => self.prepare(offer, rebase.touched.as_ref()),
            Step::Saving(saving) if saving.is_done() => {
                let since = saving.since;
                rebase.touched = saving.touched;
                self.send(link, Message::Resync { since });
                (Step::Asked(since), true)
            }
            Step::Saving(mut saving) => {
                let moved = self.pump_salvage(&mut saving);
                (Step::Saving(saving), moved)
            }
            Step::Marking(offer, 0) => (Step::Turning(self.save_rebase(*offer, &rebase.openings)), true),
            Step::Turning(ticket) if self.meta.is_saved(ticket) => {
                self.adopt();
                if linked {
                    self.set_state(link, LinkState::Settling(ticket));
                }
                return true;
            }
            waiting => (waiting, false),
        };
        let moved;
        (rebase.step, moved) = next;
        if let Part::Shadow(s) = &mut self.part
            && s.stopped.is_none()
        {
            s.rebase = Some(rebase);
        }
        moved
    }

    /// Everything that may go from the journal into the image is there, and checkpointed.
    fn is_drained_for_resync(&mut self) -> bool {
        let tail = self.journal.tail().point.lsn;
        if !self.journal.is_quiet() {
            self.journal.want(tail);
            return false;
        }
        let applied = self.image.applied.point.lsn;
        let behind = self.links.checkpoint < applied || self.image.repaired;
        let busy = self.image_waits() || !self.image.is_idle() || self.scrub.is_some();
        if busy || applied < self.meta.sb.limit.min(tail) {
            return false;
        }
        if behind || !self.checkpoint_idle() {
            self.hurry_checkpoint();
            return false;
        }
        true
    }

    /// Looks up the own chain hash at the primary's points. The step after it, and whether it was made.
    fn search(&mut self, id: LinkId, mut search: Search) -> (Step, bool) {
        let mut found = None;
        while let Some(lsn) = search.next()
            && found.is_none()
        {
            let own = match self.known_point(lsn) {
                Some(point) => Some(point.hash),
                None => {
                    let Some(link) = self.links.by_id.get_mut(&id) else {
                        return (Step::Searching(search), false);
                    };
                    match fetch!(self, link.reader, lsn) {
                        Fetched::Ready(record) => Some(record.chain),
                        Fetched::Pending => return (Step::Searching(search), false),
                        Fetched::Lost => None,
                    }
                }
            };
            found = search.compare(own);
        }
        // Only records that were nobody else's are saved; a shadow that is behind has none.
        let own = self.meta.sb.retired.is_some();
        let (oldest, last) = (self.journal.oldest().lsn, self.journal.tail().point.lsn);
        let last = if own { last } else { Lsn(0) };
        (Step::Saving(Saving::new(found, oldest, last, self.maps.gather())), true)
    }

    /// The point of the own history at this LSN, if it is known without the journal.
    fn known_point(&self, lsn: Lsn) -> Option<HistoryPoint> {
        let sb = &self.meta.sb;
        let start = HistoryPoint { lsn: Lsn(0), hash: origin(sb.group) };
        let ranges = self.maps.ranges().iter().map(|r| r.from).filter(|p| p.lsn > Lsn(0));
        let known = ranges.chain([start, sb.base.point, sb.checkpoint]).filter(|p| p.lsn == lsn);
        known.rev().find(|p| p.lsn > Lsn(0) || *p == start).or_else(|| self.point_at(lsn))
    }

    /// The primary tells what has changed there: the maps hold it from now on, whatever becomes of this.
    pub(super) fn candidates(&mut self, extents: &[Extent]) {
        extents.iter().for_each(|e| self.maps.mark(*e));
        if let Part::Shadow(s) = &mut self.part
            && let Some(touched) = s.rebase.as_mut().and_then(|r| r.touched.as_mut())
        {
            extents.iter().for_each(|e| self.maps.add(touched, *e));
        }
    }

    /// The primary names the point after which it holds its records.
    pub(super) fn rebase_offered(
        &mut self,
        link: LinkId,
        at: Anchor,
        since: Option<HistoryPoint>,
        members: Vec<NodeId>,
    ) {
        let term = self.meta.sb.term;
        let Part::Shadow(s) = &mut self.part else { return };
        let Some(rebase) = s.rebase.as_mut().filter(|r| r.link == link) else { return };
        let asked = match rebase.step {
            Step::Asked(asked) => asked,
            _ => return self.drop_link(link, "it offers what was not asked for"),
        };
        let known = since.is_none_or(|p| asked == Some(p) && p.lsn <= at.point.lsn);
        if !known || at.point.lsn == Lsn(0) || at.generation.term > term {
            return self.drop_link(link, "it offers a point that can't be in its history");
        }
        let runs = |g| g == Generation::default() || rebase.openings.iter().any(|o| o.generation == g);
        if !runs(at.generation) {
            // What leads there would never be known here.
            return self.drop_link(link, "it has begun another run since it said who it is");
        }
        rebase.step = Step::Offered(Box::new(Offer { at, since, members }));
    }

    /// The image here is worth nothing beside a new one: it can be made in place.
    fn remakes_in_place(&self) -> bool {
        let sb = &self.meta.sb;
        let asked = matches!(&self.part, Part::Shadow(s) if s.in_place);
        !sb.consistent || (sb.resync.is_none() && (asked || self.image.applied.point.lsn == Lsn(0)))
    }

    fn prepare(&mut self, offer: Box<Offer>, touched: Option<&Gathered>) -> (Step, bool) {
        let in_place = self.remakes_in_place();
        if !in_place && !self.stage_ready() {
            return (Step::Offered(offer), false);
        }
        if let Some(since) = offer.since {
            match (&self.meta.sb.resync, touched) {
                (None, Some(touched)) => self.maps.rewind_to(since, touched),
                (None, None) => self.maps.rewind(since.lsn),
                (Some(resync), _) if resync.since.is_some_and(|s| since.lsn < s.lsn) => {
                    self.maps.rewind(since.lsn)
                }
                (Some(_), _) => {}
            }
        }
        let mut sync = |owner, file| {
            let token = Token::new(owner, MARKED);
            self.disk.push(DiskRequest { token, file, op: DiskOp::Sync });
        };
        sync(MAPS, File::DirtyMaps);
        if in_place {
            return (Step::Marking(offer, 1), true);
        }
        // The superblock is not to name a stage that a power cut can still undo.
        sync(STAGE, File::StageMap);
        (Step::Marking(offer, 2), true)
    }

    /// The dirty maps are synced, or the stage's map is.
    pub(super) fn marked(&mut self) {
        if let Part::Shadow(s) = &mut self.part
            && let Some(Rebase { step: Step::Marking(_, left), .. }) = &mut s.rebase
        {
            *left -= 1;
        }
    }

    fn save_rebase(&mut self, offer: Offer, openings: &[Opening]) -> Ticket {
        let Offer { at, since, members } = offer;
        self.tell_given_up(since.map_or(Lsn(0), |p| p.lsn), "a resync: the journal begins anew");
        let in_place = self.remakes_in_place();
        let old = OldImage {
            at: anchor(&self.image.applied),
            openings: self.meta.sb.openings.clone(),
            sync_set: self.meta.sb.sync_set.clone(),
        };
        let job = self.resync_number();
        let sb = &mut self.meta.sb;
        // What was to be compared before is still to be, with what has changed since.
        let fresh = Resync {
            job,
            stage: if in_place { ResyncStage::Copying } else { ResyncStage::Staging },
            since,
            progress: 0,
            compared: None,
            old: (!in_place).then_some(old),
        };
        let resync = match sb.resync.take() {
            Some(r) => {
                // Of two forks the earlier one: what lies between them is not of this history either.
                let since = r.since.zip(since).map(|(a, b)| if b.lsn < a.lsn { b } else { a });
                Resync { since, old: r.old.or(fresh.old), ..fresh }
            }
            None => fresh,
        };
        if resync.since.is_none() {
            self.maps.restart(at.point);
        }
        sb.consistent = !in_place;
        sb.resync = Some(resync);
        self.begin_journal(at, openings.iter().filter(|o| o.at.lsn <= at.point.lsn).copied().collect());
        self.meta.sb.sync_set = members;
        self.unconfirm();
        self.meta.save(true)
    }

    /// What the superblock says of a journal that begins anew after `at`, at which the image stands.
    fn begin_journal(&mut self, at: Anchor, openings: Vec<Opening>) {
        let segment = self.journal.head().segment + 1;
        let sb = &mut self.meta.sb;
        (sb.base, sb.base_segment) = (at, segment);
        (sb.checkpoint, sb.checkpoint_write) = (at.point, at.last_write);
        (sb.checkpoint_generation, sb.checkpoint_segment) = (at.generation, segment);
        (sb.floor, sb.limit) = (at.point.lsn, at.point.lsn);
        sb.redo = None;
        (sb.generation, sb.openings) = (at.generation, openings);
        sb.clean = false;
        sb.maps = self.maps.ranges().to_vec();
    }

    /// The superblock names the new journal, durably.
    fn adopt(&mut self) {
        let sb = &self.meta.sb;
        let Anchor { point, generation, last_write, time } = sb.base;
        let tail = Tail { point, generation, last_write, time, durable: Lsn(0) };
        let head = Place { segment: sb.base_segment, offset: 0 };
        self.journal = Journal::new(JOURNAL, sb.group, sb.geometry, head, Vec::new(), tail);
        self.feed.clear();
        self.backlog.clear();
        self.image.journal_cut();
        self.image.applied = tail;
        self.links.checkpoint = point.lsn;
        self.restart_timeline(&tail);
        self.lacks_since(&tail);
        self.maps.settled();
        self.forget_held();
        self.marks.cut(point.lsn);
        self.job_failed("the journal began anew");
        if let Part::Shadow(s) = &mut self.part {
            s.begin_anew(point.lsn);
        }
        self.look_again();
        self.aim();
        self.update_keep();
        let stage = self.meta.sb.resync.as_ref().map(|r| r.stage);
        if let Part::Shadow(s) = &mut self.part {
            s.in_place &= stage != Some(ResyncStage::Copying);
        }
        let text = match stage {
            None => "the image stays the one of",
            Some(ResyncStage::Copying) => "the image is made anew in place, from",
            Some(_) => "a new image is made beside the old one, from",
        };
        self.log(Level::Info, format!("{text} LSN {}", point.lsn));
    }

    /// Gives the resync up: back to the old image. `why`: what stopped it.
    pub(super) fn retreat(&mut self, why: Option<String>) {
        let Part::Shadow(s) = &mut self.part else { return };
        if s.retreat.is_some() {
            return;
        }
        s.rebase = None;
        s.retreat = Some(Retreat { why: why.clone(), ticket: None });
        let text = why.unwrap_or_else(|| "it is not wanted any more".into());
        self.tell(Happening::ResyncStopped { reason: text.clone() });
        self.log(Level::Warn, format!("the resync stops: {text}. The old image stays"));
        self.job_failed(&text);
        self.close_links("the resync stops");
    }

    /// An administrator ends the comparison that a resync needs.
    pub(super) fn stop_resync(&mut self) {
        let why = "an administrator stopped it".to_owned();
        if self.is_staging() {
            return self.retreat(Some(why));
        }
        if let Part::Shadow(s) = &mut self.part {
            s.stopped = Some(why);
        }
    }

    /// An administrator wants the resync that stopped, or (`in_place`) another kind of the one that is under
    /// way. Whether there was one.
    pub(super) fn resume_resync(&mut self, in_place: bool) -> bool {
        let staging = self.is_staging();
        let Part::Shadow(s) = &mut self.part else { return false };
        let stopped = s.stopped.take().is_some();
        s.in_place |= in_place && (stopped || staging);
        if stopped {
            self.links.dial_now();
        } else if in_place && staging {
            self.retreat(None);
        }
        stopped || (in_place && staging)
    }

    /// Moves the way back on; whether anything moved.
    pub(super) fn pump_retreat(&mut self) -> bool {
        let Part::Shadow(s) = &mut self.part else { return false };
        let Some(retreat) = &s.retreat else { return false };
        if let Some(ticket) = retreat.ticket {
            if !self.meta.is_saved(ticket) {
                return false;
            }
            let why = s.retreat.take().and_then(|r| r.why);
            s.stopped = why.or(s.stopped.take());
            self.drop_stage();
            self.adopt();
            return true;
        }
        let tail = self.journal.tail().point.lsn;
        if !self.journal.is_quiet() {
            self.journal.want(tail);
            return false;
        }
        if self.scrub.is_some() || !self.image.is_quiet() || !self.abandon_checkpoint() {
            return false;
        }
        let Some(resync) = self.meta.sb.resync.take() else { return self.end_retreat() };
        let Some(old) = resync.old else {
            self.meta.sb.resync = Some(resync);
            return self.end_retreat();
        };
        // A map file that was lost meanwhile begins at a point that the old image never was at.
        if resync.since.is_none_or(|since| self.maps.ranges()[0].from.lsn > since.lsn) {
            self.maps.restart(old.at.point);
        }
        self.tell_given_up(old.at.point.lsn, "the resync stopped: the old image stays");
        self.begin_journal(old.at, old.openings);
        self.meta.sb.sync_set = old.sync_set;
        let ticket = self.meta.save(true);
        if let Part::Shadow(s) = &mut self.part
            && let Some(r) = &mut s.retreat
        {
            r.ticket = Some(ticket);
        }
        true
    }

    /// There is nothing to go back to: it was never left.
    fn end_retreat(&mut self) -> bool {
        if let Part::Shadow(s) = &mut self.part {
            let why = s.retreat.take().and_then(|r| r.why);
            s.stopped = why.or(s.stopped.take());
        }
        true
    }
}

/// A tail, as the superblock keeps it.
pub(super) fn anchor(tail: &Tail) -> Anchor {
    let Tail { point, generation, last_write, time, .. } = *tail;
    Anchor { point, generation, last_write, time }
}
