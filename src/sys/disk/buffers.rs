//! The buffers of large reads, used again.
//!
//! Owns: the spare ones. Whoever lets go of the last part of such a read, on whatever thread, gives its buffer
//! back. Why not the allocator: a comparison takes and drops hundreds of aligned buffers a second between small
//! pieces, and the allocator's heap grew to several times of what was in use. Invariant: at most [`SPARE`] are
//! kept, of [`LARGE`] bytes each; more are freed.

use crate::disk::{AlignedBuf, aligned, freeze};
use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded};

/// Bytes of a buffer.
const LARGE: usize = 1 << 20;
/// Buffers kept.
const SPARE: usize = 16;

pub(super) struct Buffers {
    back: Sender<AlignedBuf>,
    spare: Receiver<AlignedBuf>,
}

impl Buffers {
    pub fn new() -> Buffers {
        let (back, spare) = bounded(SPARE);
        Buffers { back, spare }
    }

    /// An empty buffer for at least `len` bytes.
    pub fn take(&self, len: usize) -> AlignedBuf {
        if is_large(len) { self.spare.try_recv().unwrap_or_else(|_| aligned(LARGE)) } else { aligned(len) }
    }

    /// The bytes of a read into [`Buffers::take`]'s buffer, without a copy.
    pub fn freeze(&self, buf: AlignedBuf) -> Bytes {
        if is_large(buf.len()) {
            Bytes::from_owner(Lent { buf, back: self.back.clone() })
        } else {
            freeze(buf)
        }
    }
}

/// Smaller ones would waste more than they save.
fn is_large(len: usize) -> bool {
    (LARGE / 2 + 1..=LARGE).contains(&len)
}

struct Lent {
    buf: AlignedBuf,
    back: Sender<AlignedBuf>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buf
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut buf = std::mem::replace(&mut self.buf, aligned(0));
        buf.clear();
        // Full, or the disk is gone: the buffer goes, too.
        let _ = self.back.try_send(buf);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_buffer_is_used_again_once_nobody_holds_a_part_of_it() {
        let buffers = Buffers::new();
        let mut buf = buffers.take(LARGE);
        buf.resize(LARGE, 7);
        let at = buf.as_ptr();
        let whole = buffers.freeze(buf);
        let part = whole.slice(LARGE - 1..);
        drop(whole);
        assert_ne!(buffers.take(LARGE).as_ptr(), at);
        assert_eq!(part[..], [7]);
        std::thread::spawn(move || drop(part)).join().unwrap();
        let again = buffers.take(LARGE - 4096);
        assert_eq!((again.as_ptr(), again.len(), again.capacity()), (at, 0, LARGE));
    }
}
