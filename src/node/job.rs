//! The comparison as a job, on the shadow that runs it.
//!
//! Owns: the job's windows, its pace, its progress and its outcome. Invariants: a window counts as
//! compared only when its repairs are in the image, and as durable progress only when a sync has covered
//! them; the superblock knows of a job before its first repair and until its last one is durable;
//! "identical" is said only after the last window and a checkpoint behind it; a job that lost its link or
//! its process goes on by itself from its first unfinished window.

use super::compare::Side;
use super::event::{Level, Refresh};
use super::history::Happening;
use super::meta::Ticket;
use super::run::{Part, Run};
use super::scrub::Spoilt;
use super::status::{DifferentRange, RefreshStatus, rfc3339};
use crate::apply::Source;
use crate::format::compare::{Compare, MAX_REPORT};
use crate::format::record::Record;
use crate::format::superblock::{Comparison, Verified};
use crate::resync::hash::UNKNOWN;
use crate::resync::plan::{Meter, Plan, Throttle};
use crate::resync::target::{Finished, Target};
use crate::resync::{FULL_OPEN, MAX_OPEN, extents};
use crate::units::{Extent, SECONDS};

/// Ranges that are told.
const MAX_RANGES: usize = 1000;
/// Ranges that are logged one by one.
const MAX_LINES: usize = 16;
/// Payload bytes of one batch of repairs.
const BATCH: u64 = 4 << 20;
/// Windows that may be done with while an earlier one is not.
const AHEAD: usize = 512;
/// What stands for a volume's name where the journal is spoilt; no volume has it.
const JOURNAL: &str = "(journal)";

/// What the job is at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Comparing,
    /// All windows are done: a checkpoint makes the repairs durable.
    Settling,
    Over,
}

/// Whether the journal was read again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum JournalRead {
    No,
    Reading,
    /// Or it is not to be read.
    Done,
}

/// See the module's documentation.
pub(super) struct Job {
    pub(super) status: RefreshStatus,
    serial: u64,
    phase: Phase,
    verify: bool,
    rate: u64,
    plan: Plan,
    target: Target,
    throttle: Throttle,
    meter: Meter,
    /// Since when it runs without a pause (monotonic), and the nanoseconds before that.
    since: Option<u64>,
    spent: u64,
    /// Windows that are done with, while one before them is not.
    ahead: Vec<Finished>,
    journal: JournalRead,
    /// Bytes of the journal that could not be put back.
    journal_lost: u64,
    reported: u64,
    /// Position before which everything is compared, and by a sync under way durable.
    syncing: u64,
    /// The superblock that tells of it.
    saved: Option<Ticket>,
    /// What it makes equal is the new image of a resync.
    pub(super) remakes: bool,
}

impl Job {
    /// It is not over.
    pub(super) fn is_running(&self) -> bool {
        self.phase != Phase::Over
    }

    /// The machine, if it is the one with this number and it compares.
    pub(super) fn target(&mut self, serial: u64) -> Option<&mut Target> {
        (self.serial == serial && self.phase == Phase::Comparing).then_some(&mut self.target)
    }

    /// Its machine and its number, while it compares.
    pub(super) fn comparing(&mut self) -> Option<(u64, &mut Target)> {
        (self.phase == Phase::Comparing).then_some((self.serial, &mut self.target))
    }

    /// For a resync: the position before which everything is compared and, by the syncs that are done, durable.
    pub(super) fn resync_progress(&self) -> u64 {
        if self.remakes && self.phase == Phase::Comparing { self.syncing } else { 0 }
    }

    /// Everything before it has been compared.
    fn low_water(&self) -> u64 {
        self.target.first_open().unwrap_or(u64::MAX).min(self.plan.position())
    }

    /// As the superblock keeps it.
    fn kept(&self) -> Option<Comparison> {
        let s = &self.status;
        (self.is_running() && !self.remakes).then_some(Comparison {
            job: s.job,
            verify: self.verify,
            quick: s.quick,
            rate: self.rate,
            progress: self.syncing,
            differ: s.differ,
            repaired: self.target.repaired,
            skipped: s.skipped,
            wire: s.wire,
            spent: self.spent,
        })
    }

    fn spent(&self, now: u64) -> u64 {
        self.spent + self.since.map_or(0, |since| now.saturating_sub(since))
    }
}

impl Run {
    /// The job that is under way.
    pub(super) fn running_job(&mut self) -> Option<&mut Job> {
        self.compare.job.as_mut().filter(|j| j.is_running())
    }

    /// Begins a job.
    pub(super) fn begin_job(&mut self, wish: &Refresh, cause: &'static str, plan: Plan, remakes: bool) {
        self.set_up_job(wish, cause, plan, remakes);
        self.job_begun(cause);
    }

    fn set_up_job(&mut self, wish: &Refresh, cause: &'static str, plan: Plan, remakes: bool) {
        let serial = self.compare.serial();
        let (from, number) = (plan.position(), self.now.wall);
        let status = RefreshStatus {
            job: number,
            shadow: self.cfg.name.clone(),
            cause: cause.into(),
            quick: wish.quick,
            state: "Running".into(),
            started: rfc3339(number).unwrap_or_default(),
            total: plan.total,
            ..RefreshStatus::default()
        };
        self.compare.wire = 0;
        self.compare.job = Some(Job {
            status,
            serial,
            phase: Phase::Comparing,
            verify: wish.verify,
            rate: wish.rate,
            plan,
            target: Target::new(self.compare.key, wish.verify, self.compare.windows + 1),
            throttle: Throttle::new(wish.rate),
            meter: Meter::default(),
            since: None,
            spent: 0,
            ahead: Vec::new(),
            journal: if remakes || wish.quick { JournalRead::Done } else { JournalRead::No },
            journal_lost: 0,
            reported: 0,
            syncing: from,
            saved: None,
            remakes,
        });
    }

    /// It is what it is to be, and may be kept.
    fn job_begun(&mut self, cause: &str) {
        if self.compare.job.as_ref().is_some_and(|j| !j.remakes) {
            self.save_job();
        }
        self.log(Level::Info, format!("{cause}: comparing with the primary"));
        self.report_job();
    }

    /// Goes on with the job of an earlier process.
    pub(super) fn take_up_comparison(&mut self) {
        let Some(kept) = self.meta.sb.comparison.filter(|_| matches!(self.part, Part::Shadow(_))) else {
            return;
        };
        let Comparison { verify, quick, rate, progress, .. } = kept;
        let wish = Refresh { quick, verify, rate, suspend_delay: true, ..Refresh::default() };
        let plan = Plan::new(self.volume_sizes(), None, progress);
        let cause = if verify { "verify" } else { "refresh" };
        self.set_up_job(&wish, cause, plan, false);
        self.compare.wire = kept.wire;
        let Some(job) = &mut self.compare.job else { return };
        job.target.repaired = kept.repaired;
        job.spent = kept.spent;
        let s = &mut job.status;
        (s.job, s.differ, s.repaired, s.skipped) = (kept.job, kept.differ, kept.repaired, kept.skipped);
        s.wire = kept.wire;
        s.started = rfc3339(kept.job).unwrap_or_default();
        s.compared = job.plan.before(progress);
        s.state = "Waiting".into();
        s.reason = Some("the link to the primary is down".into());
        self.job_begun(cause);
    }

    /// Number and bytes of the volumes.
    pub(super) fn volume_sizes(&self) -> Vec<(u8, u64)> {
        self.meta.sb.volumes.iter().map(|v| (v.number, v.size)).collect()
    }

    /// What the superblock is to know of the job now. An ended one stays until what it wrote is durable.
    pub(super) fn note_job(&mut self) {
        let kept = self.compare.job.as_ref().and_then(Job::kept);
        if kept.is_some() || !self.image.repaired {
            self.meta.sb.comparison = kept;
        }
    }

    fn save_job(&mut self) {
        self.note_job();
        let ticket = self.meta.save(false);
        if let Some(job) = &mut self.compare.job {
            job.saved = Some(ticket);
        }
    }

    /// A record touches its extents from now on.
    pub(super) fn job_touched(&mut self, record: &Record) {
        if let Some((_, target)) = self.compare.job.as_mut().and_then(Job::comparing) {
            record.extents().for_each(|(extent, _)| target.touch(record.stamp.lsn, extent));
        }
    }

    /// The journal's end, or all of it, is about to be another one: nothing of it is read again.
    fn leave_journal(&mut self) {
        let turning = matches!(&self.part, Part::Shadow(s) if s.is_cutting() || s.rebase.is_some());
        if turning || self.admin.is_promoting() {
            self.end_scrub();
            if let Some(job) = self.running_job().filter(|j| j.journal == JournalRead::Reading) {
                job.journal = JournalRead::Done;
            }
        }
    }

    /// Moves the job on; whether anything moved.
    pub(super) fn pump_job(&mut self) -> bool {
        self.leave_journal();
        let connected = self.links.receiving().is_some();
        let shadow = matches!(self.part, Part::Shadow(_));
        let Some(job) = self.running_job() else { return false };
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
        let (serial, first) = (self.compare.serial(), self.compare.windows + 1);
        let (key, now, volumes) = (self.compare.key, self.now.mono, self.volume_sizes());
        let Some(job) = &mut self.compare.job else { return false };
        if job.since.is_none() {
            return false;
        }
        (job.spent, job.since) = (job.spent(now), None);
        job.plan = Plan::new(volumes, job.plan.candidates().cloned(), job.low_water());
        let repaired = job.target.repaired;
        job.target = Target::new(key, job.verify, first);
        job.target.repaired = repaired;
        job.ahead.clear();
        job.serial = serial;
        job.status.state = "Waiting".into();
        job.status.reason = Some("the link to the primary is down".into());
        true
    }

    fn pump_windows(&mut self) -> bool {
        let (applied, now) = (self.image.applied.point.lsn, self.now.mono);
        let staging = self.is_staging();
        let Some(job) = &mut self.compare.job else { return false };
        job.since.get_or_insert(now);
        job.status.state = "Running".into();
        job.status.reason = None;
        let serial = job.serial;
        let mut out = Vec::new();
        // While staging, what is compared is not what the backings hold.
        let nothing = |e| vec![UNKNOWN; extents(e)];
        let known = |e: Extent| if staging { nothing(e) } else { self.index.roots(e) };
        job.target.applied(applied, known, &mut out);
        let mut wake = None;
        // Where little is read, a long link is filled with windows.
        let most = if job.status.quick { MAX_OPEN } else { FULL_OPEN };
        while job.target.open_windows() < most && job.ahead.len() < AHEAD {
            wake = job.throttle.wait(now);
            if wake.is_some() {
                break;
            }
            let Some((extent, wanted)) = job.plan.next_window() else { break };
            job.throttle.take(extent.len(), now);
            self.compare.windows += 1;
            job.target.open(self.compare.windows, extent, wanted, job.status.quick, &mut out);
        }
        let finished = job.target.take_finished();
        let moved = !out.is_empty() || !finished.is_empty();
        self.do_tasks(Side::Target, serial, out);
        finished.into_iter().for_each(|w| self.window_done(w));
        self.account_settled();
        let moved = moved | self.scrub_job();
        let Some(job) = &mut self.compare.job else { return moved };
        let compared = job.target.is_idle() && job.plan.is_done();
        if compared && job.journal == JournalRead::Done {
            debug_assert!(job.ahead.is_empty(), "a window was forgotten");
            job.phase = Phase::Settling;
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
        if !self.is_staging() {
            for (i, root) in &window.learned {
                if let Some(e) = crate::resync::extent_of(window.extent, *i) {
                    self.index.learn(e.address(), *root);
                }
            }
        }
        let Some(job) = &mut self.compare.job else { return };
        let mut window = window;
        let mut found = None;
        if !job.verify {
            // It is repaired: nobody will find it again, whatever becomes of the link.
            found = Some(Finished { skipped: 0, ..window.clone() });
            (window.different, window.rotten, window.their_rotten) = Default::default();
        }
        job.ahead.push(window);
        found.iter().for_each(|w| self.account(w));
    }

    /// Windows that are behind this job now count for good.
    fn account_settled(&mut self) {
        let Some(job) = &mut self.compare.job else { return };
        let before = job.low_water();
        let settled: Vec<_> = job.ahead.extract_if(.., |w| w.extent.start() < before).collect();
        settled.iter().for_each(|w| self.account(w));
    }

    /// Adds a window to what is told.
    fn account(&mut self, window: &Finished) {
        let found = rfc3339(self.now.wall).unwrap_or_default();
        let (own, primary) = (self.cfg.name.clone(), self.primary_name());
        let volumes = &self.meta.sb.volumes;
        let Some(job) = &mut self.compare.job else { return };
        let name = |e: &Extent| volumes.iter().find(|v| v.number == e.address().volume()).map(|v| &v.name);
        let range = |e: &Extent, node: Option<&String>| DifferentRange {
            volume: name(e).cloned().unwrap_or_default(),
            offset: e.address().offset(),
            len: e.len(),
            found: found.clone(),
            node: node.cloned(),
        };
        let status = &mut job.status;
        status.skipped += window.skipped;
        status.differ += window.different.iter().map(|e| e.len()).sum::<u64>();
        status.repaired = job.target.repaired;
        let told = status.ranges.len() + status.rotten.len();
        let news = window.different.iter().map(|e| range(e, None));
        status.ranges.extend(news.take(MAX_RANGES.saturating_sub(status.ranges.len())));
        let rotten = window.rotten.iter().map(|e| range(e, Some(&own)));
        let theirs = window.their_rotten.iter().map(|e| range(e, Some(&primary)));
        let room = MAX_RANGES.saturating_sub(status.rotten.len());
        status.rotten.extend(rotten.chain(theirs).take(room));
        // Windows end in any order.
        [&mut status.ranges, &mut status.rotten].into_iter().for_each(|r| sort(r));
        let mut lines: Vec<String> = Vec::new();
        let place = |e: &Extent| {
            let volume = name(e).map_or("", |n| n.as_str());
            format!("{}: {volume} at {}, {} bytes,", status.cause, e.address().offset(), e.len())
        };
        lines.extend(window.different.iter().map(|e| format!("{} differed from the primary", place(e))));
        let wrong = |e, node| format!("{} are not what was written to the disk of {node}", place(e));
        lines.extend(window.rotten.iter().map(|e| wrong(e, &own)));
        lines.extend(window.their_rotten.iter().map(|e| wrong(e, &primary)));
        lines.truncate(MAX_LINES.saturating_sub(told));
        lines.into_iter().for_each(|line| self.log(Level::Warn, line));
    }

    fn primary_name(&self) -> String {
        let view = self.links.primary().and_then(|n| self.links.view(n));
        view.map_or_else(|| "the primary".into(), |v| v.name.clone())
    }

    /// Progress, at intervals.
    fn beat_job(&mut self) {
        let (now, beat) = (self.now.mono, self.cfg.timing.heartbeat);
        let wire = self.compare.wire;
        let Some(job) = &mut self.compare.job else { return };
        job.status.compared = job.plan.before(job.low_water());
        let waits =
            if job.throttle.wait(now).is_some() { Some("the rate limit") } else { job.target.waits_for() };
        job.meter.sample(now, job.status.compared, waits);
        job.status.repaired = job.target.repaired;
        job.status.wire = wire;
        job.status.rate = job.meter.rate();
        job.status.eta = job.meter.eta(job.status.total.saturating_sub(job.status.compared));
        job.status.limited_by = job.meter.limited_by().map(str::to_owned);
        job.status.seconds = job.spent(now) as f64 / SECONDS as f64;
        let due = job.reported + beat;
        if now >= due {
            self.report_job();
        } else {
            self.wake_at(due);
        }
    }

    fn report_job(&mut self) {
        let now = self.now.mono;
        let Some(job) = &mut self.compare.job else { return };
        job.reported = now;
        let Ok(json) = serde_json::to_vec(&job.status) else { return };
        if json.len() <= MAX_REPORT
            && let Some(link) = self.links.receiving()
        {
            self.say(link, Compare::Report { json: json.into() });
        }
    }

    /// Goes on reading the journal; whether anything moved.
    fn scrub_job(&mut self) -> bool {
        let Some(job) = &mut self.compare.job else { return false };
        let (cause, verify) = (job.status.cause.clone(), job.verify);
        match job.journal {
            JournalRead::No if self.scrub.is_none() => {
                job.journal = JournalRead::Reading;
                self.begin_scrub(!verify);
            }
            JournalRead::No | JournalRead::Done => return false, // that of an earlier job ends with its request
            JournalRead::Reading => {}
        }
        let mut moved = self.pump_scrub();
        let found = rfc3339(self.now.wall).unwrap_or_default();
        let Some(job) = &mut self.compare.job else { return moved };
        let mut lines = Vec::new();
        let mut over = true;
        if let Some(scrub) = &mut self.scrub {
            job.status.journal_read = scrub.read();
            over = scrub.is_over();
            for s in scrub.found.drain(..) {
                let (volume, node) = (JOURNAL.to_owned(), Some(job.status.shadow.clone()));
                let range =
                    DifferentRange { volume, offset: s.offset, len: s.len, found: found.clone(), node };
                job.journal_lost += if s.lost { s.len } else { 0 };
                if job.status.rotten.len() < MAX_RANGES {
                    job.status.rotten.push(range);
                }
                let back = if verify || s.lost { "" } else { ": put back" };
                let Spoilt { len, offset, .. } = s;
                lines.push(format!(
                    "{cause}: {len} bytes at {offset} of the journal are not what was written{back}"
                ));
            }
        }
        if over {
            job.journal = JournalRead::Done;
            self.end_scrub();
            moved = true;
        }
        lines.into_iter().for_each(|line| self.log(Level::Warn, line));
        moved
    }

    /// All windows are done: once the repairs are durable, the outcome is true.
    fn settle_job(&mut self) -> bool {
        if self.image.repaired || !self.checkpoint_idle() {
            return false;
        }
        let (at, time) = (self.image.applied.point.lsn, self.now.wall);
        self.beat_job();
        let Some(job) = &mut self.compare.job else { return false };
        let (differ, verify, remakes) = (job.status.differ, job.verify, job.remakes);
        let theirs = job.status.rotten.iter().filter(|r| r.node.as_ref() != Some(&job.status.shadow));
        let journal = job.status.rotten.iter().filter(|r| r.volume == JOURNAL).map(|r| r.len).sum::<u64>();
        let unrepaired = match verify {
            true => differ + journal,
            false => theirs.map(|r| r.len).sum::<u64>() + job.journal_lost,
        };
        let identical = unrepaired == 0;
        job.status.compared = job.status.total;
        job.status.lsn = identical.then_some(at.0);
        if identical {
            self.meta.sb.verified = Some(Verified { time, lsn: at, differences: differ });
        }
        self.meta.sb.unrepaired = if identical { 0 } else { unrepaired };
        self.end_job("Done", None);
        self.meta.save(false);
        if remakes {
            self.all_compared(at);
        }
        true
    }

    /// The job has failed; what was repaired stays.
    pub(super) fn job_failed(&mut self, why: &str) {
        if self.running_job().is_some() {
            self.end_job("Failed", Some(why.to_owned()));
        }
    }

    /// Ends the job.
    pub(super) fn end_job(&mut self, state: &'static str, reason: Option<String>) {
        let (key, now, wire) = (self.compare.key, self.now.mono, self.compare.wire);
        let first = self.compare.windows + 1;
        self.end_scrub();
        let Some(job) = &mut self.compare.job else { return };
        job.phase = Phase::Over;
        let stopped = job.remakes && state == "Stopped";
        (job.spent, job.since) = (job.spent(now), None);
        job.status.seconds = job.spent as f64 / SECONDS as f64;
        job.status.wire = wire;
        job.status.state = state.into();
        job.status.reason.clone_from(&reason);
        job.status.eta = None;
        job.status.repaired = job.target.repaired;
        // Windows that are still open on the primary are closed there, and memory is given back.
        let open = job.target.open_numbers();
        job.target = Target::new(key, job.verify, first);
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
        let (outcome, compared, repaired) = (state.to_owned(), s.compared, s.repaired);
        let (cause, differ, identical_at, why) = (s.cause.clone(), s.differ, s.lsn, s.reason.clone());
        self.tell(Happening::Compared {
            cause,
            outcome,
            compared,
            differ,
            repaired,
            identical_at,
            reason: why,
        });
        let level = if state == "Done" { Level::Info } else { Level::Warn };
        self.log(level, text);
        if let Some(link) = self.links.receiving() {
            open.into_iter().for_each(|window| self.say(link, Compare::Close { window }));
        }
        self.report_job();
        self.save_job();
        if stopped {
            self.stop_resync();
        }
    }

    /// Something waits to be repaired, and may be.
    pub(super) fn has_repairs(&self) -> bool {
        let may = |j: &&Job| j.remakes || j.saved.is_some_and(|ticket| self.meta.is_saved(ticket));
        let job = self.compare.job.as_ref().filter(may);
        job.is_some_and(|j| j.phase == Phase::Comparing && j.target.has_repairs())
    }

    /// A batch of repairs goes into the image.
    pub(super) fn begin_repairs(&mut self) -> bool {
        let Some(job) = &mut self.compare.job else { return false };
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
        let Some(job) = &mut self.compare.job else { return };
        let serial = job.serial;
        job.target.written(&mut out);
        self.do_tasks(Side::Target, serial, out);
    }

    /// A checkpoint's syncs begin: they cover what has been repaired.
    pub(super) fn job_syncing(&mut self) {
        if let Some(job) = self.running_job() {
            job.syncing = job.low_water();
        }
    }
}

/// By volume, then by offset.
fn sort(ranges: &mut [DifferentRange]) {
    ranges.sort_by(|a, b| (&a.volume, a.offset).cmp(&(&b.volume, b.offset)));
}
