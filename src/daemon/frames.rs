//! The byte stream of a link: messages to wire bytes and back.
//!
//! Owns: cutting the stream into frames. Invariant: a body is allocated only after its frame's
//! header has passed its bounds, and holds at most one message; the outcome does not depend on how
//! the stream was cut.

use crate::disk::{AlignedBuf, aligned, freeze};
use crate::format::FormatError;
use crate::format::message::{FRAME, Frame, FrameHeader, Message};
use crate::format::record::padded;
use bytes::Bytes;
use std::collections::VecDeque;
use std::io;

/// What stands between frames and the socket. The place for TLS.
#[derive(Debug)]
pub(super) enum Transport {
    /// The frames themselves.
    Plain,
}

impl Transport {
    /// Appends the frame's wire bytes to `wire`; a record's bytes are shared, not copied.
    pub fn seal(&mut self, frame: Frame, wire: &mut VecDeque<Bytes>) {
        match self {
            Transport::Plain => {
                wire.push_back(Bytes::from(frame.head));
                if !frame.record.is_empty() {
                    wire.push_back(frame.record);
                }
            }
        }
    }

    /// The plain bytes in what was received. (TLS may have to answer, too: it would get `wire`.)
    pub fn open<'a>(&'a mut self, received: &'a [u8], _wire: &mut VecDeque<Bytes>) -> io::Result<&'a [u8]> {
        match self {
            Transport::Plain => Ok(received),
        }
    }
}

/// Puts messages together.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    head: [u8; FRAME],
    have: usize,
    body: Option<(FrameHeader, Body)>,
}

/// The body of a frame as it comes in.
#[derive(Debug)]
enum Body {
    Small(Vec<u8>),
    /// Aligned, and in the end whole blocks: what a journal takes without a copy.
    Record(AlignedBuf),
}

impl Body {
    fn new(header: &FrameHeader) -> Body {
        match header.is_record() {
            true => Body::Record(aligned(padded(header.len))),
            false => Body::Small(Vec::with_capacity(header.len)),
        }
    }

    fn len(&self) -> usize {
        match self {
            Body::Small(bytes) => bytes.len(),
            Body::Record(bytes) => bytes.len(),
        }
    }

    fn add(&mut self, part: &[u8]) {
        match self {
            Body::Small(bytes) => bytes.extend_from_slice(part),
            Body::Record(bytes) => bytes.extend_from_slice(part),
        }
    }

    fn whole(self) -> Bytes {
        match self {
            Body::Small(bytes) => bytes.into(),
            Body::Record(mut bytes) => {
                bytes.resize(padded(bytes.len()), 0);
                freeze(bytes)
            }
        }
    }
}

impl Assembler {
    /// Takes bytes of the stream; appends the messages that they complete.
    pub fn feed(&mut self, mut input: &[u8], messages: &mut Vec<Message>) -> Result<(), FormatError> {
        loop {
            if self.body.is_none() {
                let part = input.len().min(FRAME - self.have);
                self.head[self.have..self.have + part].copy_from_slice(&input[..part]);
                self.have += part;
                input = &input[part..];
                if self.have < FRAME {
                    return Ok(());
                }
                let header = FrameHeader::decode(&self.head)?;
                self.body = Some((header, Body::new(&header)));
            }
            let Some((header, body)) = &mut self.body else { return Ok(()) };
            let part = input.len().min(header.len - body.len());
            body.add(&input[..part]);
            input = &input[part..];
            if body.len() < header.len {
                return Ok(());
            }
            let Some((header, body)) = self.body.take() else { return Ok(()) };
            self.have = 0;
            messages.push(header.body(body.whole())?);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::message::{MAX_BODY, Standing, refuse};
    use crate::units::Lsn;

    fn stream() -> (Vec<Message>, Vec<u8>) {
        let messages = vec![
            Message::Challenge { nonce: [7; 32] },
            refuse("not today"),
            Message::Durable { lsn: Lsn(9) },
            Message::Heartbeat {
                wall: 1,
                echo: 2,
                tail: None,
                time: 4,
                bytes: 5,
                silent: 6,
                live: true,
                feeds: vec![],
                standing: Standing::Member,
            },
        ];
        let mut wire = VecDeque::new();
        for m in &messages {
            Transport::Plain.seal(m.encode(), &mut wire);
        }
        (messages, wire.iter().flat_map(|b| b.to_vec()).collect())
    }

    #[test]
    fn messages_do_not_depend_on_how_the_stream_is_cut() {
        let (messages, bytes) = stream();
        for size in 1..=bytes.len() {
            let (mut assembler, mut got) = (Assembler::default(), Vec::new());
            for part in bytes.chunks(size) {
                assembler.feed(part, &mut got).unwrap();
            }
            assert_eq!(got, messages, "cut into {size}");
        }
    }

    #[test]
    fn garbage_is_refused_before_anything_is_allocated() {
        let (_, mut bytes) = stream();
        bytes[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut assembler = Assembler::default();
        assert_eq!(assembler.feed(&bytes, &mut Vec::new()), Err(FormatError::Field("length")));
        assert!(assembler.body.is_none());
        let (_, mut bytes) = stream();
        bytes[20] ^= 1;
        assert_eq!(Assembler::default().feed(&bytes, &mut Vec::new()), Err(FormatError::Checksum));
        const { assert!(MAX_BODY < 2 << 20) };
    }
}
