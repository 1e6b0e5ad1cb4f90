//! Crash images: what the disks hold if the power goes at one place of the log.
//!
//! Owns: the durable state at that place, and what is in the volatile caches. Invariant: what a sync has covered
//! (all that was answered before it came), once it was answered, is in every image; so is a write with FUA that was
//! answered. Of the rest any subset survives, whole or in sectors of 512 bytes, each in its order against whatever
//! touched the same sectors; of the names in a directory any first part.

use crate::log::{Change, Event, FileId, Inode, Kind, Recording};
use crate::prng::Prng;
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

const SECTOR: usize = 512;
/// Bytes compared and written at once.
const PIECE: usize = 64 << 10;

/// The disks up to one place of the log.
pub struct Disks {
    recording: Arc<Recording>,
    at: usize,
    files: HashMap<FileId, Stored>,
    directories: HashMap<FileId, Names>,
    /// What a sync that was not answered yet is to cover.
    syncs: HashMap<usize, Vec<usize>>,
}

#[derive(Clone, Default)]
struct Stored {
    /// Durable.
    bytes: Vec<u8>,
    /// Not durable, oldest first.
    cached: Vec<Cached>,
}

#[derive(Clone)]
struct Cached {
    event: usize,
    answered: bool,
    /// Ranges that something newer has made durable.
    over: Vec<(u64, u64)>,
}

#[derive(Clone, Default)]
struct Names {
    durable: BTreeMap<OsString, FileId>,
    cached: Vec<usize>,
}

/// Changes a file of an image, by its name and bytes, if it is to be another one.
pub type Edit<'a> = dyn Fn(&str, &[u8]) -> Option<Vec<u8>> + 'a;

/// How much of what was not flushed survives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Survival {
    Nothing,
    Everything,
    /// Some of it, some of that torn.
    Random(u64),
    /// Everything, but what was still on its way is torn.
    Torn(u64),
}

/// What an event does to a file: where, and how far.
fn range(event: &Event) -> (u64, u64) {
    match event {
        Event::Write { offset, data, .. } => (*offset, offset + data.len() as u64),
        Event::Zero { offset, len, .. } => (*offset, offset + len),
        _ => (0, 0),
    }
}

impl Disks {
    /// At the begin of a recording.
    pub fn new(recording: Arc<Recording>) -> Disks {
        let (mut files, mut directories) = (HashMap::new(), HashMap::new());
        for (id, inode) in &recording.base {
            match inode {
                Inode::File(bytes) => {
                    files.insert(*id, Stored { bytes: bytes.clone(), cached: Vec::new() });
                }
                Inode::Directory(names) => {
                    directories.insert(*id, Names { durable: names.clone(), cached: Vec::new() });
                }
            }
        }
        Disks { recording, at: 0, files, directories, syncs: HashMap::new() }
    }

    /// Goes on to just before the event at `place`.
    pub fn advance(&mut self, place: usize) {
        assert!(place >= self.at, "the log is read forward");
        let recording = self.recording.clone();
        for at in self.at..place {
            self.take(&recording.log, at);
        }
        self.at = place;
    }

    fn take(&mut self, log: &[Event], at: usize) {
        let cached = || Cached { event: at, answered: false, over: Vec::new() };
        match &log[at] {
            Event::Write { file, .. } | Event::Zero { file, .. } | Event::Size { file, .. } => {
                self.files.get_mut(file).expect("it was made").cached.push(cached());
            }
            Event::Name { dir, change } => {
                match change {
                    Change::Put(_, id, Kind::File) => drop(self.files.insert(*id, Stored::default())),
                    Change::Put(_, id, Kind::Directory) => {
                        self.directories.insert(*id, Names::default());
                    }
                    Change::Remove(_) | Change::Rename(..) => {}
                }
                self.directories.get_mut(dir).expect("it was made").cached.push(at);
            }
            Event::Sync { file } => {
                let stored = &self.files[file];
                let covered = stored.cached.iter().filter(|c| c.answered).map(|c| c.event);
                self.syncs.insert(at, covered.collect());
            }
            Event::SyncNames { dir } => {
                self.syncs.insert(at, self.directories[dir].cached.clone());
            }
            Event::Answered(event) => self.answered(log, *event),
            Event::Mark(_) => {}
        }
    }

    fn answered(&mut self, log: &[Event], event: usize) {
        match &log[event] {
            Event::Write { file, fua: true, .. } => self.settle(log, *file, &[event]),
            Event::Write { file, .. } | Event::Zero { file, .. } | Event::Size { file, .. } => {
                let stored = self.files.get_mut(file).expect("it was written");
                stored.cached.iter_mut().filter(|c| c.event == event).for_each(|c| c.answered = true);
            }
            Event::Sync { file } => {
                let covered = self.syncs.remove(&event).unwrap_or_default();
                self.settle(log, *file, &covered);
            }
            Event::SyncNames { dir } => {
                let covered = self.syncs.remove(&event).unwrap_or_default();
                let names = self.directories.get_mut(dir).expect("it was synced");
                for at in covered.iter().filter(|c| names.cached.contains(c)) {
                    if let Event::Name { change, .. } = &log[*at] {
                        change.apply(&mut names.durable);
                    }
                }
                names.cached.retain(|c| !covered.contains(c));
            }
            Event::Name { .. } | Event::Answered(_) | Event::Mark(_) => {}
        }
    }

    /// Makes changes of a file durable.
    fn settle(&mut self, log: &[Event], file: FileId, covered: &[usize]) {
        let stored = self.files.get_mut(&file).expect("it was written");
        for event in covered {
            let Some(at) = stored.cached.iter().position(|c| c.event == *event) else { continue };
            let change = stored.cached.remove(at);
            put(&mut stored.bytes, &log[*event], &change.over, &mut |_| true, None);
            // What is older must not come over it.
            let range = range(&log[*event]);
            stored.cached[..at].iter_mut().for_each(|c| c.over.push(range));
        }
    }

    /// Makes the image below directory `dir` in `target`, which may hold an earlier one. `edit` may change a file.
    pub fn image(&mut self, dir: FileId, target: &Path, survival: Survival, edit: &Edit) -> io::Result<()> {
        let mut chance = Chance::new(survival);
        self.directory(dir, target, &mut chance, edit)
    }

    fn directory(&mut self, dir: FileId, target: &Path, chance: &mut Chance, edit: &Edit) -> io::Result<()> {
        fs::create_dir_all(target)?;
        let names = &self.directories[&dir];
        let mut here = names.durable.clone();
        for at in &names.cached[..chance.first(names.cached.len())] {
            if let Event::Name { change, .. } = &self.recording.log[*at] {
                change.apply(&mut here);
            }
        }
        for entry in fs::read_dir(target)?.flatten() {
            if !here.contains_key(&entry.file_name()) {
                match entry.file_type()?.is_dir() {
                    true => fs::remove_dir_all(entry.path())?,
                    false => fs::remove_file(entry.path())?,
                }
            }
        }
        for (name, id) in &here {
            let path = target.join(name);
            if let Some(stored) = self.files.get_mut(id) {
                let undo = survive(stored, &self.recording.log, chance);
                let edited = edit(name.to_str().unwrap_or_default(), &stored.bytes);
                let written = write_differing(&path, edited.as_deref().unwrap_or(&stored.bytes));
                undo_all(stored, undo);
                written?;
            } else {
                self.directory(*id, &path, chance, edit)?;
            }
        }
        Ok(())
    }
}

/// Chooses what survives.
struct Chance {
    survival: Survival,
    prng: Prng,
    permille: u64,
    torn: u64,
}

impl Chance {
    fn new(survival: Survival) -> Chance {
        let seed = if let Survival::Random(seed) | Survival::Torn(seed) = survival { seed } else { 0 };
        let mut prng = Prng::new(seed);
        let (permille, torn) = (prng.pick(&[100, 500, 900]), prng.pick(&[0, 200, 600]));
        Chance { survival, prng, permille, torn }
    }

    /// How many of the first.
    fn first(&mut self, of: usize) -> usize {
        match self.survival {
            Survival::Nothing => 0,
            Survival::Everything | Survival::Torn(_) => of,
            Survival::Random(_) => self.prng.below(of as u64 + 1) as usize,
        }
    }

    fn tear(&mut self) -> Tear {
        if self.prng.permille(500) { Tear::First(self.prng.next()) } else { Tear::Some }
    }

    /// Whether a change survives; then which of its sectors do.
    fn change(&mut self, answered: bool) -> Option<Tear> {
        match self.survival {
            Survival::Nothing => None,
            Survival::Everything => Some(Tear::Whole),
            Survival::Torn(_) if answered => Some(Tear::Whole),
            Survival::Torn(_) => Some(self.tear()),
            Survival::Random(_) if self.prng.permille(self.torn) => Some(self.tear()),
            Survival::Random(_) => self.prng.permille(self.permille).then_some(Tear::Whole),
        }
    }
}

#[derive(Clone, Copy)]
enum Tear {
    Whole,
    /// The first sectors alone.
    First(u64),
    /// Any sectors.
    Some,
}

type Undo = (usize, Vec<(u64, Vec<u8>)>);

/// Brings the surviving part of the cache into the bytes; how to take it out again.
fn survive(stored: &mut Stored, log: &[Event], chance: &mut Chance) -> Undo {
    let len = stored.bytes.len();
    let mut undo = Vec::new();
    for change in &stored.cached {
        let Some(tear) = chance.change(change.answered) else { continue };
        let (from, to) = range(&log[change.event]);
        let sectors = (to - from).div_ceil(SECTOR as u64);
        let prng = &mut chance.prng;
        let mut keep = |sector: u64| match tear {
            Tear::Whole => true,
            Tear::First(n) => sector < n % sectors.max(1),
            Tear::Some => prng.permille(500),
        };
        put(&mut stored.bytes, &log[change.event], &change.over, &mut keep, Some(&mut undo));
    }
    (len, undo)
}

fn undo_all(stored: &mut Stored, (len, undo): Undo) {
    for (offset, bytes) in undo.into_iter().rev() {
        let offset = offset as usize;
        if stored.bytes.len() < offset + bytes.len() {
            stored.bytes.resize(offset + bytes.len(), 0);
        }
        stored.bytes[offset..offset + bytes.len()].copy_from_slice(&bytes);
    }
    stored.bytes.resize(len, 0);
}

/// Makes a change, but for the ranges `over` and the sectors that `keep` refuses.
fn put(
    bytes: &mut Vec<u8>,
    event: &Event,
    over: &[(u64, u64)],
    keep: &mut dyn FnMut(u64) -> bool,
    mut undo: Option<&mut Vec<(u64, Vec<u8>)>>,
) {
    if let Event::Size { len, .. } = event {
        if let (Some(undo), Some(cut)) = (undo, bytes.get(*len as usize..)) {
            undo.push((*len, cut.to_vec()));
        }
        return bytes.resize(*len as usize, 0);
    }
    let (from, to) = range(event);
    let zero = matches!(event, Event::Zero { .. });
    let end = if zero { to.min(bytes.len() as u64) } else { to };
    if bytes.len() < end as usize {
        bytes.resize(end as usize, 0);
    }
    let (mut at, mut sector) = (from, 0);
    while at < end {
        // By the sectors of the disk, which a change of any length may begin and end within.
        let next = ((at / SECTOR as u64 + 1) * SECTOR as u64).min(end);
        let covered = over.iter().any(|(a, b)| at < *b && *a < next);
        if keep(sector) && !covered {
            let (a, b) = (at as usize, next as usize);
            if let Some(undo) = &mut undo {
                undo.push((at, bytes[a..b].to_vec()));
            }
            match event {
                Event::Write { data, .. } => {
                    bytes[a..b].copy_from_slice(&data[(at - from) as usize..(next - from) as usize]);
                }
                _ => bytes[a..b].fill(0),
            }
        }
        (at, sector) = (next, sector + 1);
    }
}

/// Makes a file hold these bytes, writing only what differs.
fn write_differing(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    if file.metadata()?.len() != bytes.len() as u64 {
        file.set_len(bytes.len() as u64)?;
    }
    let mut there = vec![0; PIECE];
    for (i, piece) in bytes.chunks(PIECE).enumerate() {
        let (offset, there) = ((i * PIECE) as u64, &mut there[..piece.len()]);
        file.read_exact_at(there, offset)?;
        if there != piece {
            file.write_all_at(piece, offset)?;
        }
    }
    Ok(())
}
