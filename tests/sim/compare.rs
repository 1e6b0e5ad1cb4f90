//! Comparisons that administrators ask for, rot for them to find, and what they may say of it.
//!
//! Owns: the checks on what a comparison tells and on the hash index. Invariants: what is called different or
//! rotten was spoilt; what the index calls known is so (I9).

use crate::content::{SECTOR, WriteId, parse};
use crate::scenario::Phase;
use crate::world::{Outcome, Purpose, World, broken};
use std::collections::{BTreeMap, BTreeSet};
use volrep::disk::File;
use volrep::format::compare::{EXTENT, LEAF};
use volrep::format::mapped::Owner;
use volrep::format::superblock::{ResyncStage, SLOT, Superblock};
use volrep::node::event::{AdminOp, Refresh};
use volrep::node::status::{DifferentRange, RefreshStatus, Status};
use volrep::resync::hash::{HashKey, hash};
use volrep::resync::index::Index;
use volrep::units::{Address, Extent, Lsn};

/// What befell a host's disk, and whether it is mended.
#[derive(Default)]
pub struct Rot {
    /// Leaves that were ever spoilt, and when last: volume, number of the leaf.
    leaves: BTreeMap<(u8, u64), u64>,
    /// The last job that was told of, and when it was not there yet.
    job: Option<(u64, u64)>,
    /// When the last look was.
    looked: u64,
    /// What it claimed has been held against the disk.
    checked: bool,
    /// The job that was known before the one that mends.
    before: Option<Option<u64>>,
    mended: bool,
}

impl Rot {
    /// Nothing was ever spoilt.
    pub fn is_clean(&self) -> bool {
        self.leaves.is_empty()
    }
}

/// An administrator asked for it.
fn told(job: &&RefreshStatus) -> bool {
    matches!(job.cause.as_str(), "refresh" | "verify")
}

impl World {
    /// Flips bits on the disk of a shadow, behind everybody's back.
    pub fn spoil(&mut self, node: usize) {
        let viewed = self.hosts[node].view.is_some();
        if !self.plan.topology.may_rot(node) {
            return;
        }
        if self.plan.promotion.is_some() || self.plan.ambush > 0 || self.plan.moves || viewed {
            return; // who is promoted has to live with it, and so has who looks at it
        }
        let rng = &mut self.scenario.rng;
        for _ in 0..rng.log(1, 8) {
            let (number, size, _) = rng.pick(&self.plan.volumes);
            let at = rng.below(size);
            let byte = self.hosts[node].disk.part(File::Backing(number), at as usize..at as usize + 1)[0];
            let bit = 1 << rng.below(8);
            self.hosts[node].disk.install(File::Backing(number), at as usize, &[byte ^ bit]);
            self.hosts[node].rot.leaves.insert((number, at / LEAF), self.now);
            let start = at / LEAF * LEAF;
            let leaf = Address::new(number, start).and_then(|a| Extent::new(a, LEAF.min(size - start)));
            self.work.spoilt.extend(leaf);
        }
        self.hosts[node].rot.mended = false;
        self.hosts[node].rot.before = None;
    }

    /// An administrator asks for a comparison, somewhere.
    pub fn ask_comparison(&mut self, node: usize, verify: bool, quick: bool) -> Outcome {
        if self.hosts[node].node.is_none() {
            return Ok(());
        }
        let rng = &mut self.scenario.rng;
        let rate = if rng.permille(200) { rng.log(1 << 20, 1 << 30) } else { 0 };
        let suspend_delay = rng.permille(800);
        let wish = Refresh { quick, verify, rate, suspend_delay, ..Refresh::default() };
        self.ask_refresh(node, wish)
    }

    /// Once everything is quiet, whoever was spoilt is refreshed; whether all are.
    pub fn all_mended(&mut self) -> Result<bool, crate::world::Violation> {
        let mut all = true;
        for node in 0..self.hosts.len() {
            let rot = &self.hosts[node].rot;
            if rot.leaves.is_empty() || rot.mended {
                continue;
            }
            let job = self.hosts[node].status.as_ref().and_then(|s| s.refresh.clone());
            let known = job.as_ref().map(|j| j.job);
            let running = job.as_ref().is_some_and(|j| matches!(j.state.as_str(), "Running" | "Waiting"));
            let whole = |j: &RefreshStatus| j.cause == "refresh" && !j.quick && j.state == "Done";
            if let Some(before) = rot.before
                && known != before
                && job.as_ref().is_some_and(whole)
            {
                if job.is_some_and(|j| j.lsn.is_none()) {
                    return broken("I9", format!("a refresh of {node} left something"));
                }
                self.hosts[node].rot.mended = true;
                self.counts.met("rot mended");
                continue;
            }
            all = false;
            if !running {
                self.hosts[node].rot.before = Some(known);
                let wish = Refresh { suspend_delay: true, ..Refresh::default() };
                self.ask_refresh(node, wish)?;
            }
        }
        Ok(all)
    }

    /// A shadow says that it was identical at some record: so says its disk, but for what later records
    /// have written.
    fn check_identical(&mut self, node: usize, s: &Status) -> Outcome {
        let (now, rot) = (self.now, &mut self.hosts[node].rot);
        let looked = std::mem::replace(&mut rot.looked, now);
        // What a resync makes may lie beside the image still.
        let own = |j: &&RefreshStatus| j.shadow == self.hosts[node].config.name && told(j);
        let Some(job) = s.refresh.as_ref().filter(own) else { return Ok(()) };
        let rot = &mut self.hosts[node].rot;
        if rot.job.is_none_or(|(number, _)| number != job.job) {
            (rot.job, rot.checked) = (Some((job.job, looked)), false);
        }
        let Some(lsn) = job.lsn.filter(|_| job.state == "Done" && !rot.checked) else { return Ok(()) };
        rot.checked = true;
        let since = rot.job.map_or(0, |(_, since)| since);
        let host = &self.hosts[node];
        let Some(hash) = host.watch.at(lsn, self.history.origin) else {
            return broken("I9", format!("{node} says identical at {lsn}, which its journal never held"));
        };
        self.counts.check("I9");
        let mut image: Vec<Vec<Option<WriteId>>> =
            self.history.image(hash).into_iter().map(|v| v.into_iter().map(Some).collect()).collect();
        let later = host.watch.journal.range(lsn + 1..).filter_map(|(_, hash)| self.history.get(*hash));
        for (volume, first, ids) in later.flat_map(|e| e.runs.iter()) {
            image[*volume][*first as usize..*first as usize + ids.len()].fill(None);
        }
        for (volume, ids) in image.iter().enumerate() {
            let number = self.model.volumes[volume].number;
            let content = host.disk.content(File::Backing(number));
            for (sector, id) in ids.iter().enumerate() {
                let leaf = (number, sector as u64 * SECTOR as u64 / LEAF);
                // Found by the index alone, or spoilt behind the job's back.
                let excused = host.rot.leaves.get(&leaf).is_some_and(|at| job.quick || *at >= since);
                let bytes = &content[sector * SECTOR..(sector + 1) * SECTOR];
                let is = parse(bytes, number, sector as u64);
                if let Some(id) = id.filter(|id| !excused && is.as_ref() != Ok(id)) {
                    let text = format!(
                        "{} of {node}: identical at {lsn}, but {is:?} is there, not {id}: {leaf:?}",
                        job.cause
                    );
                    return broken("I9", text);
                }
            }
        }
        Ok(())
    }

    /// What a job says to differ, or to be rotten, was spoilt.
    pub fn check_told(&mut self, node: usize, s: &Status) -> Outcome {
        self.check_identical(node, s)?;
        let Some(job) = s.refresh.as_ref().filter(told) else { return Ok(()) };
        let host = self.hosts.iter().position(|h| h.config.name == job.shadow).unwrap_or(node);
        let rot = &self.hosts[host].rot;
        let number = |name: &str| {
            let volumes = &self.hosts[host].config.volumes;
            volumes.iter().find(|v| v.name == name).map(|v| v.number)
        };
        let spoilt = |r: &DifferentRange, unit: u64| {
            let Some(volume) = number(&r.volume) else { return false };
            let units = r.offset / unit..(r.offset + r.len).div_ceil(unit);
            units.into_iter().all(|u| {
                let leaves = u * unit / LEAF..(u + 1) * unit / LEAF;
                rot.leaves.range((volume, leaves.start)..(volume, leaves.end)).next().is_some()
            })
        };
        for r in &job.ranges {
            self.counts.check("I9");
            if !spoilt(r, LEAF) {
                return broken("I9", format!("{} of {}: a false difference {r:?}", job.cause, job.shadow));
            }
        }
        for r in &job.rotten {
            self.counts.check("I9");
            if r.node.as_ref() != Some(&job.shadow) || !spoilt(r, EXTENT) {
                return broken("I9", format!("{} of {}: false rot {r:?}", job.cause, job.shadow));
            }
            self.counts.met("rot named by the index");
        }
        if job.state == "Failed" {
            let why = job.reason.clone().unwrap_or_default();
            // A link that repeats a message is broken, and a comparison says so.
            let repeated = self.counts.met.contains_key("DuplicateMessage");
            if why.starts_with("the primary sent") && !repeated {
                return broken("contract", format!("{} of {} failed: {why}", job.cause, job.shadow));
            }
            self.counts.met(&format!("{} failed: {why}", job.cause));
        }
        if job.state == "Done" {
            self.counts.met(&format!("{}{} done", job.cause, if job.quick { " --quick" } else { "" }));
        }
        if job.skipped > 0 {
            self.counts.met("compared without reading");
        }
        Ok(())
    }

    /// Before a start: what the hash index calls known is so, unless redo, or the end of a repair, will
    /// make it forget that.
    pub fn check_index(&mut self, node: usize) -> Outcome {
        let host = &self.hosts[node];
        let slots = host.disk.content(File::Superblock);
        let (a, b) = slots.split_at(SLOT);
        let Ok((_, s)) = Superblock::choose([a, b]) else {
            return broken("I3", "neither superblock slot decodes");
        };
        let sizes: Vec<_> = s.volumes.iter().map(|v| (v.number, v.size)).collect();
        let owner = Owner { group: s.group, node: s.node, number: s.maps_id };
        let mut index =
            Index::new(Box::new(host.index.content()), &sizes, owner).or_else(|text| broken("I9", text))?;
        let copying = s.resync.as_ref().filter(|r| r.stage == ResyncStage::Copying).map(|r| r.progress);
        if let Some(from) = copying.or(s.comparison.filter(|c| !c.verify).map(|c| c.progress)) {
            index.forget_from(from);
        }
        let merging = s.resync.as_ref().is_some_and(|r| r.stage == ResyncStage::Merging);
        if merging || index.known() == 0 {
            return Ok(());
        }
        let later: BTreeSet<(u8, u64)> = host
            .watch
            .journal
            .range(s.checkpoint.lsn.0 + 1..)
            .filter_map(|(_, hash)| self.history.get(*hash))
            .flat_map(|e| e.runs.iter())
            .flat_map(|(volume, first, ids)| {
                let (number, last) = (self.model.volumes[*volume].number, first + ids.len() as u64 - 1);
                (first * 512 / EXTENT..=last * 512 / EXTENT).map(move |e| (number, e))
            })
            .collect();
        let key = HashKey::of(s.group);
        for (number, size) in sizes {
            let content = host.disk.content(File::Backing(number));
            for (e, bytes) in content[..size as usize].chunks(EXTENT as usize).enumerate() {
                let e = e as u64;
                let at = Address::new(number, e * EXTENT).expect("a small volume");
                let leaves = e * EXTENT / LEAF..(e + 1) * EXTENT / LEAF;
                let rotten =
                    host.rot.leaves.range((number, leaves.start)..(number, leaves.end)).next().is_some();
                let Some(root) = index.root(at).filter(|_| !rotten && !later.contains(&(number, e))) else {
                    continue;
                };
                self.counts.check("I9");
                if root != hash(&key, bytes).roots[0] {
                    let Lsn(lsn) = s.checkpoint.lsn;
                    let text = format!("the index of {node} is wrong of {at:?}, checkpoint {lsn}");
                    return broken("I9", text);
                }
            }
        }
        Ok(())
    }

    /// Everybody is at rest: nothing excuses an index now.
    pub fn check_indexes_at_rest(&mut self) -> Outcome {
        for node in 0..self.hosts.len() {
            if self.hosts[node].node.is_some() {
                self.kill(node, false);
                self.check_index(node)?;
            }
        }
        Ok(())
    }

    /// A shadow may give its old image up.
    pub fn ask_in_place(&mut self, node: usize) -> Outcome {
        if self.hosts[node].node.is_none() || self.scenario.phase() == Phase::Promote {
            return Ok(());
        }
        self.hosts[node].watch.in_place = true;
        let wish = Refresh { in_place: true, ..Refresh::default() };
        self.ask(node, AdminOp::Refresh(wish), Purpose::Refresh)
    }
}
