//! Every record that was ever sealed, as a tree: what image each history stands for.
//!
//! Owns: the records by chain hash. Invariant: a record is entered once, after its predecessor, by
//! the primary whose generation it names; the write order in it agrees with the order of requests.

use crate::content::{SECTOR, WriteId, parse_run};
use crate::model::{Model, Write};
use std::collections::HashMap;
use volrep::format::record::{Content, Kind, Record};
use volrep::units::{Hash, Lsn, NodeId};

/// Per volume, per sector, the write it holds.
pub type Image = Vec<Vec<WriteId>>;

/// One record.
pub struct Entry {
    /// Its number.
    pub lsn: Lsn,
    /// The record before.
    pub prev: Hash,
    /// Seal time.
    pub time: u64,
    /// What it takes of a journal.
    pub bytes: u64,
    /// What it wrote: volume, first sector, of which writes.
    pub runs: Vec<(usize, u64, Vec<WriteId>)>,
    /// The latest submission of any write up to here.
    newest: u64,
}

/// All records.
pub struct History {
    entries: HashMap<Hash, Entry>,
    /// Chain hash before the first record.
    pub origin: Hash,
    head: (Hash, Image),
    blank: Image,
    /// Bytes of records seen.
    pub bytes: u64,
}

impl History {
    /// None yet.
    pub fn new(origin: Hash, model: &Model) -> History {
        let blank: Image =
            (0..model.volumes.len()).map(|v| vec![0; model.volume_sectors(v) as usize]).collect();
        History { entries: HashMap::new(), origin, head: (origin, blank.clone()), blank, bytes: 0 }
    }
    /// What is on the primary's volumes before the first record.
    pub fn begin_with(&mut self, volume: usize, first: u64, sectors: u64, id: WriteId) {
        for image in [&mut self.blank, &mut self.head.1] {
            image[volume][first as usize..(first + sectors) as usize].fill(id);
        }
    }
    /// Whether it was seen.
    pub fn knows(&self, hash: Hash) -> bool {
        hash == self.origin || self.entries.contains_key(&hash)
    }
    /// A record that was seen.
    pub fn get(&self, hash: Hash) -> Option<&Entry> {
        self.entries.get(&hash)
    }
    /// Number of records.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether `ancestor` is `hash` or a record before it.
    pub fn includes(&self, mut hash: Hash, ancestor: Hash) -> bool {
        let floor = self.entries.get(&ancestor).map_or(Lsn(0), |e| e.lsn);
        while hash != ancestor {
            match self.entries.get(&hash) {
                Some(e) if e.lsn > floor => hash = e.prev,
                _ => return false,
            }
        }
        true
    }

    /// What the records after `since` up to `hash` wrote: volume, first sector, sectors.
    pub fn written(&self, mut hash: Hash, since: Hash) -> Vec<(usize, u64, u64)> {
        let mut all = Vec::new();
        while hash != since
            && let Some(e) = self.entries.get(&hash)
        {
            all.extend(e.runs.iter().map(|(v, first, ids)| (*v, *first, ids.len() as u64)));
            hash = e.prev;
        }
        all
    }

    /// The image after a record.
    pub fn image(&self, hash: Hash) -> Image {
        let (mut chain, mut at) = (Vec::new(), hash);
        while let Some(e) = self.entries.get(&at) {
            chain.push(e);
            at = e.prev;
        }
        let mut image = self.blank.clone();
        for e in chain.into_iter().rev() {
            for (volume, first, ids) in &e.runs {
                image[*volume][*first as usize..*first as usize + ids.len()].copy_from_slice(ids);
            }
        }
        image
    }

    /// Enters a record. `sealer` is the node it was seen at first.
    pub fn enter(
        &mut self,
        record: &Record,
        sealer: NodeId,
        model: &Model,
    ) -> Result<(), (&'static str, String)> {
        let stamp = &record.stamp;
        let say = |text: &str| format!("record {} of {:?}: {text}", stamp.lsn, stamp.generation);
        if stamp.generation.term.node != sealer {
            return Err(("I7", say("first seen at a node that is not its primary")));
        }
        let before = self.entries.get(&stamp.prev);
        if before.is_none() && stamp.prev != self.origin {
            return Err(("I7", say("its predecessor was never seen")));
        }
        let (lsn, time, newest) = before.map_or((Lsn(0), 0, 0), |e| (e.lsn, e.time, e.newest));
        if stamp.lsn != lsn.next() {
            return Err(("I7", say(&format!("follows {lsn}"))));
        }
        if stamp.time < time {
            return Err(("I2", say("its time is before its predecessor's")));
        }
        if self.head.0 != stamp.prev {
            self.head = (stamp.prev, self.image(stamp.prev));
        }
        let runs = runs(record, model).map_err(|e| ("I12", say(&e)))?;
        let newest_here = check_order(&self.head.1, &runs, newest, model).map_err(|e| ("I2", say(&e)))?;
        for (volume, first, ids) in &runs {
            self.head.1[*volume][*first as usize..*first as usize + ids.len()].copy_from_slice(ids);
        }
        self.head.0 = record.chain;
        self.bytes += record.padded_len();
        let entry = Entry {
            lsn: stamp.lsn,
            prev: stamp.prev,
            time: stamp.time,
            bytes: record.padded_len(),
            runs,
            newest: newest.max(newest_here),
        };
        self.entries.insert(record.chain, entry);
        Ok(())
    }
}

fn runs(record: &Record, model: &Model) -> Result<Vec<(usize, u64, Vec<WriteId>)>, String> {
    if record.stamp.kind != Kind::Writes {
        return Ok(Vec::new());
    }
    let payload = record.payload().map_err(|e| e.to_string())?;
    let (mut runs, mut at) = (Vec::new(), 0);
    for (extent, content) in record.extents() {
        let number = extent.address().volume();
        let volume = model.volume_index(number).ok_or_else(|| format!("{extent:?}: no such volume"))?;
        let (first, sectors) = (extent.address().offset() / SECTOR as u64, extent.len() / SECTOR as u64);
        if first + sectors > model.volume_sectors(volume) {
            return Err(format!("{extent:?}: outside the volume"));
        }
        let ids = match content {
            Content::Zeroes => vec![0; sectors as usize],
            Content::Data => {
                let bytes = &payload[at..at + extent.len() as usize];
                at += bytes.len();
                parse_run(bytes, number, first)?
            }
        };
        runs.push((volume, first, ids));
    }
    let mut spans: Vec<_> = runs.iter().map(|(v, s, ids)| (*v, *s, *s + ids.len() as u64)).collect();
    spans.sort_unstable();
    if spans.windows(2).any(|w| w[0].0 == w[1].0 && w[0].2 > w[1].1) {
        return Err("its extents overlap".into());
    }
    Ok(runs)
}

/// No sector goes back in time, and no write comes in a later record than one submitted after it.
fn check_order(
    image: &Image,
    runs: &[(usize, u64, Vec<WriteId>)],
    newest: u64,
    model: &Model,
) -> Result<u64, String> {
    let mut newest_here = 0;
    for (volume, first, ids) in runs {
        let mut last = (WriteId::MAX, WriteId::MAX);
        for (sector, new) in (*first..).zip(ids) {
            let old = image[*volume][sector as usize];
            if (old, *new) == last && *new != 0 {
                continue;
            }
            last = (old, *new);
            if *new == 0 || *new == old {
                continue; // zeroes do not say whose they are
            }
            let w: &Write =
                model.writes.get(*new as usize).ok_or_else(|| format!("write {new} was never made"))?;
            if w.volume != *volume || !(w.first..w.first + w.sectors).contains(&sector) {
                return Err(format!("write {new} was not of sector {sector}"));
            }
            if !model.may_follow(*new, old, *volume, sector) {
                return Err(format!("sector {sector} goes back from write {old} to {new}"));
            }
            if w.decided < newest {
                return Err(format!(
                    "write {new} was answered at {} and comes after a record with one submitted at {newest}",
                    w.decided
                ));
            }
            newest_here = newest_here.max(w.began);
        }
    }
    Ok(newest_here)
}
