//! Views of shadows: opened, read, written and closed at random, and left open while anything else happens.
//!
//! Owns: what a view may show. Invariant: a read of a view is the image of its record under the view's own writes;
//! a request to a node that has no view open fails; each is answered.

use crate::content::{self, SECTOR, WriteId, parse_run};
use crate::history::Image;
use crate::plan::Fault;
use crate::prng::Prng;
use crate::scenario::Phase;
use crate::workload::draw_extent;
use crate::world::{Coming, Outcome, Purpose, Violation, World, broken};
use bytes::Bytes;
use std::collections::BTreeMap;
use volrep::disk::{File, IoError};
use volrep::node::event::{AdminOp, At, Event, Op, RequestId};
use volrep::node::status::Status;
use volrep::units::{Extent, HistoryPoint, Lsn, MICROS, MILLIS};

/// Requests with higher numbers are a view's.
pub const IDS: u64 = 1 << 40;
/// Writes to views have higher numbers than any of the workload.
const WRITES: WriteId = 1 << 24;
const NEVER: u64 = u64::MAX;

/// What a sector of a view may hold.
struct Version {
    id: WriteId,
    submit: u64,
    done: u64,
}

/// A view, as its user knows it.
pub struct Seen {
    scratch: bool,
    at: Option<At>,
    /// When it was asked for.
    asked: u64,
    /// What it shows, once it is open.
    base: Option<Image>,
    /// What was on the disk when it was opened: that, or an older image and records in the journal.
    frozen: Image,
    versions: BTreeMap<(usize, u64), Vec<Version>>,
    /// Requests to come.
    left: u64,
    /// A request has failed, or a disk was about to make one fail.
    failed: bool,
}

enum Asked {
    Read {
        extent: Extent,
        submit: u64,
    },
    Write {
        id: WriteId,
        extent: Extent,
    },
    Flush,
    /// Of a node without a view.
    Stray,
}

/// Every view.
pub struct Views {
    rng: Prng,
    outstanding: BTreeMap<u64, (usize, Asked)>,
    next: u64,
    tick: u64,
    writes: WriteId,
}

impl Views {
    /// None yet.
    pub fn new(rng: Prng) -> Views {
        Views { rng, outstanding: BTreeMap::new(), next: IDS, tick: 0, writes: WRITES }
    }

    fn tick(&mut self) -> u64 {
        self.tick += 1;
        self.tick
    }

    /// The process is gone: nothing of it will be answered.
    pub fn forget(&mut self, node: usize) {
        self.outstanding.retain(|_, (n, _)| *n != node);
    }
}

impl World {
    /// Somebody opens a view of a shadow.
    pub fn open_view(&mut self, node: usize) -> Outcome {
        let host = &self.hosts[node];
        let rot = !host.rot.is_clean();
        if host.node.is_none() || host.view.is_some() || rot || self.scenario.phase() == Phase::Promote {
            return Ok(());
        }
        let (applied, durable) = host.status.as_ref().map_or((0, 0), |s| (s.applied_lsn, s.durable_lsn));
        let rng = &mut self.views.rng;
        let scratch = rng.permille(700);
        let ahead = durable.saturating_sub(applied) + 3;
        // What is held back is what somebody wants to look at before he promotes.
        let (often, ways) = if self.plan.apply_delay > 0 { (800, 3) } else { (400, 5) };
        let wanted = rng.permille(often).then(|| (applied + rng.below(ahead)).saturating_sub(1));
        let how = rng.below(ways);
        let left = rng.log(1, 300);
        let full = scratch && rng.permille(150);
        let at = match wanted {
            Some(lsn) if how > 1 => Some(At::Lsn(Lsn(lsn))),
            Some(_) => self.name_record(node, (applied, durable), how),
            None => None,
        };
        let (versions, failed, asked) = (BTreeMap::new(), false, self.now);
        self.hosts[node].view = Some(Seen {
            scratch,
            at: at.clone(),
            asked,
            base: None,
            frozen: Image::new(),
            versions,
            left,
            failed,
        });
        if full {
            self.fill_stage(node);
        }
        self.ask(node, AdminOp::View { scratch, at }, Purpose::View)
    }

    /// It is open, or was a moment ago.
    pub fn view_opened(&mut self, node: usize) -> Outcome {
        let Some(status) = self.poll(node)? else { return Ok(()) };
        let Some(view) = status.view.as_ref().filter(|v| v.state == "Open") else { return Ok(()) };
        let lsn = view.lsn.unwrap_or_default();
        let host = &self.hosts[node];
        let Some(seen) = &host.view else { return Ok(()) };
        self.counts.met(&format!("{} view open", view.kind));
        let Some(hash) = host.watch.at(lsn, self.history.origin) else {
            return broken("I1", format!("a view of {node} at {lsn}, which was never in its journal"));
        };
        let point = HistoryPoint { lsn: Lsn(lsn), hash };
        if let Some(at) = &seen.at {
            if !self.is_meant(node, at, point, (seen.asked, status.tail_lsn)) {
                return broken("contract", format!("a view at {at:?} is open at {lsn}"));
            }
            let how = match at {
                At::Lsn(_) => "a record",
                At::Time(_) => "a time",
                At::Mark(_) => "a mark",
            };
            self.counts.met(&format!("view at {how}"));
        }
        let (base, frozen) = (self.history.image(hash), self.backings(node)?);
        if status.applied_lsn == lsn {
            if frozen != base {
                return broken("I1", format!("a view is open at {lsn}, and the image is another one"));
            }
        } else {
            self.counts.met("view of what is not in the image");
        }
        if let Some(seen) = &mut self.hosts[node].view {
            (seen.base, seen.frozen) = (Some(base), frozen);
        }
        let incarnation = self.hosts[node].incarnation;
        self.after(0, Coming::View { node, incarnation });
        Ok(())
    }

    /// What is on a node's disks.
    fn backings(&self, node: usize) -> Result<Image, Violation> {
        let disk = &self.hosts[node].disk;
        let writes = |&(number, ..): &(u8, u64, u64)| disk.writes(File::Backing(number), number);
        self.plan.volumes.iter().map(writes).collect::<Result<_, _>>().or_else(|text| broken("I12", text))
    }

    /// Nothing changes on the disks of a node with an open view.
    fn check_frozen(&mut self, node: usize) -> Outcome {
        let Some(seen) = self.hosts[node].view.as_ref().filter(|v| v.base.is_some()) else { return Ok(()) };
        let now = self.backings(node)?;
        for (was, is) in seen.frozen.iter().zip(&now) {
            if let Some(sector) = is.iter().zip(was).position(|(is, was)| is != was) {
                let text =
                    format!("sector {sector} changed under a view from {} to {}", was[sector], is[sector]);
                return broken("I1", text);
            }
        }
        self.counts.check("I1");
        Ok(())
    }

    /// The user of a view goes on.
    pub fn view_goes_on(&mut self, node: usize) -> Outcome {
        let Some(seen) = &mut self.hosts[node].view else { return Ok(()) };
        if seen.left == 0 {
            // Or it is left open, and nobody thinks of it.
            return if self.views.rng.permille(600) { self.close_view(node) } else { Ok(()) };
        }
        if seen.base.is_none() {
            return Ok(()); // it was the user of an earlier one
        }
        seen.left -= 1;
        self.view_request(node)?;
        let delay = self.views.rng.log(10 * MICROS, 8 * MILLIS);
        let incarnation = self.hosts[node].incarnation;
        self.after(delay, Coming::View { node, incarnation });
        Ok(())
    }

    fn view_request(&mut self, node: usize) -> Outcome {
        let extent = draw_extent(&self.plan.volumes, &self.plan.mix, &mut self.views.rng);
        let submit = self.views.tick();
        let (op, asked) = match self.views.rng.below(10) {
            0 => (Op::Flush, Asked::Flush),
            1..=4 => (Op::Read(extent), Asked::Read { extent, submit }),
            draw => self.view_write(node, extent, draw == 5, submit),
        };
        self.issue_view(node, op, asked)
    }

    fn view_write(&mut self, node: usize, extent: Extent, zero: bool, submit: u64) -> (Op, Asked) {
        self.views.writes += 1;
        let id = if zero { 0 } else { self.views.writes };
        let (number, first) = (extent.address().volume(), extent.address().offset() / SECTOR as u64);
        let volume = self.model.volume_index(number).expect("a volume of the plan");
        if let Some(seen) = self.hosts[node].view.as_mut().filter(|v| v.scratch) {
            for sector in first..first + extent.len() / SECTOR as u64 {
                seen.versions.entry((volume, sector)).or_default().push(Version { id, submit, done: NEVER });
            }
        }
        let fua = submit.is_multiple_of(5);
        if zero {
            return (Op::Zero { extent, fua }, Asked::Write { id, extent });
        }
        let mut data = vec![0; extent.len() as usize];
        for (out, sector) in data.chunks_exact_mut(SECTOR).zip(first..) {
            content::fill(out, id, number, sector, false);
        }
        (Op::Write { extent, data: Bytes::from(data).into(), fua }, Asked::Write { id, extent })
    }

    fn issue_view(&mut self, node: usize, op: Op, asked: Asked) -> Outcome {
        self.views.next += 1;
        let id = self.views.next;
        self.trace.note(self.now, node, "view request", [id, 0, 0]);
        self.views.outstanding.insert(id, (node, asked));
        self.step(node, Event::View { id: RequestId(id), op })
    }

    /// A front end of a view that is gone still has a request, whatever the node has become.
    pub fn stray_view_request(&mut self, node: usize) -> Outcome {
        if self.hosts[node].node.is_none() || self.hosts[node].view.is_some() {
            return Ok(());
        }
        let extent = draw_extent(&self.plan.volumes, &self.plan.mix, &mut self.views.rng);
        let (op, _) = self.view_write(node, extent, false, 0);
        self.issue_view(node, op, Asked::Stray)
    }

    /// A request to a view is answered.
    pub fn view_complete(&mut self, node: usize, id: u64, result: Result<Bytes, IoError>) -> Outcome {
        let errno = result.as_ref().err().map_or(0, |e| e.errno);
        self.trace.note(self.now, node, "view complete", [id, errno as u64, 0]);
        let Some((_, asked)) = self.views.outstanding.remove(&id) else {
            return broken("contract", format!("request {id} of a view is answered twice"));
        };
        let now = self.views.tick();
        if let Asked::Stray = asked {
            self.counts.check("no view");
            return if errno == 5 { Ok(()) } else { broken("I1", "a request is served by no view") };
        }
        let Some(seen) = &mut self.hosts[node].view else { return Ok(()) };
        let refused = matches!(asked, Asked::Write { .. }) && !seen.scratch;
        match result {
            Ok(_) if refused => broken("contract", "a write to a read-only view succeeds"),
            Err(IoError::EROFS) if refused => Ok(()),
            Err(_) => {
                seen.failed = true;
                Ok(())
            }
            Ok(bytes) => self.view_succeeded(node, asked, &bytes, now),
        }
    }

    fn view_succeeded(&mut self, node: usize, asked: Asked, bytes: &Bytes, now: u64) -> Outcome {
        let Some(seen) = &mut self.hosts[node].view else { return Ok(()) };
        match asked {
            Asked::Flush | Asked::Stray => Ok(()),
            Asked::Write { id, extent } => {
                let volume = self.model.volume_index(extent.address().volume()).expect("of the plan");
                let first = extent.address().offset() / SECTOR as u64;
                for sector in first..first + extent.len() / SECTOR as u64 {
                    let versions = seen.versions.entry((volume, sector)).or_default();
                    versions.iter_mut().filter(|v| v.id == id && v.done == NEVER).for_each(|v| v.done = now);
                }
                Ok(())
            }
            Asked::Read { extent, submit } => {
                self.counts.check("view");
                let number = extent.address().volume();
                let volume = self.model.volume_index(number).expect("of the plan");
                let first = extent.address().offset() / SECTOR as u64;
                if bytes.len() as u64 != extent.len() {
                    return broken("contract", format!("a view gives {} bytes of {extent:?}", bytes.len()));
                }
                let ids = parse_run(bytes, number, first).or_else(|text| broken("I12", text))?;
                let base = seen.base.as_ref().expect("it was open when it was read");
                for (id, sector) in ids.into_iter().zip(first..) {
                    let none = Vec::new();
                    let versions = seen.versions.get(&(volume, sector)).unwrap_or(&none);
                    let below = base[volume][sector as usize];
                    let floor = versions.iter().filter(|v| v.done < submit).map(|v| v.submit).max();
                    let may = floor.is_none() && id == below
                        || versions.iter().any(|v| v.id == id && v.done >= floor.unwrap_or(0));
                    if !may {
                        return broken(
                            "I1",
                            format!("a view shows {id} at {volume}/{sector}, below is {below}"),
                        );
                    }
                }
                Ok(())
            }
        }
    }

    /// Somebody closes the view of a shadow.
    pub fn close_view(&mut self, node: usize) -> Outcome {
        let closing = self.hosts[node].waiting.values().any(|p| *p == Purpose::ViewClose);
        if self.hosts[node].node.is_none() || closing {
            return Ok(());
        }
        self.ask(node, AdminOp::ViewClose, Purpose::ViewClose)
    }

    /// What a node says of its view agrees with what its user has seen.
    pub fn check_view(&mut self, node: usize, s: &Status) -> Outcome {
        let owed = self.views.outstanding.values().any(|(n, _)| *n == node);
        let opening = self.hosts[node].waiting.values().any(|p| *p == Purpose::View);
        let state = s.view.as_ref().map(|v| v.state.as_str());
        if state != Some("Open") && owed {
            return broken("contract", format!("a view that is {state:?} owes answers"));
        }
        let reason = s.reason.as_deref().unwrap_or_default();
        if reason.contains("a resync is needed, and begins once it is closed") {
            self.counts.met("a resync waits for a view");
        }
        if s.role == "primary" && state.is_some() {
            return broken("contract", "a primary has a view");
        }
        let Some(seen) = &self.hosts[node].view else { return Ok(()) };
        match state {
            Some("Open") => {
                if seen.failed && !self.hosts[node].watch.faulted {
                    return broken("contract", "a request of a view failed, and the view is open");
                }
                if self.views.rng.permille(20) {
                    self.check_frozen(node)?;
                }
            }
            Some("Failed") => {
                let why = s.view.as_ref().and_then(|v| v.reason.clone()).unwrap_or_default();
                if seen.left > 0 || seen.base.is_some() {
                    self.counts.met(&format!("view failed: {}", why.split(" (").next().unwrap_or_default()));
                }
                if let Some(seen) = &mut self.hosts[node].view {
                    (seen.left, seen.base, seen.failed) = (0, None, true);
                }
                if self.views.rng.permille(100) {
                    return self.close_view(node);
                }
            }
            Some(_) => {}
            None if opening => {}
            None => self.hosts[node].view = None,
        }
        // Whoever tidies up closes what is open; a resync that a FLUSH waits for may wait for it, too.
        let tidies = matches!(self.scenario.phase(), Phase::Settle | Phase::Drain | Phase::Rest);
        if state.is_some() && (tidies || self.is_stuck()) {
            return self.close_view(node);
        }
        Ok(())
    }

    /// A view is opened, or closed, at random.
    pub fn strike_view(&mut self, node: usize, fault: Fault) -> Outcome {
        match fault {
            Fault::View => self.open_view(node),
            _ => self.close_view(node),
        }
    }
}
