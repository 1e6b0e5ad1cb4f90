//! What is to be sent to a client, in order.
//!
//! Owns: the layout of everything that the server says. Invariant: small pieces are gathered into
//! one buffer, payloads are passed on without a copy, and the order of calls is the order on the
//! wire.

use super::wire::{self, Fault, chunk};
use bytes::{BufMut, Bytes, BytesMut};

/// Payloads up to this are copied: cheaper than an entry of their own in the gather list.
const COPIED: usize = 512;
/// Room for headers that is made at once.
const ROOM: usize = 4096;
/// Room for a chunk's header and what precedes its payload, or a sentence.
const CHUNK_ROOM: usize = 96;

/// Outgoing bytes.
#[derive(Default)]
pub(super) struct Replies {
    small: BytesMut,
    queue: Vec<Bytes>,
    queued: usize,
}

impl Replies {
    /// Takes all that is queued.
    pub fn take(&mut self) -> Vec<Bytes> {
        if !self.small.is_empty() {
            self.queue.push(self.small.split().freeze());
        }
        self.queued = 0;
        std::mem::take(&mut self.queue)
    }

    /// Bytes queued and not taken.
    pub fn queued(&self) -> usize {
        self.queued + self.small.len()
    }

    fn room(&mut self, len: usize) -> &mut BytesMut {
        if self.small.capacity() - self.small.len() < len {
            self.small.reserve(len.max(ROOM));
        }
        &mut self.small
    }

    fn payload(&mut self, data: Bytes) {
        if data.len() <= COPIED {
            self.room(data.len()).put_slice(&data);
            return;
        }
        let before = self.small.split().freeze();
        self.queued += before.len() + data.len();
        self.queue.push(before);
        self.queue.push(data);
    }

    /// The first words of a connection.
    pub fn greeting(&mut self) {
        let out = self.room(18);
        out.put_u64(wire::NBDMAGIC);
        out.put_u64(wire::IHAVEOPT);
        out.put_u16(wire::FIXED_NEWSTYLE | wire::NO_ZEROES);
    }

    /// The answer to EXPORT_NAME.
    pub fn export(&mut self, size: u64, flags: u16, zeroes: bool) {
        let out = self.room(134);
        out.put_u64(size);
        out.put_u16(flags);
        out.put_bytes(0, if zeroes { 124 } else { 0 });
    }

    /// An answer to any other option; its data in parts.
    pub fn option(&mut self, option: u32, reply: u32, parts: &[&[u8]]) {
        let len: usize = parts.iter().map(|p| p.len()).sum();
        let out = self.room(20 + len);
        out.put_u64(wire::OPTION_REPLY_MAGIC);
        out.put_u32(option);
        out.put_u32(reply);
        out.put_u32(len as u32);
        parts.iter().for_each(|p| out.put_slice(p));
    }

    /// A simple reply without payload.
    pub fn simple(&mut self, handle: u64, error: u32) {
        let out = self.room(16);
        out.put_u32(wire::SIMPLE_REPLY_MAGIC);
        out.put_u32(error);
        out.put_u64(handle);
    }

    /// The bytes of a read, in a simple reply.
    pub fn simple_data(&mut self, handle: u64, data: Bytes) {
        self.simple(handle, 0);
        self.payload(data);
    }

    /// The bytes of a read, in one chunk.
    pub fn data(&mut self, handle: u64, offset: u64, data: Bytes) {
        self.chunk(chunk::OFFSET_DATA, handle, 8 + data.len()).put_u64(offset);
        self.payload(data);
    }

    /// A chunk that says why a request failed.
    pub fn error(&mut self, handle: u64, fault: Fault) {
        let out = self.chunk(chunk::ERROR, handle, 6 + fault.text.len());
        out.put_u32(fault.error);
        out.put_u16(fault.text.len() as u16);
        out.put_slice(fault.text.as_bytes());
    }

    /// A chunk that gives one status to the whole range.
    pub fn status(&mut self, handle: u64, len: u32, flags: u32) {
        let out = self.chunk(chunk::BLOCK_STATUS, handle, 12);
        out.put_u32(wire::BASE_ALLOCATION_ID);
        out.put_u32(len);
        out.put_u32(flags);
    }

    /// The end of a reply that has nothing to say.
    pub fn none(&mut self, handle: u64) {
        self.chunk(chunk::NONE, handle, 0);
    }

    /// Begins a chunk with `len` bytes to follow. Every reply is one chunk, so each is the last.
    fn chunk(&mut self, kind: u16, handle: u64, len: usize) -> &mut BytesMut {
        let out = self.room(CHUNK_ROOM);
        out.put_u32(wire::STRUCTURED_REPLY_MAGIC);
        out.put_u16(chunk::DONE);
        out.put_u16(kind);
        out.put_u64(handle);
        out.put_u32(len as u32);
        out
    }
}
