//! zstd frames: the payloads of records; leaves on a link are unpacked here, too.
//!
//! Owns: the contexts, which are used again: making one costs more than a small payload does. Invariant: a frame is
//! unpacked only into exactly the size that is known from elsewhere, and verified.

use crate::disk::{aligned, freeze};
use bytes::Bytes;
use std::cell::RefCell;
use zstd::bulk;

thread_local! {
    static UNPACK: RefCell<Option<bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// A compression context and its output buffer.
#[derive(Default)]
pub struct Compressor {
    context: Option<(i32, bulk::Compressor<'static>)>,
    packed: Vec<u8>,
}

impl Compressor {
    /// `from` compressed to less than `limit` bytes, or `None`.
    pub fn compress(&mut self, level: i32, from: &[u8], limit: usize) -> Option<&[u8]> {
        match &mut self.context {
            Some((now, _)) if *now == level => {}
            Some((now, context)) => {
                context.set_compression_level(level).ok()?;
                *now = level;
            }
            None => self.context = Some((level, bulk::Compressor::new(level).ok()?)),
        }
        // Never made smaller: what a longer one needed is zeroed once.
        self.packed.resize(limit.max(self.packed.len()), 0);
        // An error here means that it does not fit in `limit`: stored raw instead.
        let n = self.context.as_mut()?.1.compress_to_buffer(from, &mut self.packed[..limit]).ok()?;
        Some(&self.packed[..n])
    }
}

/// The `raw` bytes of a frame, 4096-aligned; `None` if it is damaged, or holds another number of them. The caller
/// has bounded `raw`.
pub fn unpack(frame: &[u8], raw: usize) -> Option<Bytes> {
    let mut out = aligned(raw);
    out.resize(raw, 0);
    let n = UNPACK.with_borrow_mut(|context| {
        if context.is_none() {
            *context = Some(bulk::Decompressor::new().ok()?);
        }
        context.as_mut()?.decompress_to_buffer(frame, &mut out[..]).ok()
    })?;
    (n == raw).then(|| freeze(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_all_levels_are_unpacked_and_damaged_ones_do_no_harm() {
        let raw: Vec<u8> = (0..70_000u32).map(|i| (i / 7 % 251) as u8).collect();
        let mut compressor = Compressor::default();
        for level in [1, -3, 19, 19, -1] {
            let packed = compressor.compress(level, &raw, raw.len()).unwrap().to_vec();
            assert!(packed.len() < raw.len() / 4, "level {level}: {}", packed.len());
            assert_eq!(unpack(&packed, raw.len()).unwrap(), raw);
            assert_eq!((unpack(&packed, raw.len() - 1), unpack(&packed, raw.len() + 1)), (None, None));
            assert_eq!(unpack(&packed[..packed.len() - 1], raw.len()), None);
            assert_eq!(unpack(&packed, raw.len()).unwrap(), raw, "after a failure");
            assert_eq!(compressor.compress(level, &raw, 16), None);
        }
    }
}
