//! The bytes of a file, most of which nobody ever writes.
//!
//! Owns: the pieces that were written. Invariant: everything else reads as zeroes and takes no memory; what was read
//! stays as it was, whatever is written afterwards.

use bytes::Bytes;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;
use volrep::disk::{AlignedBuf, aligned, freeze};

/// The longest range that is lent without a copy.
const LENT: usize = 4 << 20;

#[repr(align(4096))]
struct Zeroes([u8; LENT]);
static ZEROES: Zeroes = Zeroes([0; LENT]);

/// `n` of them.
fn zeroes(n: usize) -> AlignedBuf {
    let mut buf = aligned(n);
    buf.extend_from_slice(&ZEROES.0[..n]);
    buf
}

struct Piece(Arc<AlignedBuf>);

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// A file's content.
#[derive(Clone)]
pub struct Sparse {
    len: usize,
    /// Bytes of a piece.
    size: usize,
    pieces: Vec<Option<Arc<AlignedBuf>>>,
}

impl Sparse {
    /// `len` zeroes, in pieces of `size` bytes (at most 4 MiB).
    pub fn new(len: usize, size: usize) -> Sparse {
        Sparse { len, size, pieces: vec![None; len.div_ceil(size)] }
    }
    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Bytes of a piece.
    pub fn piece_len(&self) -> usize {
        self.size
    }
    /// The parts of a range that lie in one piece each: which, where in it, and where in the range.
    fn parts(&self, at: usize, len: usize) -> impl Iterator<Item = (usize, Range<usize>, usize)> + use<> {
        let (size, end) = (self.size, at + len);
        assert!(end <= self.len, "{at:#x}+{len:#x} of {:#x}", self.len);
        let first = at / size;
        (first..end.div_ceil(size).max(first)).map(move |piece| {
            let (start, stop) = ((piece * size).max(at), ((piece + 1) * size).min(end));
            (piece, start - piece * size..stop - piece * size, start - at)
        })
    }
    fn whole(&self, at: usize, len: usize) -> bool {
        at / self.size == (at + len).saturating_sub(1) / self.size
    }
    /// What is there.
    pub fn get(&self, range: Range<usize>) -> Cow<'_, [u8]> {
        let (at, len) = (range.start, range.len());
        if !self.whole(at, len) {
            let mut all = Vec::with_capacity(len);
            self.each(at, len, |part| all.extend_from_slice(part));
            return Cow::Owned(all);
        }
        Cow::Borrowed(match self.pieces.get(at / self.size).and_then(Option::as_ref) {
            Some(piece) => &piece[at % self.size..at % self.size + len],
            None => &ZEROES.0[..len],
        })
    }
    fn each<'a>(&'a self, at: usize, len: usize, mut told: impl FnMut(&'a [u8])) {
        for (piece, range, _) in self.parts(at, len) {
            told(match &self.pieces[piece] {
                Some(piece) => &piece[range],
                None => &ZEROES.0[..range.len()],
            });
        }
    }
    /// All of it, piece by piece: its bytes, or how many zeroes.
    pub fn pieces(&self) -> impl Iterator<Item = Result<&[u8], usize>> {
        let len = |n: usize| self.size.min(self.len - n * self.size);
        let pieces = self.pieces.iter().enumerate();
        pieces.map(move |(n, piece)| piece.as_ref().map(|p| &p[..]).ok_or_else(|| len(n)))
    }
    /// The answer to a read: 4096-aligned in memory if `at` is a multiple of that.
    pub fn read(&self, at: usize, len: usize) -> Bytes {
        let empty = self.parts(at, len).all(|(piece, ..)| self.pieces[piece].is_none());
        if empty && len <= LENT {
            return Bytes::from_static(&ZEROES.0[..len]);
        }
        // A copy costs less than the piece's own would, should it be written meanwhile.
        if self.whole(at, len)
            && len > self.size / 8
            && at.is_multiple_of(4096)
            && let Some(piece) = &self.pieces[at / self.size]
        {
            return Bytes::from_owner(Piece(piece.clone())).slice(at % self.size..at % self.size + len);
        }
        let mut buf = aligned(len);
        self.each(at, len, |part| buf.extend_from_slice(part));
        freeze(buf)
    }
    fn piece(&mut self, piece: usize) -> &mut [u8] {
        let len = self.size.min(self.len - piece * self.size);
        let piece = self.pieces[piece].get_or_insert_with(|| Arc::new(zeroes(len)));
        let bytes: &mut AlignedBuf = Arc::make_mut(piece);
        bytes
    }
    /// Puts bytes there.
    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        for (piece, range, from) in self.parts(at, bytes.len()) {
            let len = range.len();
            self.piece(piece)[range].copy_from_slice(&bytes[from..from + len]);
        }
    }
    /// Puts zeroes there.
    pub fn zero(&mut self, at: usize, len: usize) {
        for (piece, range, _) in self.parts(at, len) {
            if range.len() == self.size.min(self.len - piece * self.size) {
                self.pieces[piece] = None;
            } else if self.pieces[piece].is_some() {
                self.piece(piece)[range].fill(0);
            }
        }
    }
    /// Puts there what another one has there.
    pub fn copy_from(&mut self, other: &Sparse, at: usize, len: usize) {
        let (mut at, mut parts) = (at, Vec::new());
        other.each(at, len, |part| parts.push(part));
        for part in parts {
            self.write(at, part);
            at += part.len();
        }
    }
}

/// A vector behaves the same.
pub fn check() {
    use crate::prng::Prng;
    let mut rng = Prng::new(7);
    for size in [512, 4096, 10_000, 1 << 20] {
        let (mut plain, mut sparse) = (vec![0; 50_000], Sparse::new(50_000, size));
        let mut other = Sparse::new(50_000, 4096);
        for turn in 0..400 {
            let at = rng.below(50_000) as usize;
            let len = rng.log(1, 20_000).min(50_000 - at as u64) as usize;
            let before = sparse.read(at, len);
            assert_eq!(before, plain[at..at + len]);
            let was = plain[at..at + len].to_vec();
            match turn % 3 {
                0 => {
                    sparse.zero(at, len);
                    plain[at..at + len].fill(0);
                }
                1 => {
                    sparse.write(at, &vec![turn as u8 | 1; len]);
                    plain[at..at + len].fill(turn as u8 | 1);
                }
                _ => {
                    sparse.copy_from(&other, at, len);
                    plain[at..at + len].copy_from_slice(&other.get(at..at + len));
                }
            }
            assert_eq!(before, was, "what was read changes");
            assert_eq!(*sparse.get(0..50_000), plain);
            other.copy_from(&sparse, at, len);
            let aligned = at / 4096 * 4096;
            assert!(sparse.read(aligned, 512).as_ptr().addr().is_multiple_of(4096));
        }
    }
}
