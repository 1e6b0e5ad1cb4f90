//! Option haggling: from the client's flags to the choice of an export.
//!
//! Owns: what a client has negotiated. Invariant: every option but EXPORT_NAME gets exactly one
//! final reply; metadata is told only of the export for which it was selected.

use super::replies::Replies;
use super::wire::{self, flag, info, opt, rep};
use super::{Export, ProtocolError};

/// Longest option that is read, bytes; of a longer one nothing is kept.
pub(super) const MAX_OPTION: u32 = 64 << 10;
/// Replies that may wait while a client sends more options, bytes. A client has to wait for each
/// reply, so one that gets here sends without reading.
const MAX_UNREAD: usize = 4 << 20;

/// What has been agreed.
#[derive(Default)]
pub(super) struct Negotiation {
    fixed: bool,
    no_zeroes: bool,
    /// Structured replies.
    pub structured: bool,
    /// The export whose allocation may be asked for.
    allocation: Option<usize>,
}

/// What comes after an option.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Next {
    /// Another option.
    Option,
    /// Requests, to the export with this index.
    Transmission(usize),
    /// Nothing.
    End,
}

impl Negotiation {
    /// Takes the client's answer to the greeting.
    pub fn client_flags(&mut self, flags: u32) -> Result<(), ProtocolError> {
        let known = u32::from(wire::FIXED_NEWSTYLE | wire::NO_ZEROES);
        if flags & !known != 0 {
            return Err(ProtocolError::ClientFlags(flags));
        }
        self.fixed = flags & u32::from(wire::FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(wire::NO_ZEROES) != 0;
        Ok(())
    }

    /// Whether an option of this length will be read; `false`: skip its data, it is answered.
    pub fn admit(&self, option: u32, len: u32, replies: &mut Replies) -> Result<bool, ProtocolError> {
        if !self.fixed && option != opt::EXPORT_NAME {
            return Err(ProtocolError::NotFixed(option));
        }
        if replies.queued() > MAX_UNREAD {
            return Err(ProtocolError::OptionFlood);
        }
        if len <= MAX_OPTION {
            return Ok(true);
        }
        match option {
            opt::EXPORT_NAME => return Err(ProtocolError::UnknownExport),
            _ if known(option) => replies.option(option, rep::ERR_TOO_BIG, &[b"option too long"]),
            _ => replies.option(option, rep::ERR_UNSUP, &[]),
        }
        Ok(false)
    }

    /// Answers an option.
    pub fn option(
        &mut self,
        exports: &[Export],
        option: u32,
        data: &[u8],
        replies: &mut Replies,
    ) -> Result<Next, ProtocolError> {
        match option {
            opt::EXPORT_NAME => return self.export_name(exports, data, replies),
            opt::ABORT => {
                replies.option(option, rep::ACK, &[]);
                return Ok(Next::End);
            }
            opt::INFO | opt::GO => return Ok(self.go(exports, option, data, replies)),
            opt::LIST if data.is_empty() => list(exports, replies),
            opt::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                replies.option(option, rep::ACK, &[]);
            }
            opt::LIST | opt::STRUCTURED_REPLY => invalid(option, "unexpected data", replies),
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => {
                self.meta_context(exports, option, data, replies);
            }
            opt::STARTTLS => replies.option(option, rep::ERR_POLICY, &[b"no TLS here"]),
            _ => replies.option(option, rep::ERR_UNSUP, &[]),
        }
        Ok(Next::Option)
    }

    /// Whether BLOCK_STATUS may be asked of this export.
    pub fn allocation_of(&self, export: usize) -> bool {
        self.structured && self.allocation == Some(export)
    }

    fn flags(&self, export: &Export) -> u16 {
        let negotiated = if self.structured { flag::SEND_DF } else { 0 };
        let fast = if export.read_only { 0 } else { flag::SEND_FAST_ZERO };
        transmission_flags(export.read_only) | fast | flag::CAN_MULTI_CONN | negotiated
    }

    fn export_name(
        &mut self,
        exports: &[Export],
        name: &[u8],
        replies: &mut Replies,
    ) -> Result<Next, ProtocolError> {
        let index = find(exports, name).ok_or(ProtocolError::UnknownExport)?;
        replies.export(exports[index].offered(), self.flags(&exports[index]), !self.no_zeroes);
        Ok(Next::Transmission(index))
    }

    fn go(&mut self, exports: &[Export], option: u32, data: &[u8], replies: &mut Replies) -> Next {
        let Some((name, wanted)) = split_go(data) else {
            invalid(option, "malformed", replies);
            return Next::Option;
        };
        let Some(index) = find(exports, name) else {
            replies.option(option, rep::ERR_UNKNOWN, &[b"no such export"]);
            return Next::Option;
        };
        let export = &exports[index];
        let (kind, size) = (info::EXPORT.to_be_bytes(), export.offered().to_be_bytes());
        replies.option(option, rep::INFO, &[&kind, &size, &self.flags(export).to_be_bytes()]);
        // The block sizes bind, so they are told to those who did not ask, too.
        let sizes = [export.min(), export.preferred(), export.max()].map(u32::to_be_bytes);
        replies.option(option, rep::INFO, &[&info::BLOCK_SIZE.to_be_bytes(), sizes.as_flattened()]);
        if wanted.chunks_exact(2).any(|w| w == info::NAME.to_be_bytes()) {
            replies.option(option, rep::INFO, &[&info::NAME.to_be_bytes(), export.name.as_bytes()]);
        }
        replies.option(option, rep::ACK, &[]);
        if option == opt::GO { Next::Transmission(index) } else { Next::Option }
    }

    fn meta_context(&mut self, exports: &[Export], option: u32, data: &[u8], replies: &mut Replies) {
        let set = option == opt::SET_META_CONTEXT;
        if set {
            self.allocation = None;
        }
        if !self.structured {
            return invalid(option, "negotiate structured replies first", replies);
        }
        let Some((name, matched)) = split_queries(data, set) else {
            return invalid(option, "malformed", replies);
        };
        let Some(index) = find(exports, name) else {
            return replies.option(option, rep::ERR_UNKNOWN, &[b"no such export"]);
        };
        if matched {
            let id = if set { wire::BASE_ALLOCATION_ID } else { 0 };
            replies.option(option, rep::META_CONTEXT, &[&id.to_be_bytes(), wire::BASE_ALLOCATION]);
        }
        if set && matched {
            self.allocation = Some(index);
        }
        replies.option(option, rep::ACK, &[]);
    }
}

/// What every export can do, as transmission flags. Clients that don't negotiate are told no more.
pub fn transmission_flags(read_only: bool) -> u16 {
    let writes = if read_only { flag::READ_ONLY } else { flag::SEND_TRIM | flag::SEND_WRITE_ZEROES };
    flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | writes
}

fn known(option: u32) -> bool {
    // 4 was PEEK_EXPORT, withdrawn.
    (opt::EXPORT_NAME..=opt::SET_META_CONTEXT).contains(&option) && option != 4
}

fn invalid(option: u32, why: &str, replies: &mut Replies) {
    replies.option(option, rep::ERR_INVALID, &[why.as_bytes()]);
}

fn find(exports: &[Export], name: &[u8]) -> Option<usize> {
    let exact = exports.iter().position(|e| e.name.as_bytes() == name);
    exact.or((name.is_empty() && !exports.is_empty()).then_some(0))
}

fn list(exports: &[Export], replies: &mut Replies) {
    for export in exports {
        let len = (export.name.len() as u32).to_be_bytes();
        replies.option(opt::LIST, rep::SERVER, &[&len, export.name.as_bytes()]);
    }
    replies.option(opt::LIST, rep::ACK, &[]);
}

/// A string with 32 bits of length before it, off the front of `data`.
fn take_string<'a>(data: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    let (string, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    *data = rest;
    Some(string)
}

/// The export's name and the kinds of information asked for, two bytes each.
fn split_go(mut data: &[u8]) -> Option<(&[u8], &[u8])> {
    let name = take_string(&mut data)?;
    let (count, wanted) = data.split_first_chunk::<2>()?;
    (wanted.len() == 2 * usize::from(u16::from_be_bytes(*count))).then_some((name, wanted))
}

/// The export's name, and whether any query selects base:allocation.
fn split_queries(mut data: &[u8], set: bool) -> Option<(&[u8], bool)> {
    let name = take_string(&mut data)?;
    let (count, rest) = data.split_first_chunk::<4>()?;
    let count = u32::from_be_bytes(*count);
    data = rest;
    // Without a query, LIST means all and SET means none.
    let mut matched = count == 0 && !set;
    for _ in 0..count {
        let query = take_string(&mut data)?;
        matched |= query == wire::BASE_ALLOCATION || (!set && query == b"base:");
    }
    data.is_empty().then_some((name, matched))
}
