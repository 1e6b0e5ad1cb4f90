//! The states that an image may have: the start, and each record (or each write) on top of it.
//!
//! Owns: one hash for each state, kept up to date block by block. Invariant: two states have the same hash only if
//! all blocks of all volumes are the same.

use crate::log::{Event, FileId, Recording};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use volrep::format::record::{Content, Header, Record, padded};

const BLOCK: usize = 4096;
const SECTOR: usize = 512;

/// A state's hash: the sum over its blocks that are not all zeroes, each hashed with its place.
type State = u128;

/// Volumes in memory.
#[derive(Clone)]
pub struct Image {
    volumes: Vec<Vec<u8>>,
    state: State,
}

/// See the module's documentation.
#[derive(Clone)]
pub struct Prefixes {
    /// By position: that of the first state, then one more each.
    first: u64,
    states: Vec<State>,
    /// The last position with this state.
    last: HashMap<State, u64>,
}

fn block_state(volume: usize, index: usize, bytes: &[u8]) -> State {
    if bytes.iter().all(|b| *b == 0) {
        return 0;
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(bytes).update(&[volume as u8]).update(&(index as u64).to_le_bytes());
    u128::from_le_bytes(hasher.finalize().as_bytes()[..16].try_into().expect("sixteen"))
}

impl Image {
    /// Of these bytes.
    pub fn new(volumes: Vec<Vec<u8>>) -> Image {
        let blocks = |(v, bytes): (usize, &Vec<u8>)| {
            let states = bytes.chunks(BLOCK).enumerate().map(move |(i, b)| block_state(v, i, b));
            states.fold(0u128, u128::wrapping_add)
        };
        let state = volumes.iter().enumerate().map(blocks).fold(0, u128::wrapping_add);
        Image { volumes, state }
    }

    /// Its hash.
    pub fn state(&self) -> State {
        self.state
    }

    /// A write; zeroes without `data`.
    pub fn write(&mut self, volume: usize, offset: u64, len: u64, data: Option<&[u8]>) {
        let (from, to) = (offset as usize, (offset + len) as usize);
        let bytes = &mut self.volumes[volume];
        let blocks = from / BLOCK..to.div_ceil(BLOCK);
        let of = |bytes: &[u8], i: usize| {
            block_state(volume, i, &bytes[i * BLOCK..((i + 1) * BLOCK).min(bytes.len())])
        };
        for i in blocks.clone() {
            self.state = self.state.wrapping_sub(of(bytes, i));
        }
        match data {
            Some(data) => bytes[from..to].copy_from_slice(data),
            None => bytes[from..to].fill(0),
        }
        for i in blocks {
            self.state = self.state.wrapping_add(of(bytes, i));
        }
    }
}

/// Blocks of a volume that were spoilt behind the node's back.
pub struct Rot {
    pub volume: usize,
    /// Its first block.
    pub first: usize,
    pub good: Vec<u8>,
    pub bad: Vec<u8>,
}

impl Rot {
    /// What this block would be if none of its sectors were rotten: a repair may be torn.
    fn without(&self, volume: usize, index: usize, block: &[u8]) -> Option<Vec<u8>> {
        let at = index.checked_sub(self.first).filter(|_| volume == self.volume)? * BLOCK;
        let (good, bad) = (self.good.get(at..at + BLOCK)?, self.bad.get(at..at + BLOCK)?);
        let mut block = block.to_vec();
        for sector in (0..BLOCK).step_by(SECTOR).map(|s| s..s + SECTOR) {
            if block[sector.clone()] == bad[sector.clone()] {
                block[sector.clone()].copy_from_slice(&good[sector]);
            }
        }
        Some(block)
    }
}

/// The state of files; `rot` is forgiven.
pub fn state_of(files: &[PathBuf], rot: Option<&Rot>) -> State {
    let mut state = 0u128;
    let mut buf = vec![0; 1 << 20];
    for (volume, path) in files.iter().enumerate() {
        let file = File::open(path).unwrap();
        let len = file.metadata().unwrap().len();
        for at in (0..len).step_by(buf.len()) {
            let n = (len - at).min(buf.len() as u64) as usize;
            file.read_exact_at(&mut buf[..n], at).unwrap();
            let first = at as usize / BLOCK;
            for (i, block) in buf[..n].chunks(BLOCK).enumerate() {
                let sound = rot.and_then(|rot| rot.without(volume, first + i, block));
                state = state.wrapping_add(block_state(volume, first + i, sound.as_deref().unwrap_or(block)));
            }
        }
    }
    state
}

impl Prefixes {
    /// Of a start.
    pub fn new(first: u64, image: &Image) -> Prefixes {
        Prefixes { first, states: vec![image.state], last: HashMap::from([(image.state, first)]) }
    }

    /// One state more.
    pub fn push(&mut self, image: &Image) {
        self.last.insert(image.state, self.first + self.states.len() as u64);
        self.states.push(image.state);
    }

    /// The last position that an image in this state may have; none if it is no prefix.
    pub fn position(&self, state: State) -> Option<u64> {
        self.last.get(&state).copied()
    }

    /// How many states.
    pub fn len(&self) -> usize {
        self.states.len()
    }
}

/// Every record that was written to this journal, in the order of their LSNs.
pub fn records(recording: &Recording, journal: FileId) -> Vec<Record> {
    let mut found: Vec<Record> = Vec::new();
    for event in &recording.log {
        let Event::Write { file, data, .. } = event else { continue };
        let mut at = 0;
        while *file == journal && at + BLOCK <= data.len() {
            let Ok(header) = Header::decode(&data[at..]) else {
                at += BLOCK;
                continue;
            };
            let record = Record::decode(data.slice(at..)).expect("a record is written whole");
            at += padded(header.len);
            // What a restart cut off, or a resend, is written again.
            while found.last().is_some_and(|last| last.stamp.lsn >= record.stamp.lsn) {
                found.pop();
            }
            if let Some(last) = found.last() {
                assert_eq!(last.chain, record.stamp.prev, "record {:?} does not continue", record.stamp.lsn);
            }
            found.push(record);
        }
    }
    found
}

/// The states after each of these records, on top of `image`.
pub fn by_records(records: &[Record], mut image: Image) -> Prefixes {
    let first = records.first().map_or(0, |r| r.stamp.lsn.0 - 1);
    let mut prefixes = Prefixes::new(first, &image);
    for record in records {
        let payload = record.payload().expect("it was verified");
        let mut at = 0;
        for (extent, content) in record.extents() {
            let (volume, offset, len) =
                (usize::from(extent.address().volume()), extent.address().offset(), extent.len());
            match content {
                Content::Data => {
                    image.write(volume, offset, len, Some(&payload[at..at + len as usize]));
                    at += len as usize;
                }
                Content::Zeroes => image.write(volume, offset, len, None),
            }
        }
        prefixes.push(&image);
    }
    prefixes
}
