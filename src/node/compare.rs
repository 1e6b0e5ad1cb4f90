//! The comparison's way to disks, threads and links, on both sides; and the whole of it on a primary.
//!
//! Owns: what was asked of the shell for a comparison and is not answered. Invariants: an answer reaches
//! only the machine that asked (by serial number), however late it comes; a primary reads what an
//! application would read; everything of a link is forgotten with it.

use super::COMPARE;
use super::event::{Action, AdminId, Level, LinkId};
use super::job::Job as CompareJob;
use super::primary::Primary;
use super::run::{Part, Run};
use super::status::RefreshStatus;
use crate::disk::{DiskOp, DiskRequest, DiskResult, Token, aligned, freeze};
use crate::format::compare::{Compare, EXTENT, Root};
use crate::format::message::{Message, refuse};
use crate::resync::hash::{HashKey, Job, Product, UNKNOWN};
use crate::resync::source::{Purpose, Source, Task};
use crate::resync::target::Target;
use crate::resync::{MAX_OPEN, extent_of};
use crate::units::{Extent, Lsn};
use bytes::Bytes;
use slab::Slab;
use std::collections::{BTreeMap, VecDeque};

/// Whose a call is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Side {
    /// A shadow's windows, on the primary.
    Source(LinkId),
    /// The job, on the shadow.
    Target,
}

/// A read or a piece of work that the shell is at.
struct Call {
    side: Side,
    serial: u64,
    window: u32,
    purpose: Purpose,
    extent: Option<Extent>,
    /// Of a read from several files.
    pieces: Vec<Option<DiskResult>>,
}

/// See the module's documentation.
pub struct Comparing {
    pub(super) key: HashKey,
    calls: Slab<Call>,
    serials: u64,
    /// Windows opened so far, by the jobs here.
    pub(super) windows: u32,
    sources: BTreeMap<LinkId, (u64, Source)>,
    /// Windows asked for before this primary served.
    early: Vec<(LinkId, Compare)>,
    /// Windows closed by shadows, and the write that must be in a record before that is confirmed.
    closed: VecDeque<(LinkId, u32, u64)>,
    /// On a shadow: the job that runs, or the last one.
    pub(super) job: Option<CompareJob>,
    /// On a primary: who asked for one, and of which link.
    pub(super) asked: Option<(AdminId, LinkId)>,
    /// On a shadow that holds its image back: over which link it does not, for a comparison there.
    pub(super) lent: Option<LinkId>,
    /// Bytes of words sent and received for the job.
    pub(super) wire: u64,
    /// What shadows said of their jobs, on a primary: the newest.
    pub(super) told: Option<RefreshStatus>,
}

impl Comparing {
    /// Nothing is compared.
    pub fn new(key: HashKey) -> Comparing {
        Comparing {
            key,
            calls: Slab::new(),
            serials: 0,
            windows: 0,
            sources: BTreeMap::new(),
            early: Vec::new(),
            closed: VecDeque::new(),
            job: None,
            asked: None,
            lent: None,
            wire: 0,
            told: None,
        }
    }

    /// A new machine's number.
    pub(super) fn serial(&mut self) -> u64 {
        self.serials += 1;
        self.serials
    }

    /// A word was sent or came.
    pub(super) fn count_wire(&mut self, word: &Compare) {
        if !matches!(word, Compare::Report { .. }) {
            self.wire += word.wire_len();
        }
    }

    /// The machine of the job, if it is the one with this number.
    fn target(&mut self, serial: u64) -> Option<&mut Target> {
        self.job.as_mut()?.target(serial)
    }

    /// A write was accepted on the primary.
    pub(super) fn touch(&mut self, extent: Extent) {
        self.sources.values_mut().for_each(|(_, s)| s.touch(extent));
    }

    /// That link waits for a window.
    pub(super) fn waits_for_window(&self, link: LinkId) -> bool {
        self.early.iter().any(|(l, _)| *l == link)
    }

    /// Links that wait for windows, each once.
    pub(super) fn waiting_links(&self) -> Vec<LinkId> {
        let mut links: Vec<_> = self.early.iter().map(|(l, _)| *l).collect();
        links.dedup();
        links
    }

    /// The windows that it waits for.
    pub(super) fn take_waiting(&mut self, link: LinkId) -> Vec<Compare> {
        self.early.extract_if(.., |(l, _)| *l == link).map(|(_, open)| open).collect()
    }

    /// Somebody has a window open here, or waits for one.
    pub(super) fn has_windows(&self) -> bool {
        !self.early.is_empty() || self.sources.values().any(|(_, s)| !s.is_idle())
    }

    /// A window that waits to be opened is not wanted any more; whether it waited.
    fn close_early(&mut self, link: LinkId, window: u32) -> bool {
        let before = self.early.len();
        self.early.retain(|(l, word)| *l != link || word.window() != Some(window));
        self.early.len() < before
    }

    /// A link is gone.
    pub(super) fn forget(&mut self, link: LinkId) {
        self.sources.remove(&link);
        self.early.retain(|(l, _)| *l != link);
        self.closed.retain(|(l, ..)| *l != link);
    }
}

/// Pieces of one read share a call: its number, and which piece.
const PIECE: u32 = 16;

impl Run {
    /// A word of the comparison came over a link on which records are sent from here.
    pub(super) fn heard_as_primary(&mut self, link: LinkId, word: Compare) {
        match word {
            Compare::Report { json } => self.job_reported(link, &json),
            Compare::Fail { text } => self.job_refused(link, text),
            open @ Compare::Open { .. } if matches!(self.part, Part::Shadow(_)) => {
                self.open_from_shadow(link, open);
            }
            Compare::Open { window, extent, wanted, quick } => {
                if !matches!(&self.part, Part::Primary(p) if p.is_serving()) {
                    return self.open_later(link, Compare::Open { window, extent, wanted, quick });
                }
                self.open_window(link, window, extent, &wanted, quick);
            }
            Compare::Close { window } if self.compare.close_early(link, window) => {}
            word => {
                let mut out = Vec::new();
                let Some((serial, source)) = self.compare.sources.get_mut(&link) else {
                    return self.drop_link(link, "it speaks of a window that is not open");
                };
                let serial = *serial;
                match source.heard(&word, &mut out) {
                    Ok(()) => self.do_tasks(Side::Source(link), serial, out),
                    Err(why) => self.drop_link(link, &format!("it asked for {why}")),
                }
            }
        }
    }

    /// A window for which this primary is not ready: it is opened once it serves.
    pub(super) fn open_later(&mut self, link: LinkId, open: Compare) {
        if self.compare.early.iter().filter(|(l, _)| *l == link).count() >= MAX_OPEN {
            return self.drop_link(link, "it asked for more windows than it may open");
        }
        self.compare.early.push((link, open));
    }

    /// Opens the windows that waited for it; whether there were any.
    pub(super) fn open_early(&mut self) -> bool {
        if matches!(self.part, Part::Shadow(_)) {
            return self.open_waiting_windows();
        }
        if self.compare.early.is_empty() || !matches!(&self.part, Part::Primary(p) if p.is_serving()) {
            return false;
        }
        for (link, open) in std::mem::take(&mut self.compare.early) {
            self.heard_as_primary(link, open);
        }
        true
    }

    /// Confirms closed windows whose touched sectors are in records now; whether there were any.
    pub(super) fn confirm_closed(&mut self) -> bool {
        let tail = *self.journal.tail();
        let mut moved = false;
        while let Some((link, window, _)) =
            self.compare.closed.pop_front_if(|(.., seq)| *seq <= tail.last_write)
        {
            self.say(link, Compare::Closed { window, lsn: tail.point.lsn });
            moved = true;
        }
        moved
    }

    fn open_window(&mut self, link: LinkId, number: u32, extent: Extent, wanted: &[u8], quick: bool) {
        if !self.lies_within(link, extent) {
            return;
        }
        let Part::Primary(Primary { cache: Some(cache), .. }) = &self.part else { return };
        let tail = self.journal.tail();
        let newer: Vec<Extent> = cache.newer_than(tail.last_write, extent).collect();
        // What the backing lacks, its index does not speak of.
        let mut indexed = self.index.roots(extent);
        let held = self.backlog.parts(extent).map(|(e, _)| e);
        for e in cache.read(extent).map(|(e, _)| e).chain(held) {
            let at = e.start() - extent.start();
            indexed[(at / EXTENT) as usize..=((at + e.len() - 1) / EXTENT) as usize].fill(UNKNOWN);
        }
        let at = tail.point.lsn;
        self.begin_window(link, (number, extent, wanted, quick), at, newer.into_iter(), indexed);
    }

    /// Whether it lies within the volumes; the link of whoever asks for anything else is given up.
    pub(super) fn lies_within(&mut self, link: LinkId, extent: Extent) -> bool {
        let volume = self.meta.sb.volumes.iter().find(|v| v.number == extent.address().volume());
        let within = volume.is_some_and(|v| extent.address().offset() + extent.len() <= v.size);
        if !within {
            self.drop_link(link, "it asked for a window outside of the volumes");
        }
        within
    }

    /// Opens a window as of a record: `newer` is what the image holds, or may hold, of later ones.
    pub(super) fn begin_window(
        &mut self,
        link: LinkId,
        (number, extent, wanted, quick): (u32, Extent, &[u8], bool),
        at: Lsn,
        newer: impl Iterator<Item = Extent>,
        indexed: Vec<Root>,
    ) {
        if !self.compare.sources.contains_key(&link) {
            let fresh = (self.compare.serial(), Source::new(self.compare.key));
            self.compare.sources.insert(link, fresh);
        }
        let Some((serial, source)) = self.compare.sources.get_mut(&link) else { return };
        let serial = *serial;
        let mut out = Vec::new();
        let opened = source.open(number, extent, wanted, quick, at, newer, indexed, &mut out);
        match opened {
            Ok(()) => self.do_tasks(Side::Source(link), serial, out),
            Err(why) => self.drop_link(link, &format!("it asked for {why}")),
        }
    }

    /// Says a word, and counts it where the job is.
    pub(super) fn say(&mut self, link: LinkId, word: Compare) {
        self.compare.count_wire(&word);
        self.send(link, Message::Compare(Box::new(word)));
    }

    /// Does what a machine asks for.
    pub(super) fn do_tasks(&mut self, side: Side, serial: u64, tasks: Vec<Task>) {
        for task in tasks {
            match task {
                Task::Say(word) => {
                    let link = match side {
                        Side::Source(link) => Some(link),
                        Side::Target => self.links.receiving(),
                    };
                    if let Some(link) = link {
                        self.say(link, word);
                    }
                }
                Task::Work(window, purpose, job) => self.do_work(side, serial, window, purpose, job),
                Task::Learn(window, roots) => self.learn(window, roots),
                Task::Cover(window) => match (side, &self.part) {
                    (Side::Source(link), Part::Primary(p)) => {
                        let last = p.cache.as_ref().map_or(0, |c| c.last_seq());
                        self.compare.closed.push_back((link, window, last));
                    }
                    (Side::Source(link), Part::Shadow(_)) => self.cover_window(link, window),
                    (Side::Target, _) => {}
                },
                Task::Read(window, purpose, extent) => {
                    let call =
                        Call { side, serial, window, purpose, extent: Some(extent), pieces: Vec::new() };
                    let id = self.compare.calls.insert(call);
                    match (side, &self.part) {
                        (Side::Source(_), Part::Primary(_)) => self.read_served(id, extent),
                        _ => self.read_image(id, extent),
                    }
                }
            }
        }
    }

    /// A primary has read these of its image; what is not in the backing is not what the index is about.
    fn learn(&mut self, window: Extent, roots: Vec<(usize, Root)>) {
        let Part::Primary(Primary { cache: Some(cache), .. }) = &self.part else { return };
        for (i, root) in roots {
            if let Some(e) = extent_of(window, i)
                .filter(|e| cache.read(*e).next().is_none() && self.backlog.parts(*e).next().is_none())
            {
                self.index.learn(e.address(), root);
            }
        }
    }

    fn do_work(&mut self, side: Side, serial: u64, window: u32, purpose: Purpose, job: Job) {
        let call = Call { side, serial, window, purpose, extent: None, pieces: Vec::new() };
        let id = self.compare.calls.insert(call);
        self.out.push(Action::Compare { token: Token::new(COMPARE, id as u64), job });
    }

    /// Reads a shadow's image, wherever its parts are.
    fn read_image(&mut self, id: usize, extent: Extent) {
        let parts = self.image.image_reads(extent);
        self.compare.calls[id].pieces = vec![None; parts.len()];
        for (i, (part, file)) in parts.into_iter().enumerate() {
            let token = Token::new(COMPARE, (id as u64) << PIECE | i as u64);
            let op = DiskOp::Read { offset: part.address().offset(), len: part.len() as usize };
            self.disk.push(DiskRequest { token, file, op });
        }
    }

    /// The answer to a read of the image.
    pub(super) fn image_read(&mut self, id: u64, result: DiskResult) {
        let (id, piece) = ((id >> PIECE) as usize, (id & ((1 << PIECE) - 1)) as usize);
        let Some(call) = self.compare.calls.get_mut(id) else { return };
        call.pieces[piece] = Some(result);
        if call.pieces.iter().any(Option::is_none) {
            return;
        }
        let pieces: Result<Vec<Bytes>, _> = call.pieces.drain(..).flatten().collect();
        let pieces = match pieces {
            Ok(pieces) => pieces,
            Err(e) => return self.compared_read(id, Err(e)),
        };
        let bytes = match <[Bytes; 1]>::try_from(pieces) {
            Ok([one]) => one,
            Err(many) => {
                let mut all = aligned(many.iter().map(Bytes::len).sum());
                many.iter().for_each(|b| all.extend_from_slice(b));
                freeze(all)
            }
        };
        self.compared_read(id, Ok(bytes));
    }

    /// The answer to a read for a comparison.
    pub(super) fn compared_read(&mut self, id: usize, result: DiskResult) {
        let Some(call) = self.compare.calls.try_remove(id) else { return };
        let mut out = Vec::new();
        match call.side {
            Side::Source(link) => {
                let Some((serial, source)) = self.compare.sources.get_mut(&link) else { return };
                if *serial != call.serial {
                    return;
                }
                match result {
                    Ok(bytes) => source.read(call.window, call.purpose, bytes, &mut out),
                    Err(e) => {
                        source.unreadable(call.extent.map_or(0, Extent::len));
                        let at = call.extent.map_or(0, |e| e.address().offset());
                        let text = format!("reading the primary's volume at {at} failed: {e}");
                        self.log(Level::Error, text.clone());
                        self.compare.forget(link);
                        return self.say(link, Compare::Fail { text });
                    }
                }
            }
            Side::Target => {
                let Some(target) = self.compare.target(call.serial) else { return };
                match result {
                    Ok(bytes) => {
                        if let Err(why) = target.read(call.window, call.purpose, bytes, &mut out) {
                            return self.distrust(why);
                        }
                    }
                    Err(_) => return self.job_failed("the image here can't be read"),
                }
            }
        }
        self.do_tasks(call.side, call.serial, out);
    }

    /// The answer to [`Action::Compare`].
    pub(super) fn compared(&mut self, id: u64, product: Product) {
        let Some(call) = self.compare.calls.try_remove(id as usize) else { return };
        let mut out = Vec::new();
        match call.side {
            Side::Source(link) => match self.compare.sources.get_mut(&link) {
                Some((serial, source)) if *serial == call.serial => {
                    source.worked(call.window, call.purpose, product, &mut out);
                }
                _ => return,
            },
            Side::Target => {
                let Some(target) = self.compare.target(call.serial) else { return };
                if let Err(why) = target.worked(call.window, call.purpose, product, &mut out) {
                    return self.distrust(why);
                }
            }
        }
        self.do_tasks(call.side, call.serial, out);
    }

    /// The primary said something that can't be true: nothing of it is written.
    pub(super) fn distrust(&mut self, why: &str) {
        self.job_failed(&format!("the primary sent {why}"));
        if let Some(link) = self.links.receiving() {
            self.send(link, refuse(&format!("the comparison was given up: {why}")));
            self.drop_link(link, &format!("the primary sent {why}"));
        }
    }
}
