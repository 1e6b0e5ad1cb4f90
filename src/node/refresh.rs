//! The comparison as a job: on the shadow that runs it, and as a primary asks for it.
//!
//! Owns: the job's windows, its pace, its progress and its outcome. Invariants: a window counts as
//! compared only when its repairs are in the image, and as durable progress only when a sync has covered
//! them; "identical" is said only after the last window and a checkpoint behind it; a job that lost its
//! link goes on by itself from its first unfinished window.

use super::compare::Side;
use super::event::{AdminId, Level, LinkId, Refresh, Refusal};
use super::links::LinkState;
use super::report::rfc3339;
use super::run::{Part, Run};
use super::status::{DifferentRange, RefreshStatus, Verified};
use crate::apply::Source;
use crate::format::compare::{Compare, MAX_REPORT};
use crate::format::record::Record;
use crate::resync::MAX_OPEN;
use crate::resync::plan::{Meter, Plan, Throttle};
use crate::resync::target::{Finished, Target};
use crate::units::{Extent, Lsn, SECONDS};

/// Ranges that are told.
const MAX_RANGES: usize = 1000;
/// Ranges that are logged one by one.
const MAX_LINES: usize = 16;
/// Payload bytes of one batch of repairs.
const BATCH: u64 = 4 << 20;

/// What the job is at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Comparing,
    /// All windows are done: a checkpoint makes the repairs durable.
    Settling,
    Over,
}

struct Job {
    status: RefreshStatus,
    serial: u64,
    phase: Phase,
    verify: bool,
    plan: Plan,
    target: Target,
    throttle: Throttle,
    meter: Meter,
    next_window: u32,
    /// Since when it runs without a pause (monotonic), and the nanoseconds before that.
    since: Option<u64>,
    spent: u64,
    /// The image's LSN when its last window was done.
    settled_at: Lsn,
    reported: u64,
    /// Position before which everything is compared and durable; and as a sync under way will have it.
    durable: u64,
    syncing: u64,
    /// What it makes equal is the new image of a resync.
    remakes: bool,
}

/// See the module's documentation.
#[derive(Default)]
pub struct Refreshing {
    job: Option<Job>,
    /// On a primary: who asked, and of which link.
    asked: Option<(AdminId, LinkId)>,
    wire: u64,
    /// The last proof of equality.
    pub(super) verified: Option<Verified>,
}

impl Refreshing {
    /// The machine, if it is the one with this number.
    pub(super) fn target(&mut self, serial: u64) -> Option<&mut Target> {
        self.job.as_mut().filter(|j| j.serial == serial && j.phase == Phase::Comparing).map(|j| &mut j.target)
    }

    /// Something waits to be repaired.
    pub(super) fn has_repairs(&self) -> bool {
        self.job.as_ref().is_some_and(|j| j.phase == Phase::Comparing && j.target.has_repairs())
    }

    /// A word was sent or came.
    pub(super) fn count_wire(&mut self, word: &Compare) {
        if !matches!(word, Compare::Report { .. }) {
            self.wire += word.wire_len();
        }
    }

    /// For a resync: the position before which everything is compared and, by the syncs that are done, durable.
    pub(super) fn resync_progress(&self) -> u64 {
        self.job.as_ref().filter(|j| j.remakes && j.phase == Phase::Comparing).map_or(0, |j| j.syncing)
    }

    /// The job, as it is told.
    pub(super) fn status(&self) -> Option<&RefreshStatus> {
        self.job.as_ref().map(|j| &j.status)
    }
}

impl Job {
    fn is_running(&self) -> bool {
        self.phase != Phase::Over
    }

    /// Everything before it has been compared.
    fn low_water(&self) -> u64 {
        self.target.first_open().unwrap_or(u64::MAX).min(self.plan.position())
    }
}

impl Run {
    /// An administrator asks for a comparison.
    pub(super) fn refresh(&mut self, id: AdminId, wish: Refresh) {
        match self.part {
            Part::Primary(_) => self.refresh_there(id, &wish),
            Part::Shadow(_) => {
                let begun = self.begin_refresh(&wish, if wish.verify { "verify" } else { "refresh" });
                self.answer(id, begun);
            }
        }
    }

    /// Hands the wish to the shadow that is meant.
    fn refresh_there(&mut self, id: AdminId, wish: &Refresh) {
        let fed = |l: &super::links::Link| matches!(l.state, LinkState::Sending(_));
        let name = |l: &super::links::Link| l.peer().and_then(|n| self.links.view(n)).map(|v| v.name.clone());
        let fed =
            self.links.by_id.iter().filter(|(_, l)| fed(l)).map(|(id, l)| (*id, name(l).unwrap_or_default()));
        let mut fed: Vec<(LinkId, String)> = fed.collect();
        if let Some(peer) = &wish.peer {
            fed.retain(|(_, name)| name == peer);
        }
        let link = match &fed[..] {
            [(link, _)] => *link,
            [] => {
                let who = wish.peer.as_deref().unwrap_or("a shadow");
                let text = format!("{who} is not connected: bring it or its link back, then try again");
                return self.answer(id, Err((Refusal::Unreachable, text)));
            }
            several => {
                let names: Vec<_> = several.iter().map(|(_, n)| n.as_str()).collect();
                let text = format!("there are several shadows: name one with --peer ({})", names.join(", "));
                return self.answer(id, Err((Refusal::Busy, text)));
            }
        };
        if self.compare.job.asked.is_some() {
            return self.answer(id, Err((Refusal::Busy, "it is being asked for already".into())));
        }
        self.compare.job.asked = Some((id, link));
        let Refresh { quick, verify, rate, restart, .. } = *wish;
        self.say(link, Compare::Begin { quick, verify, rate, restart });
    }

    /// An administrator wants the job to end.
    pub(super) fn refresh_stop(&mut self, id: AdminId) {
        if let Part::Primary(_) = self.part {
            let running = |s: &RefreshStatus| matches!(s.state.as_str(), "Running" | "Waiting");
            let named = self.compare.told.as_ref().filter(|s| running(s)).map(|s| s.shadow.clone());
            let link = named.and_then(|name| {
                let view = self.links.peers.iter().find(|p| p.name == name)?;
                let fed = |l: &super::links::Link| matches!(l.state, LinkState::Sending(_));
                self.links.by_id.iter().find(|(_, l)| fed(l) && l.peer() == view.node).map(|(id, _)| *id)
            });
            return match link {
                Some(link) => {
                    self.say(link, Compare::Stop);
                    self.answer(id, Ok("the shadow was told to stop".into()));
                }
                None => self.answer(id, Err((Refusal::Busy, "no comparison is under way".into()))),
            };
        }
        if self.compare.job.job.as_ref().is_none_or(|j| !j.is_running()) {
            return self.answer(id, Err((Refusal::Busy, "no comparison is under way".into())));
        }
        self.end_job("Stopped", Some("an administrator stopped it".into()));
        self.answer(id, Ok("stopped; what was repaired stays".into()));
    }

    /// Begins a job here, or goes on with one that was interrupted.
    pub(super) fn begin_refresh(
        &mut self,
        wish: &Refresh,
        cause: &'static str,
    ) -> Result<String, (Refusal, String)> {
        if self.resume_resync() {
            return Ok("the resync begins again".into());
        }
        if self.is_remaking() {
            return Err((Refusal::Busy, "a resync is under way: it ends with an equal image".into()));
        }
        if self.links.receiving().is_none() {
            let text = "the primary is not connected: bring it or its link back, then try again";
            return Err((Refusal::Unreachable, text.into()));
        }
        let running = self.compare.job.job.as_ref().filter(|j| j.is_running());
        if let Some(running) = running {
            let text = format!("a {} is under way already; `--stop` ends it", running.status.cause);
            return Err((Refusal::Busy, text));
        }
        let volumes: Vec<_> = self.meta.sb.volumes.iter().map(|v| (v.number, v.size)).collect();
        let plan = Plan::new(volumes, None, 0);
        self.begin_job(wish, cause, plan);
        Ok(format!("the {cause} has begun"))
    }

    /// Compares for a resync: what differs becomes the new image.
    pub(super) fn begin_resync_job(
        &mut self,
        cause: &'static str,
        candidates: Option<Vec<Extent>>,
        from: u64,
    ) {
        self.job_failed("a resync takes its place");
        let volumes: Vec<_> = self.meta.sb.volumes.iter().map(|v| (v.number, v.size)).collect();
        self.begin_job(&Refresh::default(), cause, Plan::new(volumes, candidates, from));
        if let Some(job) = &mut self.compare.job.job {
            job.remakes = true;
            (job.durable, job.syncing) = (from, from);
        }
    }

    /// Whether a job of that cause runs, or waits for its link.
    pub(super) fn is_comparing(&self, cause: &str) -> bool {
        self.compare.job.job.as_ref().is_some_and(|j| j.is_running() && j.status.cause == cause)
    }

    fn begin_job(&mut self, wish: &Refresh, cause: &'static str, plan: Plan) {
        let serial = self.compare.serial();
        let status = RefreshStatus {
            job: self.now.wall,
            shadow: self.cfg.name.clone(),
            cause: cause.into(),
            quick: wish.quick,
            state: "Running".into(),
            started: rfc3339(self.now.wall).unwrap_or_default(),
            total: plan.total,
            ..RefreshStatus::default()
        };
        self.compare.job.wire = 0;
        self.compare.job.job = Some(Job {
            status,
            serial,
            phase: Phase::Comparing,
            verify: wish.verify,
            plan,
            target: Target::new(self.compare.key, wish.verify),
            throttle: Throttle::new(wish.rate),
            meter: Meter::default(),
            next_window: 0,
            since: None,
            spent: 0,
            settled_at: Lsn(0),
            reported: 0,
            durable: 0,
            syncing: 0,
            remakes: false,
        });
        self.log(Level::Info, format!("{cause}: comparing with the primary"));
        self.report_job();
    }

    /// A word of the comparison came over the link that brings records.
    pub(super) fn heard_as_shadow(&mut self, link: LinkId, word: Compare) {
        self.compare.job.count_wire(&word);
        match word {
            Compare::Begin { quick, verify, rate, restart } => {
                let wish = Refresh { peer: None, quick, verify, rate, restart };
                let cause = if verify { "verify" } else { "refresh" };
                if let Err((_, text)) = self.begin_refresh(&wish, cause) {
                    self.say(link, Compare::Fail { text });
                }
            }
            Compare::Stop => {
                if self.compare.job.job.as_ref().is_some_and(Job::is_running) {
                    self.end_job("Stopped", Some("an administrator stopped it on the primary".into()));
                }
            }
            Compare::Fail { text } => self.job_failed(&text),
            word => {
                let mut out = Vec::new();
                let Some(job) = self.compare.job.job.as_mut().filter(|j| j.phase == Phase::Comparing) else {
                    return; // the rest of what was asked for by a job that has ended
                };
                let serial = job.serial;
                match job.target.heard(word, &mut out) {
                    Ok(()) => self.do_tasks(Side::Target, serial, out),
                    Err(why) => self.distrust(why),
                }
            }
        }
    }

    /// A shadow told how its job stands, or why there is none.
    pub(super) fn job_reported(&mut self, link: LinkId, json: &[u8]) {
        let Ok(status) = serde_json::from_slice::<RefreshStatus>(json) else {
            return self.drop_link(link, "its report can't be read");
        };
        if let Some((id, _)) = self.compare.job.asked.take_if(|(_, asked)| *asked == link) {
            self.answer(id, Ok(format!("the {} has begun on {}", status.cause, status.shadow)));
        }
        self.compare.told = Some(status);
    }

    /// The shadow can't do what it was asked for.
    pub(super) fn job_refused(&mut self, link: LinkId, text: String) {
        if let Some((id, _)) = self.compare.job.asked.take_if(|(_, asked)| *asked == link) {
            self.answer(id, Err((Refusal::Busy, text)));
        }
    }

    /// A record touches its extents from now on.
    pub(super) fn job_touched(&mut self, record: &Record) {
        if let Some(job) = self.compare.job.job.as_mut().filter(|j| j.phase == Phase::Comparing) {
            record.extents().for_each(|(extent, _)| job.target.touch(record.stamp.lsn, extent));
        }
    }

    /// Moves the job on; whether anything moved.
    pub(super) fn pump_refresh(&mut self) -> bool {
        if let Some((id, link)) = self.compare.job.asked
            && !self.links.by_id.get(&link).is_some_and(|l| matches!(l.state, LinkState::Sending(_)))
        {
            self.compare.job.asked = None;
            self.answer(id, Err((Refusal::Unreachable, "the link to the shadow went down".into())));
        }
        let connected = self.links.receiving().is_some();
        let shadow = matches!(self.part, Part::Shadow(_));
        let Some(job) = self.compare.job.job.as_mut().filter(|j| j.is_running()) else { return false };
        if !shadow {
            self.end_job("Stopped", Some("this node was promoted".into()));
            return true;
        }
        match (job.phase, connected) {
            (Phase::Comparing, false) => self.suspend_job(),
            (Phase::Comparing, true) => self.pump_windows(),
            (Phase::Settling, _) => self.settle_job(),
            (Phase::Over, _) => false,
        }
    }

    /// The link is gone: what was in flight is forgotten, the rest stays.
    fn suspend_job(&mut self) -> bool {
        let serial = self.compare.serial();
        let (key, now) = (self.compare.key, self.now.mono);
        let Some(job) = &mut self.compare.job.job else { return false };
        let Some(since) = job.since.take() else { return false };
        job.spent += now.saturating_sub(since);
        let volumes: Vec<_> = self.meta.sb.volumes.iter().map(|v| (v.number, v.size)).collect();
        job.plan = Plan::new(volumes, job.plan.candidates().cloned(), job.low_water());
        let repaired = job.target.repaired;
        job.target = Target::new(key, job.verify);
        job.target.repaired = repaired;
        job.serial = serial;
        job.status.state = "Waiting".into();
        job.status.reason = Some("the link to the primary is down".into());
        true
    }

    fn pump_windows(&mut self) -> bool {
        let (applied, now) = (self.image.applied.point.lsn, self.now.mono);
        let Some(job) = &mut self.compare.job.job else { return false };
        job.since.get_or_insert(now);
        job.status.state = "Running".into();
        job.status.reason = None;
        let serial = job.serial;
        let mut out = Vec::new();
        job.target.applied(applied, &mut out);
        let mut wake = None;
        while job.target.open_windows() < MAX_OPEN {
            wake = job.throttle.wait(now);
            if wake.is_some() {
                break;
            }
            let Some((extent, wanted)) = job.plan.next_window() else { break };
            job.throttle.take(extent.len(), now);
            job.next_window += 1;
            job.target.open(job.next_window, extent, wanted, job.status.quick, |_| None, &mut out);
        }
        let finished = job.target.take_finished();
        let moved = !out.is_empty() || !finished.is_empty();
        self.do_tasks(Side::Target, serial, out);
        finished.into_iter().for_each(|w| self.window_done(w));
        let Some(job) = &mut self.compare.job.job else { return moved };
        if job.target.open_windows() == 0 && job.plan.is_done() {
            job.phase = Phase::Settling;
            job.settled_at = applied;
            self.image.repaired = true;
            self.hurry_checkpoint();
            return true;
        }
        if let Some(at) = wake {
            self.wake_at(at);
        }
        self.beat_job();
        moved
    }

    fn window_done(&mut self, window: Finished) {
        let found = rfc3339(self.now.wall).unwrap_or_default();
        let (own, primary) = (self.cfg.name.clone(), self.primary_name());
        let volumes = &self.meta.sb.volumes;
        let Some(job) = &mut self.compare.job.job else { return };
        let range = |e: &Extent, node: Option<&String>| DifferentRange {
            volume: volumes
                .iter()
                .find(|v| v.number == e.address().volume())
                .map_or_else(String::new, |v| v.name.clone()),
            offset: e.address().offset(),
            len: e.len(),
            found: found.clone(),
            node: node.cloned(),
        };
        let status = &mut job.status;
        status.skipped += window.skipped;
        status.differ += window.different.iter().map(|e| e.len()).sum::<u64>();
        status.repaired = job.target.repaired;
        let before = status.ranges.len();
        let room = MAX_RANGES.saturating_sub(before);
        status.ranges.extend(window.different.iter().take(room).map(|e| range(e, None)));
        let rotten = window.rotten.iter().map(|e| range(e, Some(&own)));
        let theirs = window.their_rotten.iter().map(|e| range(e, Some(&primary)));
        let room = MAX_RANGES.saturating_sub(status.rotten.len());
        status.rotten.extend(rotten.chain(theirs).take(room));
        let room = MAX_LINES.saturating_sub(before);
        let lines: Vec<String> = window
            .different
            .iter()
            .take(room)
            .map(|e| range(e, None))
            .map(|r| {
                format!(
                    "{}: {} at {}, {} bytes, differed from the primary",
                    status.cause, r.volume, r.offset, r.len
                )
            })
            .collect();
        lines.into_iter().for_each(|line| self.log(Level::Warn, line));
    }

    fn primary_name(&self) -> String {
        let view = self.links.primary().and_then(|n| self.links.view(n));
        view.map_or_else(|| "the primary".into(), |v| v.name.clone())
    }

    /// Progress, at intervals.
    fn beat_job(&mut self) {
        let (now, beat) = (self.now.mono, self.cfg.timing.heartbeat);
        let wire = self.compare.job.wire;
        let Some(job) = &mut self.compare.job.job else { return };
        job.status.compared = job.plan.before(job.low_water());
        let waits =
            if job.throttle.wait(now).is_some() { Some("the rate limit") } else { job.target.waits_for() };
        job.meter.sample(now, job.status.compared, waits);
        job.status.repaired = job.target.repaired;
        job.status.wire = wire;
        job.status.rate = job.meter.rate();
        job.status.eta = job.meter.eta(job.status.total.saturating_sub(job.status.compared));
        job.status.limited_by = job.meter.limited_by().map(str::to_owned);
        let spent = job.spent + job.since.map_or(0, |since| now.saturating_sub(since));
        job.status.seconds = spent as f64 / SECONDS as f64;
        let due = job.reported + beat;
        if now >= due {
            self.report_job();
        } else {
            self.wake_at(due);
        }
    }

    fn report_job(&mut self) {
        let now = self.now.mono;
        let Some(job) = &mut self.compare.job.job else { return };
        job.reported = now;
        let Ok(json) = serde_json::to_vec(&job.status) else { return };
        if json.len() <= MAX_REPORT
            && let Some(link) = self.links.receiving()
        {
            self.say(link, Compare::Report { json: json.into() });
        }
    }

    /// All windows are done: once the repairs are durable, the outcome is true.
    fn settle_job(&mut self) -> bool {
        if self.image.repaired || !self.checkpoint_idle() {
            return false;
        }
        let (at, wall) = (self.image.applied.point.lsn, self.now.wall);
        self.beat_job();
        let Some(job) = &mut self.compare.job.job else { return false };
        let identical = !job.verify || job.status.differ == 0;
        let left = job.status.rotten.iter().any(|r| r.node.as_ref() != Some(&job.status.shadow));
        job.status.compared = job.status.total;
        job.status.lsn = (identical && !left).then_some(at.0);
        if identical && !left {
            let differences = job.status.differ;
            let at_time = rfc3339(wall).unwrap_or_default();
            self.compare.job.verified = Some(Verified { at: at_time, lsn: at.0, differences });
        }
        let remakes = job.remakes;
        self.end_job("Done", None);
        if remakes {
            self.all_compared(at);
        }
        true
    }

    /// The job has failed; what was repaired stays.
    pub(super) fn job_failed(&mut self, why: &str) {
        if self.compare.job.job.as_ref().is_some_and(Job::is_running) {
            self.end_job("Failed", Some(why.to_owned()));
        }
    }

    fn end_job(&mut self, state: &'static str, reason: Option<String>) {
        let (key, now, wire) = (self.compare.key, self.now.mono, self.compare.job.wire);
        let Some(job) = &mut self.compare.job.job else { return };
        job.phase = Phase::Over;
        let stopped = job.remakes && state == "Stopped";
        let spent = job.spent + job.since.take().map_or(0, |since| now.saturating_sub(since));
        job.status.seconds = spent as f64 / SECONDS as f64;
        job.status.wire = wire;
        job.status.state = state.into();
        job.status.reason.clone_from(&reason);
        job.status.eta = None;
        job.status.repaired = job.target.repaired;
        // Windows that are still open on the primary are closed there, and memory is given back.
        let open = job.target.open_numbers();
        job.target = Target::new(key, job.verify);
        let s = &job.status;
        let text = format!(
            "{} {}: {} bytes compared, {} differed, {} repaired{}",
            s.cause,
            state.to_lowercase(),
            s.compared,
            s.differ,
            s.repaired,
            reason.map_or_else(String::new, |r| format!(" ({r})"))
        );
        let level = if state == "Done" { Level::Info } else { Level::Warn };
        self.log(level, text);
        if let Some(link) = self.links.receiving() {
            open.into_iter().for_each(|window| self.say(link, Compare::Close { window }));
        }
        self.report_job();
        if stopped {
            self.stop_resync();
        }
    }

    /// A batch of repairs goes into the image.
    pub(super) fn begin_repairs(&mut self) -> bool {
        let Some(job) = &mut self.compare.job.job else { return false };
        let batch = job.target.take_repairs(BATCH);
        let source = |bytes| match bytes {
            Some(bytes) => Source::Bytes(bytes),
            None => Source::Zeroes,
        };
        self.image.repaired = true;
        self.begin_batch(batch.into_iter().map(|(extent, bytes)| (extent, source(bytes))).collect(), None);
        true
    }

    /// It is there.
    pub(super) fn repairs_written(&mut self) {
        let mut out = Vec::new();
        let Some(job) = &mut self.compare.job.job else { return };
        let serial = job.serial;
        job.target.written(&mut out);
        self.do_tasks(Side::Target, serial, out);
    }

    /// A checkpoint's syncs begin: they cover what has been repaired.
    pub(super) fn job_syncing(&mut self) {
        if let Some(job) = &mut self.compare.job.job {
            job.syncing = job.low_water();
        }
    }

    /// They are done, and the superblock says so.
    pub(super) fn job_synced(&mut self) {
        if let Some(job) = &mut self.compare.job.job {
            job.durable = job.syncing;
        }
    }
}
