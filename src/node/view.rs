//! A view of a shadow: its image, frozen at a record, for others to read, and with an overlay to write to.
//!
//! Owns: from when to when nothing is written to the backings for a view's sake, its requests, and the overlay.
//! Invariants: what a view shows is the image of exactly the records 1..k (I1), under what was written to the view
//! itself; of these records the image itself may lack the last ones, which then are read from the journal and stay out
//! of it, so that whoever looks takes nothing from what may yet be chosen; what was written goes into the overlay alone, which is dropped before the next record is applied; whatever becomes of
//! a view, the shadow goes on: it receives, acknowledges and keeps records meanwhile, and a view that would fill its
//! journal fails. A view lives in this process only: the next one finds an overlay and drops it.

use super::VIEW;
use super::event::{Action, AdminId, At, Level, Op, Refusal, RequestId};
use super::reading::ReadFor;
use super::rewind::Purpose;
use super::run::{Part, Run};
use super::status::{ViewStatus, rfc3339};
use crate::apply::stage::Stage;
use crate::disk::{DiskOp, DiskRequest, DiskResult, File, IoError, Memory, Payload, Token, aligned, freeze};
use crate::format::mapped::Owner;
use crate::units::{Extent, Lsn};
use bytes::Bytes;
use slab::Slab;
use std::collections::VecDeque;

/// Requests of a view that are with the disks at once.
const DEPTH: usize = 64;
/// Requests that wait and are looked at for one that need not.
const AHEAD: usize = 64;
/// What the overlay's map calls its owner's resync: there is none of that number.
const NUMBER: u64 = u64::MAX;

/// Where a view stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// What is being applied is finished, up to the record that is wanted.
    Reaching,
    /// The overlay is being made.
    Making,
    Open,
    /// What the disks have of it is awaited.
    Ending,
    /// It shows nothing any more, and the image is free.
    Failed,
}

/// See the module's documentation.
pub struct View {
    scratch: bool,
    /// It shows the image of exactly this record, or of any from that one on.
    at: Option<Lsn>,
    from: Lsn,
    /// The image lacks the last records up to `at`: they are read from the journal.
    through: bool,
    step: Step,
    overlay: Option<Stage>,
    /// The overlay's files are there, or are being made.
    made: bool,
    /// Bytes of the volumes that lie in the overlay.
    written: u64,
    since: u64,
    opening: Option<AdminId>,
    closing: Vec<AdminId>,
    /// Why it failed, or is about to.
    failed: Option<String>,
    waiting: VecDeque<(RequestId, Op)>,
    calls: Slab<Call>,
}

/// A request that is with the disks.
struct Call {
    /// Until it is answered.
    id: Option<RequestId>,
    extent: Extent,
    what: What,
}

enum What {
    Write,
    /// Which parts lie in the overlay; what came of the backing and of the overlay; how many are to come.
    Read {
        parts: Vec<(Extent, bool)>,
        from: [Option<DiskResult>; 2],
        left: u8,
    },
}

/// Where an operation goes, and whether it writes.
fn place(op: &Op) -> Option<(Extent, bool)> {
    match op {
        Op::Read(extent) => Some((*extent, false)),
        Op::Write { extent, .. } | Op::Zero { extent, .. } => Some((*extent, true)),
        Op::Flush => None,
    }
}

/// Two operations whose order matters.
fn clash((a, a_writes): (Extent, bool), (b, b_writes): (Extent, bool)) -> bool {
    (a_writes || b_writes) && a.start() < b.end() && b.start() < a.end()
}

impl View {
    fn new(scratch: bool, at: Option<Lsn>, from: Lsn, id: AdminId, since: u64) -> View {
        View {
            scratch,
            at,
            from,
            through: false,
            step: Step::Reaching,
            overlay: None,
            made: false,
            written: 0,
            since,
            opening: Some(id),
            closing: Vec::new(),
            failed: None,
            waiting: VecDeque::new(),
            calls: Slab::new(),
        }
    }

    /// Nothing may be put into an image that stands at `applied`.
    fn holds(&self, applied: Lsn) -> bool {
        match self.step {
            Step::Reaching => applied >= self.at.unwrap_or(self.from),
            Step::Making | Step::Open | Step::Ending => true,
            Step::Failed => false,
        }
    }

    /// Nothing above it is wanted in the image.
    pub fn wanted(&self) -> Lsn {
        self.at.filter(|_| self.step == Step::Reaching).unwrap_or(Lsn(u64::MAX))
    }

    /// The record whose image it shows, over one that stands at `applied`.
    fn shows(&self, applied: Lsn) -> Lsn {
        self.at.filter(|_| self.through).unwrap_or(applied)
    }

    /// The overlay is awaited.
    pub(super) fn is_making(&self) -> bool {
        self.step == Step::Making
    }

    /// Everything that was not answered.
    fn take_requests(&mut self) -> Vec<RequestId> {
        let calls = self.calls.iter_mut().filter_map(|(_, call)| call.id.take());
        let mut ids: Vec<_> = calls.collect();
        ids.extend(self.waiting.drain(..).map(|(id, _)| id));
        ids
    }

    /// The next request that nothing before it stands in the way of.
    fn next(&mut self) -> Option<(RequestId, Op)> {
        if self.calls.len() >= DEPTH {
            return None;
        }
        let busy = self.calls.iter().map(|(_, c)| (c.extent, matches!(c.what, What::Write)));
        let mut before: Vec<_> = busy.collect();
        for i in 0..self.waiting.len().min(AHEAD) {
            let here = place(&self.waiting[i].1)?;
            if !before.iter().any(|b| clash(*b, here)) {
                return self.waiting.remove(i);
            }
            before.push(here);
        }
        None
    }

    /// Gives it to the disks.
    /// A call that needs the image below, if it does.
    fn start(
        &mut self,
        id: RequestId,
        op: Op,
        disk: &mut Vec<DiskRequest>,
    ) -> Result<Option<(usize, Extent)>, IoError> {
        let Some((extent, _)) = place(&op) else { return Ok(None) };
        let (number, offset) = (extent.address().volume(), extent.address().offset());
        let mut ask = |key: usize, op| {
            let token = Token::new(VIEW, key as u64);
            disk.push(DiskRequest { token, file: File::Stage(number), op });
        };
        let id = Some(id);
        let op = match op {
            Op::Read(_) => {
                let whole = || vec![(extent, false)];
                let parts = self.overlay.as_ref().map_or_else(whole, |o| o.parts(extent));
                let wanted = [false, true].map(|over| parts.iter().any(|(_, is)| *is == over));
                let left = wanted.iter().filter(|w| **w).count() as u8;
                let what = What::Read { parts, from: [None, None], left };
                let key = self.calls.insert(Call { id, extent, what });
                if wanted[1] {
                    ask(key, DiskOp::Read { offset, len: extent.len() as usize });
                }
                return Ok(wanted[0].then_some((key, extent)));
            }
            Op::Write { data, .. } => DiskOp::Write { offset, data: copied(&data)?, dsync: false },
            Op::Zero { .. } => DiskOp::Zero { offset, len: extent.len() },
            Op::Flush => return Ok(None),
        };
        let key = self.calls.insert(Call { id, extent, what: What::Write });
        ask(key, op);
        Ok(None)
    }

    /// What was written lies in the overlay from now on.
    fn mark(&mut self, extent: Extent) {
        if let Some(overlay) = &mut self.overlay {
            let news = overlay.parts(extent).into_iter().filter(|(_, there)| !there);
            self.written += news.map(|(part, _)| part.len()).sum::<u64>();
            overlay.mark(extent);
        }
    }
}

/// A payload, once: the caller may change his buffer as soon as he has the answer.
fn copied(data: &Payload) -> Result<Bytes, IoError> {
    let mut buf = aligned(data.len() as usize);
    buf.resize(data.len() as usize, 0);
    data.copy(&mut buf)?;
    Ok(freeze(buf))
}

/// The parts of a read put together.
fn joined(extent: Extent, parts: &[(Extent, bool)], from: [Option<Bytes>; 2]) -> Bytes {
    match from {
        [Some(bytes), None] | [None, Some(bytes)] => bytes,
        [below, above] => {
            let mut buf = aligned(extent.len() as usize);
            for (part, over) in parts {
                let at = (part.start() - extent.start()) as usize;
                let source = if *over { &above } else { &below };
                buf.extend_from_slice(&source.as_deref().unwrap_or_default()[at..at + part.len() as usize]);
            }
            freeze(buf)
        }
    }
}

impl Run {
    fn view(&self) -> Option<&View> {
        if let Part::Shadow(s) = &self.part { s.view.as_ref() } else { None }
    }

    pub(super) fn view_mut(&mut self) -> Option<&mut View> {
        if let Part::Shadow(s) = &mut self.part { s.view.as_mut() } else { None }
    }

    /// A view keeps everything out of the backings.
    pub(super) fn view_holds(&self) -> bool {
        self.view().is_some_and(|v| v.holds(self.image.applied.point.lsn))
    }

    /// There is a view, and it has not failed.
    pub(super) fn is_viewed(&self) -> bool {
        self.view().is_some_and(|v| v.step != Step::Failed)
    }

    /// An administrator opens a view.
    pub(super) fn open_view(&mut self, id: AdminId, scratch: bool, at: Option<Lsn>) {
        if let Err(refused) = self.may_view(at) {
            return self.answer(id, Err(refused));
        }
        let since = self.now.wall;
        if let Part::Shadow(s) = &mut self.part {
            s.view = Some(View::new(scratch, at, s.whole_from(), id, since));
        }
    }

    /// The record of that time or mark is looked for first.
    pub(super) fn choose_view(&mut self, id: AdminId, scratch: bool, at: At) {
        match self.may_view(None) {
            Ok(()) => self.begin_choosing(id, at, Purpose::View { scratch }),
            Err(refused) => self.answer(id, Err(refused)),
        }
    }

    fn may_view(&self, at: Option<Lsn>) -> Result<(), (Refusal, String)> {
        let busy = |text: String| Err((Refusal::Busy, text));
        let group = &self.cfg.group_name;
        let Part::Shadow(s) = &self.part else {
            return busy("this node is the primary: a view is one of a shadow, so run it there".into());
        };
        if s.view.is_some() {
            return busy(format!("a view is open already: volrep view {group} --close"));
        }
        if !self.meta.sb.consistent {
            return busy("a full copy has not ended: there is no image to be seen yet. Wait for it".into());
        }
        if self.meta.sb.resync.is_some() || self.is_resyncing() {
            return busy("a resync is under way: wait until it has ended".into());
        }
        if self.compare.job.as_ref().is_some_and(super::job::Job::is_running) {
            let text = "a comparison is under way: wait for it, or end it (volrep refresh";
            return busy(format!("{text} {group} --stop)"));
        }
        if s.closing || self.admin.is_promoting() || self.admin.is_draining() {
            return busy("this node is shutting down, draining, or being promoted".into());
        }
        let applied = self.image.underway().point.lsn.max(s.whole_from());
        let most = self.journal.durable().min(s.vouched()).max(applied);
        match at {
            Some(lsn) if lsn < applied => busy(format!(
                "the image here is that of LSN {applied} already: LSN {lsn} can't be shown any more"
            )),
            Some(lsn) if lsn > most => busy(format!(
                "LSN {lsn} is not here yet, or not known to be durable on the primary: the newest is {most}"
            )),
            Some(lsn) if self.is_out_of_reach(lsn) => busy(self.out_of_reach(lsn)),
            _ => Ok(()),
        }
    }

    /// It is held back, with so much before it that it can't be read beside the image.
    fn is_out_of_reach(&self, lsn: Lsn) -> bool {
        let applied = self.image.underway().point.lsn;
        matches!(&self.part, Part::Shadow(s) if lsn > s.delay.meant()) && !self.backlog.reaches(applied, lsn)
    }

    fn out_of_reach(&self, lsn: Lsn) -> String {
        let applied = self.image.underway().point.lsn;
        format!(
            "LSN {lsn} is held back here (apply_delay), and between it and LSN {applied}, at which the image stands, are \
             more writes than can be read beside it: choose an earlier one"
        )
    }

    /// An administrator closes the view.
    pub(super) fn close_view(&mut self, id: AdminId) {
        match self.view_mut() {
            None => self.answer(id, Ok("no view is open".into())),
            Some(view) => {
                view.closing.push(id);
                self.end_view("the view is being closed");
            }
        }
    }

    /// Ends the view, if there is one: what it has not answered fails.
    pub(super) fn end_view(&mut self, why: &str) {
        let Some(view) = self.view_mut() else { return };
        view.failed = None;
        view.step = Step::Ending;
        self.refuse_view(why);
    }

    /// The view can't go on; it stays, so that its users are told, until it is closed.
    fn fail_view(&mut self, why: String) {
        let Some(view) = self.view_mut().filter(|v| !matches!(v.step, Step::Ending | Step::Failed)) else {
            return;
        };
        if view.opening.is_some() {
            // Nobody has seen anything of it: there is nothing to stay for.
            self.log(Level::Warn, format!("the view is not opened: {why}"));
            return self.end_view(&why);
        }
        view.failed = Some(why.clone());
        view.step = Step::Ending;
        self.refuse_view(&why);
        let group = &self.cfg.group_name;
        let text = format!(
            "the view has failed: {why}. Its users get errors, and records are applied again; \
             volrep view {group} --close takes it away"
        );
        self.log(Level::Error, text);
    }

    /// The node can't go on, and neither can its view.
    pub(super) fn forget_view(&mut self, why: &str) {
        self.end_view(why);
        let Part::Shadow(s) = &mut self.part else { return };
        let closing = s.view.take().map(|v| v.closing).unwrap_or_default();
        for id in closing {
            self.answer(id, Err((Refusal::Failed, why.to_owned())));
        }
    }

    fn refuse_view(&mut self, why: &str) {
        let Some(view) = self.view_mut() else { return };
        let (opening, refused) = (view.opening.take(), view.take_requests());
        if let Some(id) = opening {
            self.answer(id, Err((Refusal::Failed, format!("no view: {why}"))));
        }
        refused.into_iter().for_each(|id| self.complete(id, Err(IoError::EIO)));
    }

    /// A request to the view.
    pub(super) fn view_request(&mut self, id: RequestId, op: Op) {
        let faulted = self.fault.is_some();
        let Some(view) = self.view_mut().filter(|v| v.step == Step::Open && !faulted) else {
            return self.complete(id, Err(IoError::EIO));
        };
        match place(&op) {
            // What was answered is where it is read from. Nothing of a view outlives the process.
            None => self.complete(id, Ok(Bytes::new())),
            Some((_, true)) if !view.scratch => self.complete(id, Err(IoError::EROFS)),
            Some(_) => {
                view.waiting.push_back((id, op));
                self.start_view_requests();
            }
        }
    }

    fn start_view_requests(&mut self) {
        loop {
            let Part::Shadow(s) = &mut self.part else { return };
            let Some(view) = s.view.as_mut().filter(|v| v.step == Step::Open) else { return };
            let Some((id, op)) = view.next() else { return };
            match view.start(id, op, &mut self.disk) {
                Ok(None) => {}
                Ok(Some((key, extent))) => self.read_below(ReadFor::View(key), extent, Vec::new()),
                Err(e) => self.complete(id, Err(e)),
            }
        }
    }

    /// The answer to a request to the overlay.
    pub(super) fn view_done(&mut self, key: u64, result: DiskResult) {
        self.view_answered(key as usize, true, result);
    }

    /// The image below was read.
    pub(super) fn view_read_done(&mut self, key: usize, result: DiskResult) {
        self.view_answered(key, false, result);
    }

    fn view_answered(&mut self, key: usize, over: bool, result: DiskResult) {
        let Some(view) = self.view_mut() else { return };
        let Some(call) = view.calls.get_mut(key) else { return };
        if let What::Read { from, left, .. } = &mut call.what {
            from[usize::from(over)] = Some(result.clone());
            *left -= 1;
            if *left > 0 {
                return;
            }
        }
        let Call { id, extent, what } = view.calls.remove(key);
        let (answer, failed) = match what {
            What::Write => match result {
                Ok(_) => {
                    view.mark(extent);
                    (Ok(Bytes::new()), None)
                }
                Err(e) if e == IoError::ENOSPC => (Err(e), Some(format!("its overlay is full ({e})"))),
                Err(e) => (Err(e), Some(format!("writing its overlay failed: {e}"))),
            },
            What::Read { parts, from: [below, above], .. } => match (below.transpose(), above.transpose()) {
                (Ok(below), Ok(above)) => (Ok(joined(extent, &parts, [below, above])), None),
                (_, Err(e)) => (Err(e), Some(format!("reading its overlay failed: {e}"))),
                // As on a disk: what can't be read fails alone.
                (Err(e), Ok(_)) => (Err(e), None),
            },
        };
        if let Some(id) = id {
            self.complete(id, answer);
        }
        if let Some(why) = failed {
            self.fail_view(why);
        }
        self.start_view_requests();
    }

    /// The answer to [`Action::OpenStage`] for the overlay.
    pub(super) fn overlay_opened(&mut self, result: Result<Box<dyn Memory>, String>) {
        let sb = &self.meta.sb;
        let id = Owner { group: sb.group, node: sb.node, number: NUMBER };
        let volumes = self.volume_sizes();
        let opened = result.and_then(|memory| {
            let overlay = Stage::new(memory, &volumes, id, true);
            overlay.ok_or_else(|| "its map is too short".to_owned())
        });
        let Some(view) = self.view_mut() else { return };
        match opened {
            Ok(overlay) => {
                view.overlay = Some(overlay);
                self.view_opened();
            }
            Err(why) => {
                self.fail_view(format!("there is no room for the overlay: {why}"));
            }
        }
    }

    fn view_opened(&mut self) {
        let applied = self.image.applied.point.lsn;
        let Some(view) = self.view_mut() else { return };
        view.step = Step::Open;
        let lsn = view.shows(applied);
        let kind = view.kind();
        if let Some(id) = view.opening.take() {
            self.log(
                Level::Info,
                format!("a {kind} view of LSN {lsn} is open: the image is frozen at LSN {applied}"),
            );
            self.answer(id, Ok(format!("frozen at LSN {lsn}")));
        }
    }

    /// Moves the view on; whether anything moved.
    pub(super) fn pump_view(&mut self) -> bool {
        let (applied, idle) = (self.image.applied.point.lsn, self.image.is_idle());
        let making = self.is_making_stage();
        let Some(view) = self.view() else { return false };
        let ahead = view.at.filter(|at| view.step == Step::Reaching && *at > applied);
        if let Some(at) = ahead.filter(|at| idle && self.is_out_of_reach(*at)) {
            self.fail_view(self.out_of_reach(at));
            return true;
        }
        let through = ahead.filter(|at| self.backlog.reaches(applied, *at));
        let Some(view) = self.view_mut() else { return false };
        match view.step {
            Step::Reaching if (through.is_some() || view.holds(applied)) && idle && !making => {
                view.through = through.is_some();
                if let Some(at) = through {
                    self.backlog.cover(at);
                }
                let Some(view) = self.view_mut() else { return false };
                if view.scratch {
                    (view.step, view.made) = (Step::Making, true);
                    self.make_overlay();
                } else {
                    self.view_opened();
                }
                true
            }
            Step::Ending if view.calls.is_empty() && !making => {
                self.view_ended();
                true
            }
            Step::Reaching | Step::Making | Step::Open => {
                self.view_fills_the_journal() || self.view_delays_a_flush()
            }
            Step::Ending | Step::Failed => false,
        }
    }

    /// The records after `lsn` are about to be given up.
    pub(super) fn view_loses(&mut self, lsn: Lsn) {
        if self.view().is_some_and(|v| v.through && v.at > Some(lsn)) {
            self.fail_view("the primary does not have what it shows".into());
        }
    }

    /// Before the last quarter is used up, so that the primary never waits for what is written in a view.
    fn view_fills_the_journal(&mut self) -> bool {
        let Part::Shadow(s) = &self.part else { return false };
        let applied = self.image.applied.point.lsn;
        let due = self.journal.durable().min(s.vouched()).min(s.delay.limit()) > applied;
        let (used, size) = self.journal.usage();
        if !self.view_holds() || !due || used <= size / 4 * 3 || self.links.checkpoint < applied {
            return false;
        }
        if self.leave_behind() {
            return true; // those who follow this shadow have held them, too
        }
        self.fail_view("the journal here is full of records that wait for it".into());
        true
    }

    /// A resync waits for the end of a view; but where this node is in the sync set, FLUSH on the primary waits for
    /// the resync.
    fn view_delays_a_flush(&mut self) -> bool {
        let needed = matches!(&self.part, Part::Shadow(s) if s.rebase.is_some());
        if !needed || !self.meta.sb.sync_set.contains(&self.cfg.node) {
            return false;
        }
        self.fail_view("a resync is needed, and FLUSH on the primary waits for this node".into());
        true
    }

    fn view_ended(&mut self) {
        let lsn = self.image.applied.point.lsn;
        let Part::Shadow(s) = &mut self.part else { return };
        let Some(view) = &mut s.view else { return };
        view.overlay = None;
        if std::mem::take(&mut view.made) {
            self.out.push(Action::DropStage);
        }
        if view.failed.is_some() {
            view.step = Step::Failed;
            return self.stop_reading_through();
        }
        let closing = std::mem::take(&mut view.closing);
        s.view = None;
        self.stop_reading_through();
        self.log(Level::Info, format!("the view is closed: records after LSN {lsn} are applied again"));
        for id in closing {
            self.answer(id, Ok("closed; the shadow catches up".into()));
        }
    }

    /// What is told of the view.
    pub(super) fn view_status(&self) -> Option<ViewStatus> {
        let view = self.view()?;
        let state = match view.step {
            Step::Reaching | Step::Making => "Opening",
            Step::Open => "Open",
            Step::Ending if view.failed.is_none() => "Closing",
            Step::Ending | Step::Failed => "Failed",
        };
        let applied = self.image.applied.point.lsn;
        Some(ViewStatus {
            kind: view.kind().into(),
            state: state.into(),
            reason: view.failed.clone(),
            lsn: (view.step == Step::Open).then_some(view.shows(applied).0),
            since: rfc3339(view.since).unwrap_or_default(),
            overlay_bytes: view.written,
            waiting_records: self.journal.tail().point.lsn.0.saturating_sub(applied.0),
            devices: Vec::new(),
        })
    }

    /// A shadow's state with what its view makes of it.
    pub(super) fn state_of_viewed(
        &self,
        (state, reason, action): (&'static str, Option<String>, String),
    ) -> (&'static str, Option<String>, String) {
        let Some((why, close)) = self.view_action() else { return (state, reason, action) };
        let reason = match reason {
            Some(_) if state == "CatchingUp" => Some(why),
            Some(reason) => Some(format!("{reason}; {why}")),
            None => None,
        };
        let action = if action.starts_with("none") { close } else { format!("{action}; {close}") };
        (state, reason, action)
    }

    /// What holds the image, and what to do about it.
    fn view_action(&self) -> Option<(String, String)> {
        let view = self.view_status()?;
        let close = format!("volrep view {} --close", self.cfg.group_name);
        if let Some(why) = view.reason {
            return Some((format!("a view has failed: {why}"), close));
        }
        let (lsn, n) = (self.image.applied.point.lsn, view.waiting_records);
        let resync = self.links.peers.iter().any(|v| v.state == "Resync") || self.is_resyncing();
        let then = if resync { "; a resync is needed, and begins once it is closed" } else { "" };
        let why = format!("a view holds the image at LSN {lsn}, and {n} records wait{then}");
        Some((why, format!("none; when you are done with the view: {close}")))
    }
}

impl View {
    fn kind(&self) -> &'static str {
        if self.scratch { "scratch" } else { "read-only" }
    }
}
