//! One client connection.
//!
//! Owns: the phase of the connection and its requests in flight. Invariant: each cookie that went
//! out has one entry in `pending` until it is completed, and its cost is in `outstanding`.

use super::intake::Intake;
use super::negotiation::{Negotiation, Next};
use super::replies::Replies;
use super::transmission::{Header, Rules, Verdict};
use super::wire::{self, Fault, cmd};
use super::{Export, ProtocolError, Request};
use crate::disk::IoError;
use crate::node::event::Op;
use crate::units::Extent;
use bytes::Bytes;
use slab::Slab;
use std::sync::Arc;

/// What a request counts for in [`Session::outstanding`] besides its payload, bytes: a flood of
/// small requests must reach the bound, too.
const REQUEST_COST: usize = 256;

/// One client connection, without its socket.
pub struct Session {
    exports: Arc<[Export]>,
    phase: Phase,
    negotiation: Negotiation,
    intake: Intake,
    replies: Replies,
    pending: Slab<Pending>,
    outstanding: usize,
    failed: Option<ProtocolError>,
}

/// What the next bytes are.
#[derive(Clone, Copy)]
enum Phase {
    ClientFlags,
    OptionHeader,
    OptionData {
        option: u32,
        len: u32,
    },
    OptionSkip {
        left: u32,
    },
    RequestHeader(Rules),
    Payload {
        rules: Rules,
        handle: u64,
        extent: Extent,
        fua: bool,
    },
    /// The payload of a write that is not done; it is answered when it has passed.
    PayloadSkip {
        rules: Rules,
        handle: u64,
        left: u32,
        fault: Fault,
    },
    /// The client has taken its leave.
    Ended,
}

/// A request in flight.
struct Pending {
    handle: u64,
    /// Payload, bytes.
    payload: usize,
    /// A read's offset in the export.
    read: Option<u64>,
    structured: bool,
}

impl Session {
    /// A session that has its greeting to send.
    pub fn new(exports: Arc<[Export]>) -> Session {
        let mut replies = Replies::default();
        replies.greeting();
        Session {
            exports,
            phase: Phase::ClientFlags,
            negotiation: Negotiation::default(),
            intake: Intake::default(),
            replies,
            pending: Slab::new(),
            outstanding: 0,
            failed: None,
        }
    }

    /// A session of a client that knows the export and does not negotiate: its first byte is a request's.
    pub fn transmission(export: &Export) -> Session {
        Session {
            exports: Arc::new([]),
            phase: Phase::RequestHeader(Rules::new(export, false, false)),
            negotiation: Negotiation::default(),
            intake: Intake::default(),
            replies: Replies::default(),
            pending: Slab::new(),
            outstanding: 0,
            failed: None,
        }
    }

    /// Takes what was received, cut anywhere; appends what the node is to do. After an error the
    /// session is [`closing`](Session::closing) and gives the same error again.
    ///
    /// A write's data shares the memory of `input` until it is dropped: receive into one buffer and
    /// split off what came, or a small write holds a large buffer.
    pub fn receive(&mut self, input: Bytes, requests: &mut Vec<Request>) -> Result<(), ProtocolError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        self.intake.feed(input);
        loop {
            match self.advance(requests) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) => {
                    self.failed = Some(error);
                    self.intake.clear();
                    return Err(error);
                }
            }
        }
    }

    /// Queues the reply to a request: a read's bytes, or nothing. An unknown cookie is ignored.
    pub fn complete(&mut self, cookie: u64, result: Result<Bytes, IoError>) {
        let Some(done) = usize::try_from(cookie).ok().and_then(|key| self.pending.try_remove(key)) else {
            return;
        };
        self.outstanding -= done.payload + REQUEST_COST;
        match (result, done.read) {
            (Ok(data), Some(_)) if data.len() != done.payload => {
                // Never a reply whose length is not what its header or the request says.
                self.fail(done.handle, IoError::EIO.into(), done.structured);
            }
            (Ok(data), Some(offset)) if done.structured => self.replies.data(done.handle, offset, data),
            (Ok(data), Some(_)) => self.replies.simple_data(done.handle, data),
            (Ok(_), None) => self.replies.simple(done.handle, 0),
            (Err(error), _) => self.fail(done.handle, error.into(), done.structured),
        }
    }

    /// Takes what is to be sent, in order.
    pub fn output(&mut self) -> Vec<Bytes> {
        self.replies.take()
    }

    /// Bytes that complete the current payload: receiving exactly these into one buffer spares a
    /// copy. 0 when it is not known or would not help.
    pub fn needed(&self) -> usize {
        match self.phase {
            Phase::Payload { extent, .. } => extent.len() as usize - self.intake.held(),
            _ => 0,
        }
    }

    /// What the session's unfinished requests and untaken replies may cost in memory, bytes: the
    /// shell stops receiving while this (and what it took but could not yet send) is above its bound.
    pub fn outstanding(&self) -> usize {
        self.outstanding + self.replies.queued()
    }

    /// Requests not completed.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Send what is queued, then close. After a disconnect this waits for the requests in flight.
    pub fn closing(&self) -> bool {
        self.failed.is_some() || (matches!(self.phase, Phase::Ended) && self.pending.is_empty())
    }

    /// One step; `false` when it needs more bytes.
    fn advance(&mut self, requests: &mut Vec<Request>) -> Result<bool, ProtocolError> {
        match self.phase {
            Phase::RequestHeader(rules) => return self.request(rules, requests),
            Phase::Payload { rules, handle, extent, fua } => {
                let Some(data) = self.intake.body(extent.len() as usize) else {
                    return Ok(false);
                };
                self.phase = Phase::RequestHeader(rules);
                let payload = data.len();
                let pending = Pending { handle, payload, read: None, structured: rules.structured() };
                self.submit(pending, Op::Write { extent, data: data.into(), fua }, requests);
            }
            Phase::PayloadSkip { rules, handle, left, fault } => {
                let left = self.intake.skip(left);
                if left > 0 {
                    self.phase = Phase::PayloadSkip { rules, handle, left, fault };
                    return Ok(false);
                }
                self.phase = Phase::RequestHeader(rules);
                self.fail(handle, fault, rules.structured());
            }
            Phase::Ended => {
                self.intake.clear();
                return Ok(false);
            }
            _ => return self.haggle(),
        }
        Ok(true)
    }

    /// One step of the negotiation.
    fn haggle(&mut self) -> Result<bool, ProtocolError> {
        match self.phase {
            Phase::ClientFlags => {
                let Some(flags) = self.intake.header::<4>() else { return Ok(false) };
                self.negotiation.client_flags(u32::from_be_bytes(flags))?;
                self.phase = Phase::OptionHeader;
            }
            Phase::OptionHeader => {
                let Some(header) = self.intake.header::<16>() else { return Ok(false) };
                let header = u128::from_be_bytes(header);
                if (header >> 64) as u64 != wire::IHAVEOPT {
                    return Err(ProtocolError::OptionMagic);
                }
                let (option, len) = ((header >> 32) as u32, header as u32);
                let admitted = self.negotiation.admit(option, len, &mut self.replies)?;
                self.phase = if admitted {
                    Phase::OptionData { option, len }
                } else {
                    Phase::OptionSkip { left: len }
                };
            }
            Phase::OptionData { option, len } => {
                let Some(data) = self.intake.body(len as usize) else { return Ok(false) };
                let next = self.negotiation.option(&self.exports, option, &data, &mut self.replies)?;
                self.phase = self.after_option(next);
            }
            Phase::OptionSkip { left } => {
                let left = self.intake.skip(left);
                self.phase = if left > 0 { Phase::OptionSkip { left } } else { Phase::OptionHeader };
                return Ok(left == 0);
            }
            _ => unreachable!("the other phases come after the negotiation"),
        }
        Ok(true)
    }

    fn after_option(&self, next: Next) -> Phase {
        match next {
            Next::Option => Phase::OptionHeader,
            Next::End => Phase::Ended,
            Next::Transmission(index) => {
                let allocation = self.negotiation.allocation_of(index);
                Phase::RequestHeader(Rules::new(
                    &self.exports[index],
                    self.negotiation.structured,
                    allocation,
                ))
            }
        }
    }

    /// Takes a request's header.
    fn request(&mut self, rules: Rules, requests: &mut Vec<Request>) -> Result<bool, ProtocolError> {
        let Some(header) = self.intake.header() else { return Ok(false) };
        let header = Header::decode(&header).map_err(ProtocolError::RequestMagic)?;
        let (handle, structured) = (header.handle, rules.structured());
        let mut pending = Pending { handle, payload: 0, read: None, structured };
        match rules.judge(&header) {
            Ok(Verdict::Write(extent)) => {
                self.phase = Phase::Payload { rules, handle, extent, fua: header.fua() };
            }
            Ok(Verdict::Read(extent)) => {
                pending.payload = header.len as usize;
                pending.read = Some(header.offset);
                self.submit(pending, Op::Read(extent), requests);
            }
            Ok(Verdict::Zero(extent)) => {
                self.submit(pending, Op::Zero { extent, fua: header.fua() }, requests)
            }
            Ok(Verdict::Flush) => self.submit(pending, Op::Flush, requests),
            Ok(Verdict::Status) => self.replies.status(handle, header.len, 0),
            Ok(Verdict::Empty) if header.command == cmd::READ && structured => self.replies.none(handle),
            Ok(Verdict::Empty) => self.replies.simple(handle, 0),
            Ok(Verdict::Disconnect) => self.phase = Phase::Ended,
            Err(fault) if header.command == cmd::WRITE => {
                self.phase = Phase::PayloadSkip { rules, handle, left: header.len, fault };
            }
            Err(fault) => self.fail(handle, fault, structured),
        }
        Ok(true)
    }

    fn submit(&mut self, pending: Pending, op: Op, requests: &mut Vec<Request>) {
        self.outstanding += pending.payload + REQUEST_COST;
        let cookie = self.pending.insert(pending) as u64;
        requests.push(Request { cookie, op });
    }

    fn fail(&mut self, handle: u64, fault: Fault, structured: bool) {
        if structured {
            self.replies.error(handle, fault);
        } else {
            self.replies.simple(handle, fault.error);
        }
    }

    /// Bytes of memory that incoming data occupies.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.intake.room()
    }
}
