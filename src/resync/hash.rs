//! The tree of hashes over a window.
//!
//! A leaf's hash is keyed blake3 of its bytes; an extent's root is keyed blake3 of its leaves' whole
//! hashes; the window's root is keyed blake3 of the extents' roots. The key is derived from the group, so
//! a hash says something of the bytes alone and can be kept in an index.
//!
//! Owns: these definitions, and the work that belongs on a thread of its own. Invariant: what is computed
//! side by side (`blake3::platform`, which is not part of that crate's stable interface) is what
//! `blake3::keyed_hash` gives; a test compares them.

use crate::format::codec::unpack;
use crate::format::compare::{EXTENT, EXTENT_LEAVES, LEAF, Root};
use crate::units::GroupId;
use blake3::IncrementCounter;
use blake3::platform::Platform;
use bytes::Bytes;

/// In place of a root that is not known (no bytes have it, but for one chance in 2^128).
pub const UNKNOWN: Root = [0; 16];

/// A key for all hashes of a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HashKey([u8; 32]);

impl HashKey {
    /// The group's.
    pub fn of(group: GroupId) -> HashKey {
        HashKey(blake3::derive_key("volrep 1 comparison of images", &group.0))
    }
}

/// The hashes over a part of a window that starts at an extent.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Hashes {
    /// One per extent.
    pub roots: Vec<Root>,
    /// One per leaf.
    pub leaves: Vec<u64>,
    /// Bytes that were hashed.
    pub len: u64,
}

/// Work for a thread.
#[derive(Clone, Debug)]
pub enum Job {
    /// Hash these bytes, which start at an extent.
    Hash(HashKey, Bytes),
    /// Make one frame of these.
    Pack(Vec<Bytes>),
    /// Unpack a frame that must have exactly this many bytes: leaves, and hash these.
    Unpack(HashKey, Bytes, usize),
}

/// Its product.
#[derive(Clone, Debug)]
pub enum Product {
    /// Of [`Job::Hash`].
    Hashed(Hashes),
    /// Of [`Job::Pack`].
    Packed(Bytes),
    /// Of [`Job::Unpack`], with the hash of each leaf; `None`: it is not such a frame.
    Unpacked(Option<(Bytes, Vec<u64>)>),
}

/// zstd level of leaves on the link.
const LEVEL: i32 = 1;

impl Job {
    /// Bytes that go in.
    pub fn len(&self) -> usize {
        match self {
            Job::Hash(_, bytes) => bytes.len(),
            Job::Pack(parts) => parts.iter().map(Bytes::len).sum(),
            Job::Unpack(_, _, raw) => *raw,
        }
    }

    /// Nothing goes in.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Does it.
    pub fn run(self) -> Product {
        match self {
            Job::Hash(key, bytes) => Product::Hashed(hash(&key, &bytes)),
            Job::Pack(parts) => Product::Packed(pack(&parts)),
            Job::Unpack(key, frame, raw) => Product::Unpacked(unpack(&frame, raw).map(|bytes| {
                let hashes = hash(&key, &bytes).leaves;
                (bytes, hashes)
            })),
        }
    }
}

fn pack(parts: &[Bytes]) -> Bytes {
    let raw = parts.concat();
    zstd::bulk::compress(&raw, LEVEL).expect("memory is enough for a bounded frame").into()
}

/// Hashes bytes that start at an extent.
pub fn hash(key: &HashKey, bytes: &[u8]) -> Hashes {
    let mut hashes = Hashes { len: bytes.len() as u64, ..Hashes::default() };
    for extent in bytes.chunks(EXTENT as usize) {
        let mut all = [[0u8; 32]; EXTENT_LEAVES];
        let leaves = extent.len().div_ceil(LEAF as usize);
        match <&[u8; EXTENT as usize]>::try_from(extent) {
            Ok(whole) => whole_extent(key, whole, &mut all),
            Err(_) => {
                for (leaf, hash) in extent.chunks(LEAF as usize).zip(&mut all) {
                    *hash = *blake3::keyed_hash(&key.0, leaf).as_bytes();
                }
            }
        }
        hashes.roots.push(short(blake3::keyed_hash(&key.0, all[..leaves].as_flattened())));
        hashes.leaves.extend(all[..leaves].iter().map(first_eight));
    }
    hashes
}

/// The root over a window's extents: those that `touched` (a bit each) names count as zeroes.
pub fn window_root(key: &HashKey, roots: &[Root], touched: &[u8]) -> Root {
    if touched.iter().all(|b| *b == 0) {
        return short(blake3::keyed_hash(&key.0, roots.as_flattened()));
    }
    let mut roots = roots.to_vec();
    for (i, root) in roots.iter_mut().enumerate() {
        if touched[i / 8] >> (i % 8) & 1 == 1 {
            *root = UNKNOWN;
        }
    }
    short(blake3::keyed_hash(&key.0, roots.as_flattened()))
}

fn short(hash: blake3::Hash) -> Root {
    hash.as_bytes()[..16].try_into().expect("a hash has 32 bytes")
}

fn first_eight(hash: &[u8; 32]) -> u64 {
    u64::from_le_bytes(hash[..8].try_into().expect("a hash has 32 bytes"))
}

// The flags of the blake3 specification, section 2.2.
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 2;
const PARENT: u8 = 4;
const ROOT: u8 = 8;
const KEYED: u8 = 16;
/// Bytes of a blake3 chunk.
const CHUNK: usize = 1024;
const CHUNKS: usize = LEAF as usize / CHUNK;

/// The leaves of one extent side by side: a leaf is four chunks and three parents of blake3's tree, and
/// the processor hashes as many inputs at once as its vectors are wide.
fn whole_extent(key: &HashKey, bytes: &[u8; EXTENT as usize], out: &mut [[u8; 32]; EXTENT_LEAVES]) {
    let platform = Platform::detect();
    let words: [u32; 8] =
        std::array::from_fn(|i| u32::from_le_bytes(key.0[4 * i..4 * i + 4].try_into().expect("four bytes")));
    let mut columns = [[[0u8; 32]; EXTENT_LEAVES]; CHUNKS];
    for (n, column) in columns.iter_mut().enumerate() {
        let input: [&[u8; CHUNK]; EXTENT_LEAVES] = std::array::from_fn(|leaf| {
            let at = leaf * LEAF as usize + n * CHUNK;
            bytes[at..at + CHUNK].try_into().expect("a chunk")
        });
        let (same, ends) = (IncrementCounter::No, (CHUNK_START, CHUNK_END));
        platform.hash_many(&input, &words, n as u64, same, KEYED, ends.0, ends.1, column.as_flattened_mut());
    }
    let chunks: [[[u8; 32]; CHUNKS]; EXTENT_LEAVES] =
        std::array::from_fn(|leaf| std::array::from_fn(|n| columns[n][leaf]));
    let mut parents = [[[0u8; 32]; 2]; EXTENT_LEAVES];
    let pairs: [&[u8; 64]; 2 * EXTENT_LEAVES] = std::array::from_fn(|i| {
        chunks[i / 2][2 * (i % 2)..2 * (i % 2) + 2].as_flattened().try_into().expect("two hashes")
    });
    let flat = parents.as_flattened_mut().as_flattened_mut();
    platform.hash_many(&pairs, &words, 0, IncrementCounter::No, KEYED | PARENT, 0, 0, flat);
    let roots: [&[u8; 64]; EXTENT_LEAVES] =
        std::array::from_fn(|leaf| parents[leaf].as_flattened().try_into().expect("two hashes"));
    let flags = KEYED | PARENT | ROOT;
    platform.hash_many(&roots, &words, 0, IncrementCounter::No, flags, 0, 0, out.as_flattened_mut());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn side_by_side_is_what_one_by_one_gives() {
        let key = HashKey::of(GroupId([7; 16]));
        let mut bytes = vec![0; 3 * EXTENT as usize + 2 * LEAF as usize + 512];
        blake3::Hasher::new().update(b"seed").finalize_xof().fill(&mut bytes);
        let hashes = hash(&key, &bytes);
        let one_by_one: Vec<_> = bytes.chunks(LEAF as usize).map(|l| blake3::keyed_hash(&key.0, l)).collect();
        let expected: Vec<_> = one_by_one.iter().map(|h| first_eight(h.as_bytes())).collect();
        assert_eq!(hashes.leaves, expected);
        assert_eq!(hashes.roots.len(), 4);
        for (root, leaves) in hashes.roots.iter().zip(one_by_one.chunks(EXTENT_LEAVES)) {
            let all: Vec<u8> = leaves.iter().flat_map(|h| *h.as_bytes()).collect();
            assert_eq!(*root, short(blake3::keyed_hash(&key.0, &all)));
        }
    }

    #[test]
    fn a_frame_of_another_size_or_of_nonsense_is_refused() {
        let frame = pack(&[Bytes::from(vec![1; 4096]), Bytes::from(vec![2; 8192])]);
        let bytes = unpack(&frame, 12288).unwrap();
        assert!(bytes[..4096].iter().all(|b| *b == 1) && bytes[4096..].iter().all(|b| *b == 2));
        assert_eq!(unpack(&frame, 12287), None);
        assert_eq!(unpack(&frame, 12289), None);
        assert_eq!(unpack(&frame[..frame.len() - 1], 12288), None);
        assert_eq!(unpack(b"nonsense", 4096), None);
    }
}
