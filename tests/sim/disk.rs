//! The disk model: what a file reads as, and what of it a power cut leaves.
//!
//! Owns: the content of every file of one node. Invariant: what a completed sync (or a completed
//! dsync write) covered survives; of any other write each 512-byte sector survives or not, alone.
//!
//! Requests in flight complete in any order. Two that overlap, one of them a write, are the caller's
//! fault: which one would win is anybody's guess, so the model reports it.

use crate::content::{SECTOR, WriteId, parse_run};
use crate::prng::Prng;
use crate::sparse::Sparse;
use bytes::Bytes;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use volrep::disk::{DiskOp, DiskRequest, DiskResult, File, IoError};
use volrep::format::superblock::SLOT;

/// How a request fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The errno.
    pub errno: i32,
    /// A failed sync loses what it should have covered (a device that dropped its cache).
    pub drops: bool,
}

#[derive(Clone)]
enum Data {
    Bytes(Bytes),
    Zeroes(usize),
}

impl Data {
    fn len(&self) -> usize {
        match self {
            Data::Bytes(b) => b.len(),
            Data::Zeroes(n) => *n,
        }
    }
    /// Puts a part of it somewhere.
    fn put(&self, part: Range<usize>, to: &mut Sparse, at: usize) {
        match self {
            Data::Bytes(b) => to.write(at, &b[part]),
            Data::Zeroes(_) => to.zero(at, part.len()),
        }
    }
}

/// A write that is visible and not durable.
struct Pending {
    order: u64,
    offset: usize,
    data: Data,
}

impl Pending {
    fn apply(&self, to: &mut Sparse) {
        self.data.put(0..self.data.len(), to, self.offset);
    }
    /// Each sector with this chance.
    fn apply_some(&self, to: &mut Sparse, permille: u64, rng: &mut Prng) {
        for from in (0..self.data.len()).step_by(SECTOR) {
            if rng.permille(permille) {
                self.data.put(from..from + SECTOR, to, self.offset + from);
            }
        }
    }
}

/// A file that is read in large parts, each within a piece of this size.
const LARGE: usize = 2 << 20;
/// Any other, and what of any is durable.
const SMALL: usize = 16 << 10;

struct Model {
    live: Sparse,
    durable: Sparse,
    pending: Vec<Pending>,
}

impl Model {
    fn new(file: File, size: u64) -> Model {
        let (live, durable) = match file {
            File::Journal => (LARGE, SMALL),
            File::Superblock => (SLOT, SLOT),
            _ => (SMALL, SMALL),
        };
        let sparse = |piece| Sparse::new(size as usize, piece);
        Model { live: sparse(live), durable: sparse(durable), pending: Vec::new() }
    }
    fn write(&mut self, order: u64, offset: usize, data: Data) {
        let pending = Pending { order, offset, data };
        pending.apply(&mut self.live);
        self.pending.push(pending);
    }
    fn sync(&mut self, before: u64) {
        // A later write of the same range may have been made durable by itself.
        for p in self.pending.extract_if(.., |p| p.order < before) {
            p.apply(&mut self.durable);
        }
    }
    /// The device drops what the failed sync should have covered: some of it is durable, the rest gone.
    fn drop_cache(&mut self, before: u64, rng: &mut Prng) {
        let covered: Vec<_> = self.pending.extract_if(.., |p| p.order < before).collect();
        let permille = rng.pick(&[0, 500, 900]);
        covered.iter().for_each(|p| p.apply_some(&mut self.durable, permille, rng));
        for p in &covered {
            self.live.copy_from(&self.durable, p.offset, p.data.len());
        }
        self.pending.iter().for_each(|p| p.apply(&mut self.live));
    }
    fn power_loss(&mut self, rng: &mut Prng) {
        let shared = rng.pick(&[0, 100, 500, 900, 1000]);
        let per_write = rng.permille(500);
        for p in std::mem::take(&mut self.pending) {
            let permille = if per_write { rng.pick(&[0, 0, 500, 1000]) } else { shared };
            p.apply_some(&mut self.durable, permille, rng);
            self.live.copy_from(&self.durable, p.offset, p.data.len());
        }
    }
}

struct InFlight {
    request: DiskRequest,
    submitted: u64,
}

/// A copy of the files of a node.
pub struct Content(Vec<(File, Sparse)>);

/// The files of one node.
pub struct Disk {
    files: BTreeMap<File, Model>,
    in_flight: BTreeMap<u64, InFlight>,
    order: u64,
    next: u64,
    blocks: BTreeMap<File, u64>,
}

impl Disk {
    /// Files of these sizes, all zeroes, each with the unit in which it may be addressed.
    pub fn new(files: &[(File, u64, u64)]) -> Disk {
        Disk {
            files: files.iter().map(|&(file, size, _)| (file, Model::new(file, size))).collect(),
            blocks: files.iter().map(|&(file, _, block)| (file, block)).collect(),
            in_flight: BTreeMap::new(),
            order: 1,
            next: 1,
        }
    }
    /// A new file of zeroes.
    pub fn make(&mut self, file: File, size: u64, block: u64) {
        self.files.insert(file, Model::new(file, size));
        self.blocks.insert(file, block);
    }
    /// The file is gone. No change of it may be in flight.
    pub fn remove(&mut self, file: File) -> Result<(), String> {
        let mut flying = self.in_flight.values().map(|f| &f.request).filter(|r| r.file == file);
        if let Some(r) = flying.find(|r| !matches!(r.op, DiskOp::Read { .. })) {
            return Err(format!("{file:?} is removed during {}", describe(r)));
        }
        self.files.remove(&file);
        Ok(())
    }
    /// All of it, after a loss of power.
    pub fn copy(&self) -> Content {
        Content(self.files.iter().map(|(file, model)| (*file, model.durable.clone())).collect())
    }
    /// The copy, and nothing else.
    pub fn restore(&mut self, copy: Content) {
        let model = |(file, durable): (File, Sparse)| {
            let mut model = Model { durable, ..Model::new(file, 0) };
            model.live = Sparse::new(model.durable.len(), model.live.piece_len());
            model.live.copy_from(&model.durable, 0, model.durable.len());
            (file, model)
        };
        self.files = copy.0.into_iter().map(model).collect();
    }
    /// Durable content, put there before anything runs.
    pub fn install(&mut self, file: File, offset: usize, bytes: &[u8]) {
        let model = self.files.get_mut(&file).expect("a file of the node");
        model.live.write(offset, bytes);
        model.durable.write(offset, bytes);
    }
    /// What the file reads as.
    pub fn content(&self, file: File) -> Cow<'_, [u8]> {
        let live = &self.files[&file].live;
        live.get(0..live.len())
    }
    /// Of which writes the sectors of a volume's file are.
    pub fn writes(&self, file: File, number: u8) -> Result<Vec<WriteId>, String> {
        let live = &self.files[&file].live;
        let mut ids = Vec::with_capacity(live.len() / SECTOR);
        for piece in live.pieces() {
            match piece {
                Ok(bytes) => ids.extend(parse_run(bytes, number, ids.len() as u64)?),
                Err(zeroes) => ids.resize(ids.len() + zeroes / SECTOR, 0),
            }
        }
        Ok(ids)
    }
    /// What a part of it reads as.
    pub fn part(&self, file: File, range: Range<usize>) -> Cow<'_, [u8]> {
        self.files[&file].live.get(range)
    }
    /// What a power cut would certainly leave of it.
    pub fn durable(&self, file: File, range: Range<usize>) -> Cow<'_, [u8]> {
        self.files[&file].durable.get(range)
    }

    /// Takes a request; the ticket completes it. An error is a broken rule of the caller.
    pub fn submit(&mut self, request: DiskRequest) -> Result<u64, String> {
        self.check_rules(&request)?;
        let ticket = self.next;
        self.next += 1;
        self.in_flight.insert(ticket, InFlight { request, submitted: self.order });
        Ok(ticket)
    }

    fn check_rules(&self, request: &DiskRequest) -> Result<(), String> {
        let file = request.file;
        let wrong = |what: &str| Err(format!("{file:?}: {what}: {}", describe(request)));
        let Some((offset, len)) = range(&request.op) else {
            return Ok(());
        };
        let Some(model) = self.files.get(&file) else {
            return wrong("no such file");
        };
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > model.live.len() as u64) {
            return wrong("outside the file");
        }
        let block = self.blocks[&file];
        if !offset.is_multiple_of(block) || !len.is_multiple_of(block) {
            return wrong("not aligned to the file's block");
        }
        if let DiskOp::Write { data, .. } = &request.op
            && !data.as_ptr().addr().is_multiple_of(4096)
        {
            return wrong("a buffer not aligned in memory");
        }
        let writes = |op: &DiskOp| matches!(op, DiskOp::Write { .. } | DiskOp::Zero { .. });
        if !writes(&request.op) {
            return Ok(());
        }
        for other in self.in_flight.values().filter(|o| o.request.file == file && writes(&o.request.op)) {
            let Some((o, n)) = range(&other.request.op) else {
                continue;
            };
            if offset < o + n && o < offset + len {
                return wrong(&format!("overlaps {} in flight", describe(&other.request)));
            }
        }
        Ok(())
    }

    /// The request of a ticket.
    pub fn request(&self, ticket: u64) -> Option<&DiskRequest> {
        self.in_flight.get(&ticket).map(|f| &f.request)
    }

    /// Forgets a request in flight as if it had been done.
    pub fn skip(&mut self, ticket: u64) {
        self.in_flight.remove(&ticket);
    }

    /// Completes a request.
    pub fn complete(&mut self, ticket: u64, fault: Option<Fault>, rng: &mut Prng) -> DiskResult {
        let InFlight { request, submitted } = self.in_flight.remove(&ticket).expect("a ticket in flight");
        let order = self.order;
        self.order += 1;
        let Some(model) = self.files.get_mut(&request.file) else {
            let gone = matches!(request.file, File::Stage(_)).then_some(IoError::EIO);
            return fault.map(|f| IoError { errno: f.errno }).or(gone).map_or(Ok(Bytes::new()), Err);
        };
        if let Some(fault) = fault {
            fail(model, request.op, order, submitted, fault, rng);
            return Err(IoError { errno: fault.errno });
        }
        match request.op {
            DiskOp::Read { offset, len } => {
                return Ok(model.live.read(offset as usize, len));
            }
            DiskOp::Write { offset, data, dsync } => {
                let data = Data::Bytes(data);
                if dsync {
                    // Durable itself, whatever becomes of older pending writes below it.
                    model.write(order, offset as usize, data);
                    let p = model.pending.pop().expect("just pushed");
                    bury(model, &p);
                    p.apply(&mut model.durable);
                } else {
                    model.write(order, offset as usize, data);
                }
            }
            DiskOp::Zero { offset, len } => {
                model.write(order, offset as usize, Data::Zeroes(len as usize));
            }
            DiskOp::Sync => model.sync(submitted),
        }
        Ok(Bytes::new())
    }

    /// The process is gone; what it had in flight is done, in part or not at all, in any order.
    pub fn kill(&mut self, rng: &mut Prng) {
        let mut left: Vec<_> = std::mem::take(&mut self.in_flight).into_values().collect();
        rng.shuffle(&mut left);
        for InFlight { request, submitted } in left {
            let order = self.order;
            self.order += 1;
            let Some(model) = self.files.get_mut(&request.file) else {
                continue;
            };
            let (offset, data) = match request.op {
                DiskOp::Write { offset, data, .. } => (offset, Data::Bytes(data)),
                DiskOp::Zero { offset, len } => (offset, Data::Zeroes(len as usize)),
                DiskOp::Sync if rng.permille(500) => {
                    model.sync(submitted);
                    continue;
                }
                DiskOp::Sync | DiskOp::Read { .. } => continue,
            };
            match rng.below(3) {
                0 => {}
                1 => model.write(order, offset as usize, data),
                _ => write_some(model, order, offset as usize, &data, rng),
            }
        }
    }

    /// The machine is gone.
    pub fn power_loss(&mut self, rng: &mut Prng) {
        self.kill(rng);
        self.files.values_mut().for_each(|model| model.power_loss(rng));
    }
}

fn fail(model: &mut Model, op: DiskOp, order: u64, submitted: u64, fault: Fault, rng: &mut Prng) {
    match op {
        DiskOp::Read { .. } => {}
        DiskOp::Write { offset, data, .. } => {
            write_some(model, order, offset as usize, &Data::Bytes(data), rng);
        }
        DiskOp::Zero { offset, len } => {
            write_some(model, order, offset as usize, &Data::Zeroes(len as usize), rng);
        }
        DiskOp::Sync if fault.drops => model.drop_cache(submitted, rng),
        DiskOp::Sync => {}
    }
}

/// Some sectors of a write, each as a write of its own.
fn write_some(model: &mut Model, order: u64, offset: usize, data: &Data, rng: &mut Prng) {
    let permille = rng.pick(&[0, 300, 700]);
    for from in (0..data.len()).step_by(SECTOR) {
        if rng.permille(permille) {
            let part = match data {
                Data::Bytes(b) => Data::Bytes(b.slice(from..from + SECTOR)),
                Data::Zeroes(_) => Data::Zeroes(SECTOR),
            };
            model.write(order, offset + from, part);
        }
    }
}

/// Older pending sectors under a write that is durable by itself can no longer come back.
fn bury(model: &mut Model, over: &Pending) {
    let (start, end) = (over.offset, over.offset + over.data.len());
    for p in std::mem::take(&mut model.pending) {
        let (s, e) = (p.offset, p.offset + p.data.len());
        if e <= start || end <= s {
            model.pending.push(p);
            continue;
        }
        let mut keep = |from: usize, to: usize| {
            if from < to {
                let data = match &p.data {
                    Data::Bytes(b) => Data::Bytes(b.slice(from - s..to - s)),
                    Data::Zeroes(_) => Data::Zeroes(to - from),
                };
                model.pending.push(Pending { order: p.order, offset: from, data });
            }
        };
        keep(s, start.min(e));
        keep(end.max(s), e);
    }
}

/// Offset and length, of what has them.
fn range(op: &DiskOp) -> Option<(u64, u64)> {
    match *op {
        DiskOp::Read { offset, len } => Some((offset, len as u64)),
        DiskOp::Write { offset, ref data, .. } => Some((offset, data.len() as u64)),
        DiskOp::Zero { offset, len } => Some((offset, len)),
        DiskOp::Sync => None,
    }
}

/// A request, in few words.
pub fn describe(request: &DiskRequest) -> String {
    let name = match request.op {
        DiskOp::Read { .. } => "read",
        DiskOp::Write { dsync: true, .. } => "dsync write",
        DiskOp::Write { .. } => "write",
        DiskOp::Zero { .. } => "zero",
        DiskOp::Sync => "sync",
    };
    range(&request.op).map_or(name.to_owned(), |(at, len)| format!("{name} {at:#x}+{len:#x}"))
}

/// The model keeps its promises over random schedules.
pub fn check() {
    use volrep::disk::{Token, aligned, freeze};
    let filled = |byte: u8, sectors: usize| {
        let mut buf = aligned(sectors * SECTOR);
        buf.resize(sectors * SECTOR, byte);
        freeze(buf)
    };
    let request = |op| DiskRequest { token: Token(0), file: File::Backing(0), op };
    let write =
        |byte, sectors, dsync| request(DiskOp::Write { offset: 0, data: filled(byte, sectors), dsync });
    let (mut kept, mut lost, mut torn) = (0, 0, 0);
    for seed in 0..200 {
        let mut rng = Prng::new(seed);
        let mut disk = Disk::new(&[(File::Backing(0), 64 * 512, 512)]);
        let first = disk.submit(write(1, 16, false)).expect("legal");
        assert!(disk.submit(write(9, 1, false)).is_err(), "overlapping writes in flight");
        disk.complete(first, None, &mut rng).expect("no fault");
        let sync = disk.submit(request(DiskOp::Sync)).expect("legal");
        let second = disk.submit(write(2, 16, false)).expect("legal");
        disk.complete(second, None, &mut rng).expect("no fault");
        disk.complete(sync, None, &mut rng).expect("no fault");
        assert!(disk.content(File::Backing(0))[..8192].iter().all(|b| *b == 2));
        let durable = seed % 2 == 0;
        if durable {
            let third = disk.submit(write(3, 8, true)).expect("legal");
            disk.complete(third, None, &mut rng).expect("no fault");
        }
        disk.power_loss(&mut rng);
        let content = &disk.content(File::Backing(0))[..8192];
        assert!(!durable || content[..4096].iter().all(|b| *b == 3), "dsync is durable");
        let twos = content[4096..].iter().filter(|b| **b == 2).count();
        assert!(content[4096..].iter().all(|b| [1, 2].contains(b)), "the first write was synced");
        kept += u32::from(twos == 4096);
        lost += u32::from(twos == 0);
        torn += u32::from(twos % 4096 != 0);
    }
    assert!(kept > 0 && lost > 0 && torn > 0, "kept {kept} lost {lost} torn {torn}");
}
