//! A running node: its machines, and the loop that lets each do what it can.
//!
//! Owns: everything after boot. Invariants: after every event each machine has been asked until none
//! had anything more to do; a fault latches, and after it nothing is acknowledged (I10).

use super::boot::Booted;
use super::compare::Comparing;
use super::config::NodeConfig;
use super::delay::Delay;
use super::event::{Action, Actions, Event, Level, Refusal};
use super::feed::Feed;
use super::history::Happening;
use super::image::{CheckPart, Image};
use super::links::Links;
use super::marks::Marks;
use super::meta::Meta;
use super::primary::Primary;
use super::reading::Reading;
use super::shadow::Shadow;
use super::{
    APPLY, BACKLOG, COMPARE, ENCODE, FRONT, INDEX, JOURNAL, JOURNAL_RECOVERY, MAPS, READER, SCRUB, STAGE,
    SUPER, VIEW,
};
use super::{rebase, remake};
use crate::apply::backlog::Backlog;
use crate::disk::{DiskRequest, DiskResult, IoError, Memory, Token};
use crate::format::message::Role;
use crate::journal::Journal;
use crate::journal::maps::Maps;
use crate::link::lag::Sample;
use crate::resync::hash::HashKey;
use crate::resync::index::Index;
use crate::units::Now;

/// What a node is.
#[expect(clippy::large_enum_variant, reason = "there is one, and it stays where it is")]
pub enum Part {
    /// It writes, or is on its way to.
    Primary(Primary),
    /// It follows.
    Shadow(Shadow),
}

/// See the module's documentation.
pub struct Run {
    pub(super) cfg: NodeConfig,
    pub(super) now: Now,
    pub(super) out: Vec<Action>,
    pub(super) disk: Vec<DiskRequest>,
    pub(super) wake: Option<u64>,
    /// The ring, while no cache uses it.
    pub(super) ring: Option<Box<dyn Memory>>,
    pub(super) meta: Meta,
    pub(super) journal: Journal,
    /// What the journal holds and the image lacks.
    pub(super) backlog: Backlog,
    pub(super) reading: Reading,
    pub(super) maps: Maps,
    pub(super) index: Index,
    pub(super) feed: Feed,
    pub(super) image: Image,
    pub(super) links: Links,
    pub(super) part: Part,
    pub(super) read_ids: u64,
    pub(super) fault: Option<String>,
    pub(super) admin: super::admin::Admin,
    pub(super) compare: Comparing,
    /// Who leaves the sync set, and what this node may claim to hold.
    pub(super) standings: super::outdate::Standings,
    /// Until when the cluster manager lets this primary serve, if it needs its word.
    pub(super) lease: Option<u64>,
    /// The node gives its place as primary up.
    pub(super) retiring: Option<super::retire::Retiring>,
    /// The primary hands its place over.
    pub(super) moving: Option<super::switchover::Moving>,
    /// A primary that starts waits for its peers' word.
    pub(super) asking: Option<super::asking::Asking>,
    pub(super) marks: Marks,
    /// The journal is being read again.
    pub(super) scrub: Option<super::scrub::Scrubbing>,
}

impl Run {
    /// Takes over from boot.
    pub fn new(cfg: NodeConfig, ring: Option<Box<dyn Memory>>, booted: Booted, now: Now) -> Run {
        let Booted { mut sb, slot, maps, index, marks, backlog, recovered: r } = booted;
        for peer in &mut sb.peers {
            // A position beyond the own end belongs to records that this node has lost.
            peer.durable = peer.durable.min(r.tail.point.lsn);
        }
        let part = match sb.role {
            Role::Primary => Part::Primary(Primary::new()),
            Role::Shadow => {
                let tail = r.tail.point.lsn;
                // What an earlier process had begun to put into the image goes there at once.
                let begun = sb.redo.unwrap_or(sb.limit).min(tail).max(sb.checkpoint.lsn);
                let before = r.segments.iter().filter(|s| s.before.lsn <= begun && s.time > 0);
                let sealed = before.map(|s| s.time).max().unwrap_or(r.tail.time);
                let delay = Delay::new(cfg.apply_delay, begun, tail, sealed, now.mono);
                Part::Shadow(Shadow::new(sb.limit, begun, delay))
            }
        };
        let journal = Journal::new(JOURNAL, sb.group, sb.geometry, r.head, r.segments, r.tail);
        let mut run = Run {
            now,
            out: Vec::new(),
            disk: Vec::new(),
            wake: None,
            ring,
            image: Image::new(APPLY, &sb, r.checkpoint_time, now),
            feed: Feed::new(cfg.feed_bytes),
            links: Links::new(&cfg, &sb),
            meta: Meta::new(SUPER, sb, slot),
            journal,
            backlog,
            reading: Reading::default(),
            maps,
            index,
            part,
            read_ids: 0,
            fault: None,
            admin: super::admin::Admin::default(),
            compare: Comparing::new(HashKey::of(cfg.group)),
            standings: super::outdate::Standings::default(),
            lease: None,
            retiring: None,
            moving: None,
            asking: None,
            marks: Marks::new(marks),
            scrub: None,
            cfg,
        };
        run.update_keep();
        run.begin_timeline();
        run.find_stage();
        run.take_up_comparison();
        run.links.chain.since = now.mono;
        let role = if run.meta.sb.role == Role::Primary { "primary" } else { "shadow" };
        run.tell(Happening::Started { role: role.into() });
        if let Some(cut) = run.meta.sb.cut {
            // The process died between that decision and its end.
            run.tell(Happening::Promoted { cut: Some(cut.lsn.0) });
        }
        run.note_superseded();
        run.begin_asking();
        run
    }

    /// Shadows may lack records of earlier runs: the segments say how old these are.
    fn begin_timeline(&mut self) {
        let segment = self.meta.sb.geometry.segment;
        let own = self.meta.sb.role == Role::Primary;
        let mut bytes = 0;
        for s in self.journal.segments() {
            if s.time > 0 {
                self.links.timeline.push(Sample { lsn: s.before.lsn, time: s.time, bytes }, own);
            }
            bytes += segment;
        }
        let tail = self.journal.tail();
        self.links.timeline.push(Sample { lsn: tail.point.lsn, time: tail.time, bytes }, own);
        self.links.bytes_before = bytes;
    }

    /// Takes one event.
    pub fn step(&mut self, now: Now, event: Event, actions: &mut Actions) {
        self.now = now;
        self.end_lease();
        match event {
            Event::Request { id, op } => self.request(id, op),
            Event::View { id, op } => self.view_request(id, op),
            Event::Disk { token, result } => self.disk_done(token, result),
            Event::Encoded { token, encoded } => self.encoded(token.id(), encoded),
            Event::Stage { result } => self.stage_opened(result),
            Event::Salvaged { result } => self.salvaged(result),
            Event::Compared { token, product } => self.compared(token.id(), product),
            Event::LinkUp { link, dialed, nonce } => self.link_up(link, dialed, nonce),
            Event::Message { link, message } => self.message(link, message),
            Event::LinkDown { link } => {
                self.link_down(link);
                if self.drop_former() {
                    self.update_keep();
                }
            }
            Event::DialFailed { peer } => self.dial_failed(peer),
            Event::Admin { id, op } => self.admin(id, op),
            Event::Wake => {}
        }
        self.advance(now, actions);
    }

    /// Lets every machine do what it can, until none can do more.
    pub fn advance(&mut self, now: Now, actions: &mut Actions) {
        self.now = now;
        self.wake = None;
        // Each round makes room for the next; the bound only stops a defect from hanging the node.
        for _ in 0..10_000 {
            self.wake = None;
            if !self.pump() {
                break;
            }
        }
        self.await_lease();
        self.meta.pump(&mut self.disk);
        actions.list.append(&mut self.out);
        actions.list.extend(self.disk.drain(..).map(Action::Disk));
        actions.wake = self.wake;
    }

    /// One round; whether anything moved.
    fn pump(&mut self) -> bool {
        if self.fault.is_some() {
            return self.pump_links();
        }
        let mut moved = match self.part {
            Part::Primary(_) => self.pump_primary(),
            Part::Shadow(_) => self.pump_shadow(),
        };
        moved |= self.pump_image();
        let (after, limit) = (self.cfg.timing.sync_after, self.unsynced_limit());
        if let Some(at) = self.journal.poll(self.now, after, limit, &mut self.disk) {
            self.wake_at(at);
        }
        self.pump_marks();
        moved |= self.pump_cascade();
        moved |= self.pump_outdate();
        moved |= self.pump_links();
        moved |= self.pump_asking();
        moved |= self.pump_refresh();
        moved |= self.pump_retiring();
        moved |= self.pump_moving();
        moved | self.pump_admin()
    }

    /// Bytes of records that may wait for a sync.
    fn unsynced_limit(&self) -> u64 {
        match &self.part {
            Part::Primary(p) => p.cache.as_ref().map_or(1 << 20, |c| c.usage().1 / 4),
            Part::Shadow(_) => 16 << 20,
        }
    }

    fn disk_done(&mut self, token: Token, result: DiskResult) {
        let outcome = match token.owner() {
            SUPER => self.meta.complete(result).map_err(|e| ("writing the superblock", e)),
            JOURNAL => self.journal.complete(token.id(), result).map_err(|e| ("writing the journal", e)),
            JOURNAL_RECOVERY => {
                match &self.part {
                    Part::Shadow(s) if s.is_cutting() => self.cut_done(token.id(), result),
                    _ => self.rewind_done(token.id(), result),
                }
                Ok(())
            }
            APPLY => self.applied(token.id(), result).or_else(|e| self.stage_failed("writing it", e)),
            MAPS | STAGE if token.id() == rebase::MARKED => match result {
                Ok(_) => {
                    self.marked();
                    Ok(())
                }
                Err(e) if token.owner() == MAPS => Err(("writing the dirty maps", e)),
                Err(e) => {
                    self.retreat(Some(format!("the stage of the new image can't be used: {e}")));
                    Ok(())
                }
            },
            STAGE if token.id() == remake::MAP => {
                let synced = self.map_synced(CheckPart::Stage, result);
                synced.or_else(|e| self.stage_failed("syncing its map", e))
            }
            STAGE => {
                self.stage_read(token.id(), result);
                Ok(())
            }
            MAPS => self.map_synced(CheckPart::Maps, result).map_err(|e| ("writing the dirty maps", e)),
            INDEX => self.map_synced(CheckPart::Index, result).map_err(|e| ("writing the hash index", e)),
            FRONT => {
                self.read_done(token.id(), result);
                Ok(())
            }
            BACKLOG => {
                self.record_read(token.id(), result);
                Ok(())
            }
            COMPARE => {
                self.image_read(token.id(), result);
                Ok(())
            }
            VIEW => {
                self.view_done(token.id(), result);
                Ok(())
            }
            SCRUB => {
                self.scrub_done(token.id(), result);
                Ok(())
            }
            READER => self.reader_done(token.id(), &result).map_err(|e| ("reading the journal", e)),
            _ => Ok(()),
        };
        if let Err((doing, e)) = outcome {
            self.fail(format!(
                "{doing} failed: {e}. Nothing is acknowledged any more; check the disk, then restart: \
                 every acknowledged write is recovered from the journal and the write cache"
            ));
        }
    }

    /// A write into the image failed. While staging, only what is being made is lost.
    fn stage_failed(&mut self, doing: &str, e: IoError) -> Result<(), (&'static str, IoError)> {
        if !self.is_staging() {
            return Err(("writing a backing", e));
        }
        self.retreat(Some(format!("the stage of the new image can't be used: {doing} failed: {e}")));
        Ok(())
    }

    fn reader_done(&mut self, id: u64, result: &DiskResult) -> Result<(), IoError> {
        if let Some(outcome) = self.image.reader.complete(id, result) {
            return outcome;
        }
        if let Some(choosing) = &mut self.admin.choosing
            && let Some(outcome) = choosing.reader.complete(id, result)
        {
            if outcome.is_err() {
                choosing.reader.give_up();
            }
            return Ok(());
        }
        // What a shadow lacks may be unreadable here; that is no reason to stop serving.
        for reader in self.links.readers() {
            if let Some(outcome) = reader.complete(id, result) {
                if outcome.is_err() {
                    reader.give_up();
                }
                break;
            }
        }
        Ok(())
    }

    /// Latches a fault.
    pub(super) fn fail(&mut self, text: String) {
        if self.fault.is_some() {
            return;
        }
        self.log(Level::Error, text.clone());
        self.fault = Some(text);
        self.refuse_everything();
        let why = self.fault.clone().unwrap_or_default();
        self.forget_view(&why);
        self.refuse_admin(Refusal::Failed, &why);
        self.close_links("this node has failed");
    }

    pub(super) fn log(&mut self, level: Level, text: impl Into<String>) {
        self.out.push(Action::Log { level, text: text.into() });
    }

    /// Asks to be woken at `at` (monotonic ns) at the latest.
    pub(super) fn wake_at(&mut self, at: u64) {
        self.wake = Some(self.wake.map_or(at, |w| w.min(at)));
    }

    /// Name of an encode job.
    pub(super) fn encode_token(id: u64) -> Token {
        Token::new(ENCODE, id)
    }
}

/// A reader's fetch needs several fields of [`Run`] at once; this borrows just those.
macro_rules! fetch {
    ($run:expr, $reader:expr, $lsn:expr) => {
        $reader.fetch(
            $lsn,
            &$run.feed,
            &$run.journal,
            (crate::node::READER, &mut $run.read_ids),
            &mut $run.disk,
        )
    };
}
pub(super) use fetch;
