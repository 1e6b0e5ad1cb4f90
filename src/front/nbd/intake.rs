//! Cuts the byte stream of a connection into headers and payloads.
//!
//! Owns: bytes that do not yet make a whole. Invariant: after a `None` the input is used up and
//! the same item is asked for again; so an item is complete at the same byte however the stream
//! was cut. A body that lies whole in one input is sliced from it, otherwise copied once.

use bytes::{Buf, Bytes};

/// Largest header, bytes.
const MAX_HEADER: usize = 28;

/// Incoming bytes.
#[derive(Default)]
pub(super) struct Intake {
    input: Bytes,
    header: [u8; MAX_HEADER],
    header_len: usize,
    body: Vec<u8>,
}

impl Intake {
    /// Adds what was received; the input before it has been used up.
    pub fn feed(&mut self, input: Bytes) {
        debug_assert!(self.input.is_empty());
        self.input = input;
    }

    /// The next header of `N` bytes.
    pub fn header<const N: usize>(&mut self) -> Option<[u8; N]> {
        const { assert!(N <= MAX_HEADER) };
        if self.header_len == 0
            && let Some(whole) = self.input.first_chunk::<N>()
        {
            let whole = *whole;
            self.input.advance(N);
            return Some(whole);
        }
        let part = self.input.len().min(N - self.header_len);
        self.header[self.header_len..self.header_len + part].copy_from_slice(&self.input[..part]);
        self.input.advance(part);
        self.header_len += part;
        let whole = *self.header[..self.header_len].first_chunk::<N>()?;
        self.header_len = 0;
        Some(whole)
    }

    /// The next `len` bytes. The caller bounds `len`: room for it is made at its first byte.
    pub fn body(&mut self, len: usize) -> Option<Bytes> {
        if self.body.is_empty() {
            if self.input.len() >= len {
                return Some(self.input.split_to(len));
            }
            if self.input.is_empty() {
                return None;
            }
            self.body.reserve_exact(len);
        }
        let part = self.input.len().min(len - self.body.len());
        self.body.extend_from_slice(&self.input[..part]);
        self.input.advance(part);
        (self.body.len() == len).then(|| Bytes::from(std::mem::take(&mut self.body)))
    }

    /// Drops up to `left` bytes; says how many remain to be dropped.
    pub fn skip(&mut self, left: u32) -> u32 {
        let part = self.input.len().min(left as usize);
        self.input.advance(part);
        left - part as u32
    }

    /// Bytes of the current body that are here.
    pub fn held(&self) -> usize {
        self.body.len()
    }

    /// Memory made for the current body, bytes.
    #[cfg(test)]
    pub fn room(&self) -> usize {
        self.body.capacity()
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        *self = Intake::default();
    }
}
