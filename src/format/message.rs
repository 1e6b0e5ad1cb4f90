//! Messages between nodes, and the frame around each.
//!
//! ```text
//! frame: length of body u32, kind u8, version u8, reserved u16 (0), check u64, body
//! check = first 8 bytes of blake3(bytes 0..8 of the frame, body); for a record or a copy of one, whose body has its
//! own hashes, of blake3(bytes 0..8) alone
//! ```
//! The first message on a connection is the acceptor's [`Message::Challenge`]; the dialler answers
//! with [`Message::Hello`], the acceptor with [`Message::Welcome`] or [`Message::Refuse`]. Each
//! proves the group's shared key: blake3 keyed with it over the other's nonce and its own message.
//!
//! Owns: this layout. Invariant: no length is believed before it is within [`MAX_BODY`].

use super::FormatError;
use super::compare::Compare;
use super::fields::{Reader, Writer};
use super::record::{MAX_RECORD, Record, padded};
use super::superblock::{Anchor, MAX_MAPS, MAX_PEERS};
use crate::units::{Address, Extent, Generation, GroupId, HistoryPoint, Lsn, NodeId, Term};
use bytes::Bytes;

/// The link protocol's version; both ends must speak the same one.
pub const VERSION: u8 = 6;
/// Bytes of a frame's header.
pub const FRAME: usize = 16;
/// Most bytes of a body.
pub const MAX_BODY: usize = MAX_RECORD;
/// Most volumes of a group.
pub const MAX_VOLUMES: usize = 256;
/// Longest name of a node, group or volume, bytes.
pub const MAX_NAME: usize = 64;
/// Most generations kept and told.
pub const MAX_GENERATIONS: usize = 128;
/// Most points of its history that a primary offers for comparison.
pub const MAX_POINTS: usize = MAX_GENERATIONS + MAX_MAPS + 2;
/// Most extents in one [`Message::Candidates`].
pub const MAX_CANDIDATES: usize = 8192;
/// Longest text of a refusal, bytes.
pub const MAX_TEXT: usize = 250;

/// Which role a node has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub enum Role {
    /// It writes.
    Primary,
    /// It follows.
    Shadow,
}

/// A generation and the point at which it was opened: the last record before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Opening {
    /// Which run.
    pub generation: Generation,
    /// The history it continues.
    pub at: HistoryPoint,
}

/// What a node says of itself when a connection opens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Group.
    pub group: GroupId,
    /// Node.
    pub node: NodeId,
    /// The node's name.
    pub name: String,
    /// Role.
    pub role: Role,
    /// Highest term seen.
    pub term: Term,
    /// Number and size (bytes) of every volume, in order.
    pub volumes: Vec<(u8, u64)>,
    /// Its image was all zeroes at LSN 0.
    pub blank: bool,
    /// Last record in its journal; on a shadow, durable there before it sends [`Message::Begin`].
    pub tail: HistoryPoint,
    /// Generation of that record.
    pub tail_generation: Generation,
    /// Oldest point from which its journal can continue a history.
    pub oldest: HistoryPoint,
    /// On a shadow: no record up to here may ever be taken back.
    pub applied: Lsn,
    /// The newest openings it knows, oldest first.
    pub openings: Vec<Opening>,
    /// On a shadow: its journal is ahead of its image, which is being made anew. It holds nothing yet.
    pub resyncing: bool,
    /// On a shadow: what it holds and the primary does not is given up.
    pub rewinds: bool,
    /// On a shadow: how long it holds its image back, ns.
    pub apply_delay: u64,
    /// On a shadow that dials: it follows this peer even while that is a shadow itself. On a primary that dials: the
    /// shadow is to follow it directly, for it is, or is to be, a member of the sync set.
    pub cascades: bool,
    /// On a shadow: those through whom it gets its records, or last did, the nearest first.
    pub sources: Vec<NodeId>,
    /// The name of the primary of that term, as far as it is known.
    pub primary: String,
}

/// Most sources told.
pub const MAX_CHAIN: usize = 16;

/// Why a shadow can't go on from where it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// Its last generation is not in the primary's history.
    Lineage,
    /// The primary's journal no longer holds what it lacks.
    Behind,
    /// It has never had a full copy.
    NeverCopied,
    /// It gives up what it holds and the primary does not.
    Fork,
}

impl Cause {
    /// In words.
    pub fn text(self) -> &'static str {
        match self {
            Cause::Lineage => "its last generation is not in the primary's history",
            Cause::Behind => "the primary's journal no longer holds what it lacks",
            Cause::NeverCopied => "it has never had a full copy",
            Cause::Fork => "it gives its own records up, from the fork on",
        }
    }
}

/// The acceptor's verdict on the dialling shadow.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Compare your chain hash at this point; if equal, cut what lies beyond, then `Begin`.
    Compare(HistoryPoint),
    /// The journal does not lead from where you are to where this one is: a resync is needed.
    Resync {
        /// Why.
        cause: Cause,
        /// Where the journal begins.
        oldest: Lsn,
        /// Points of this history. The newest that is in yours too, and in your image, bounds what may
        /// differ: name it in [`Message::Resync`].
        points: Vec<HistoryPoint>,
    },
    /// The histories differ; both sides stop. The last LSN that may be common.
    Diverged(Lsn),
}

/// What a primary counts a shadow for.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Standing {
    /// Nothing that it promises.
    #[default]
    None = 0,
    /// A member of the sync set that holds everything that any primary of this history has acknowledged.
    Member = 1,
    /// It was a member, was lost, and is not waited for: it lacks what was acknowledged since.
    Outdated = 2,
}

impl Standing {
    fn read(r: &mut Reader) -> Result<Standing, FormatError> {
        Ok(match r.u8()? {
            0 => Standing::None,
            1 => Standing::Member,
            2 => Standing::Outdated,
            _ => return Err(FormatError::Field("standing")),
        })
    }
}

/// What goes over a link.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// First word of the acceptor: prove the key over this.
    Challenge {
        /// Fresh random bytes.
        nonce: [u8; 32],
    },
    /// The dialler: who it is.
    Hello {
        /// Itself.
        identity: Box<Identity>,
        /// Fresh random bytes, for the acceptor's proof.
        nonce: [u8; 32],
        /// Keyed hash of the challenge and the identity.
        proof: [u8; 32],
    },
    /// The acceptor: who it is and what it decided.
    Welcome {
        /// Itself.
        identity: Box<Identity>,
        /// On the dialler's history.
        verdict: Verdict,
        /// Keyed hash of the dialler's nonce, the identity and the verdict.
        proof: [u8; 32],
    },
    /// Either: no, and why. The connection closes.
    Refuse {
        /// What happened and what to do.
        text: String,
    },
    /// The shadow: send records from here; everything before is equal and durable here.
    Begin {
        /// First LSN wanted.
        from: Lsn,
    },
    /// The primary: the next record.
    Record(Record),
    /// The primary: everything up to here is durable in its own journal.
    Durable {
        /// That LSN.
        lsn: Lsn,
    },
    /// The shadow: how far it is.
    Positions {
        /// Last received.
        received: Lsn,
        /// Last durable.
        durable: Lsn,
        /// Last applied.
        applied: Lsn,
    },
    /// Either, at intervals and as an answer: the clocks, and that it lives.
    Heartbeat {
        /// The sender's wall clock, ns since 1970. In the answer of a shadow to one that it feeds: the primary's, as
        /// far as known, or 0.
        wall: u64,
        /// The other's `wall` of the heartbeat that this answers, or 0.
        echo: u64,
        /// To a shadow that is fed: the primary's newest record, durable or not; of a shadow that has not been told of
        /// it yet nothing. To whom feeds: the last received.
        tail: Option<Lsn>,
        /// On a primary: seal time (ns since 1970) of the oldest record that the receiver has not told
        /// to be applied; 0 when there is none, and on a shadow.
        time: u64,
        /// On a primary: journal bytes that the receiver has not told to be applied; 0 on a shadow.
        bytes: u64,
        /// Of a shadow to one that it feeds: nanoseconds since it heard of the primary; of a primary 0.
        silent: u64,
        /// The sender is the primary, or is connected to it (through others, perhaps).
        live: bool,
        /// Of a shadow: those that get their records through it now.
        feeds: Vec<NodeId>,
        /// Of a primary: what it counts the receiver for.
        standing: Standing,
    },
    /// The shadow, after [`Verdict::Resync`]: I take up your history at your journal's end.
    Resync {
        /// The newest of your points that is in my history and my image; `None`: none is.
        since: Option<HistoryPoint>,
    },
    /// The primary, before [`Message::Rebase`]: what has changed here since that point.
    Candidates {
        /// Where, in whole granules of the dirty maps; at most [`MAX_CANDIDATES`].
        extents: Vec<Extent>,
    },
    /// The primary: the records after this one are held for you. Begin your journal anew there.
    Rebase {
        /// It is durable here.
        at: Anchor,
        /// All that may differ was told, as of this point; `None`: everything may differ.
        since: Option<HistoryPoint>,
        /// The sync set there.
        members: Vec<NodeId>,
    },
    /// The shadow: my image is that of my history again.
    Resynced,
    /// The shadow: I can't read this record of yours any more. Have you got it?
    AskCopy {
        /// Which.
        lsn: Lsn,
    },
    /// The primary: here.
    Copy(Record),
    /// The primary: no.
    NoCopy {
        /// Which.
        lsn: Lsn,
    },
    /// The primary: everything up to here is durable on both sides, and I am the primary no longer. Take over.
    Handover {
        /// The end of its journal.
        at: HistoryPoint,
    },
    /// Either: a word of the comparison of their images.
    Compare(Box<Compare>),
}

/// A frame's header: what follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// Bytes of the body; at most [`MAX_BODY`].
    pub len: usize,
    kind: u8,
    check: u64,
    head: [u8; 8],
}

const RECORD: u8 = 6;
const COPY: u8 = 15;
const COMPARE: u8 = 20;
const HANDOVER: u8 = 21;
const LAST: u8 = HANDOVER;

impl FrameHeader {
    /// Reads and bounds a header; nothing is allocated.
    pub fn decode(bytes: &[u8; FRAME]) -> Result<FrameHeader, FormatError> {
        let mut r = Reader(bytes);
        let (len, kind, version) = (r.u32()? as usize, r.u8()?, r.u8()?);
        if version != VERSION {
            return Err(FormatError::Version(u16::from(version)));
        }
        if r.u16()? != 0 || kind > LAST {
            return Err(FormatError::Magic);
        }
        if len > MAX_BODY {
            return Err(FormatError::Field("length"));
        }
        let head = bytes[..8].try_into().expect("a frame has 16 bytes");
        Ok(FrameHeader { len, kind, check: r.u64()?, head })
    }

    /// The body is a record.
    pub fn is_record(&self) -> bool {
        matches!(self.kind, RECORD | COPY)
    }

    /// Verifies and decodes the body, which must be exactly `len` bytes. Those of a record may be followed by what
    /// makes them whole blocks: then it goes into a journal as it lies here.
    pub fn body(&self, body: Bytes) -> Result<Message, FormatError> {
        if body.len() != self.len && !(self.is_record() && body.len() == padded(self.len)) {
            return Err(FormatError::Short);
        }
        let covered: &[u8] = if self.is_record() { &[] } else { &body };
        if check(&self.head, covered) != self.check {
            return Err(FormatError::Checksum);
        }
        if self.is_record() {
            let record = Record::decode(body)?;
            if record.wire_len() != self.len as u64 {
                return Err(FormatError::Field("length"));
            }
            return Ok(if self.kind == COPY { Message::Copy(record) } else { Message::Record(record) });
        }
        Message::decode(self.kind, body)
    }
}

fn check(head: &[u8], body: &[u8]) -> u64 {
    let hash = *blake3::Hasher::new().update(head).update(body).finalize().as_bytes();
    u64::from_le_bytes(hash[..8].try_into().expect("a hash has 32 bytes"))
}

/// A message as bytes: the frame's header with any small body, then a record's bytes, shared.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Header, and the body of everything but a record.
    pub head: Vec<u8>,
    /// A record's bytes; empty otherwise.
    pub record: Bytes,
}

impl Message {
    /// The frame for this message.
    pub fn encode(&self) -> Frame {
        let mut w = Writer(vec![0; FRAME]);
        let kind = self.write(&mut w);
        let record = match self {
            Message::Record(r) | Message::Copy(r) => r.wire(),
            _ => Bytes::new(),
        };
        let mut head = w.0;
        let len = (head.len() - FRAME + record.len()) as u32;
        head[..4].copy_from_slice(&len.to_le_bytes());
        head[4] = kind;
        head[5] = VERSION;
        let sum = check(&head[..8], &head[FRAME..]);
        head[8..16].copy_from_slice(&sum.to_le_bytes());
        Frame { head, record }
    }

    fn write(&self, w: &mut Writer) -> u8 {
        match self {
            Message::Challenge { nonce } => {
                w.bytes(nonce);
                1
            }
            Message::Hello { identity, nonce, proof } => {
                identity.write(w);
                w.bytes(nonce).bytes(proof);
                2
            }
            Message::Welcome { identity, verdict, proof } => {
                identity.write(w);
                verdict.write(w);
                w.bytes(proof);
                3
            }
            Message::Refuse { text } => {
                w.name(text);
                4
            }
            Message::Begin { from } => {
                w.lsn(*from);
                5
            }
            Message::Record(_) => RECORD,
            Message::Durable { lsn } => {
                w.lsn(*lsn);
                7
            }
            Message::Positions { received, durable, applied } => {
                w.lsn(*received).lsn(*durable).lsn(*applied);
                8
            }
            Message::Heartbeat { wall, echo, tail, time, bytes, silent, live, feeds, standing } => {
                w.u64(*wall).u64(*echo);
                w.option(tail.as_ref(), |w, lsn| {
                    w.lsn(*lsn);
                });
                w.u64(*time).u64(*bytes).u64(*silent).flag(*live);
                w.list(feeds, |w, n| {
                    w.node(*n);
                });
                w.u8(*standing as u8);
                9
            }
            Message::Resync { since } => {
                w.option(since.as_ref(), |w, p| {
                    w.point(*p);
                });
                10
            }
            Message::Candidates { extents } => {
                w.list(extents, |w, e| {
                    w.u64(e.start()).u64(e.len());
                });
                11
            }
            Message::Rebase { at, since, members } => {
                at.write(w);
                w.option(since.as_ref(), |w, p| {
                    w.point(*p);
                });
                w.list(members, |w, n| {
                    w.node(*n);
                });
                12
            }
            Message::Resynced => 13,
            Message::AskCopy { lsn } => {
                w.lsn(*lsn);
                14
            }
            Message::Copy(_) => COPY,
            Message::NoCopy { lsn } => {
                w.lsn(*lsn);
                16
            }
            Message::Handover { at } => {
                w.point(*at);
                HANDOVER
            }
            Message::Compare(word) => {
                word.write(w);
                COMPARE
            }
        }
    }

    fn decode(kind: u8, body: Bytes) -> Result<Message, FormatError> {
        let mut r = Reader(&body);
        let message = match kind {
            1 => Message::Challenge { nonce: r.array()? },
            2 => Message::Hello {
                identity: Box::new(Identity::read(&mut r)?),
                nonce: r.array()?,
                proof: r.array()?,
            },
            3 => Message::Welcome {
                identity: Box::new(Identity::read(&mut r)?),
                verdict: Verdict::read(&mut r)?,
                proof: r.array()?,
            },
            4 => Message::Refuse { text: r.name(MAX_TEXT, "text")? },
            5 => Message::Begin { from: r.lsn()? },
            7 => Message::Durable { lsn: r.lsn()? },
            8 => Message::Positions { received: r.lsn()?, durable: r.lsn()?, applied: r.lsn()? },
            9 => Message::Heartbeat {
                wall: r.u64()?,
                echo: r.u64()?,
                tail: r.option("tail", Reader::lsn)?,
                time: r.u64()?,
                bytes: r.u64()?,
                silent: r.u64()?,
                live: r.flag("live")?,
                feeds: r.list(MAX_PEERS, "feeds", Reader::node)?,
                standing: Standing::read(&mut r)?,
            },
            10 => Message::Resync { since: r.option("since", Reader::point)? },
            11 => Message::Candidates {
                extents: r.list(MAX_CANDIDATES, "candidates", |r| {
                    let (start, len) = (r.u64()?, r.u64()?);
                    Extent::new(Address(start), len).ok_or(FormatError::Field("candidate"))
                })?,
            },
            12 => Message::Rebase {
                at: Anchor::read(&mut r)?,
                since: r.option("since", Reader::point)?,
                members: r.list(MAX_PEERS, "members", Reader::node)?,
            },
            13 => Message::Resynced,
            14 => Message::AskCopy { lsn: r.lsn()? },
            16 => Message::NoCopy { lsn: r.lsn()? },
            HANDOVER => Message::Handover { at: r.point()? },
            COMPARE => Message::Compare(Box::new(Compare::read(&mut r)?)),
            _ => return Err(FormatError::Magic),
        };
        r.end()?;
        Ok(message)
    }
}

/// A refusal whose text is cut to [`MAX_TEXT`] bytes.
pub fn refuse(text: &str) -> Message {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    Message::Refuse { text: text[..end].to_owned() }
}

/// The proof of the shared key for [`Message::Hello`] and (with the verdict) [`Message::Welcome`].
pub fn proof(key: &[u8; 32], nonce: &[u8; 32], identity: &Identity, verdict: Option<&Verdict>) -> [u8; 32] {
    let mut w = Writer::default();
    w.bytes(nonce).u8(u8::from(verdict.is_some()));
    identity.write(&mut w);
    if let Some(verdict) = verdict {
        verdict.write(&mut w);
    }
    *blake3::keyed_hash(key, &w.0).as_bytes()
}

impl Verdict {
    fn write(&self, w: &mut Writer) {
        match self {
            Verdict::Compare(at) => w.u8(0).point(*at),
            Verdict::Resync { cause, oldest, points } => {
                let cause = match cause {
                    Cause::Lineage => 0,
                    Cause::Behind => 1,
                    Cause::NeverCopied => 2,
                    Cause::Fork => 3,
                };
                w.u8(1).u8(cause).lsn(*oldest).list(points, |w, p| {
                    w.point(*p);
                })
            }
            Verdict::Diverged(lsn) => w.u8(2).lsn(*lsn),
        };
    }
    fn read(r: &mut Reader) -> Result<Verdict, FormatError> {
        Ok(match r.u8()? {
            0 => Verdict::Compare(r.point()?),
            1 => Verdict::Resync {
                cause: match r.u8()? {
                    0 => Cause::Lineage,
                    1 => Cause::Behind,
                    2 => Cause::NeverCopied,
                    3 => Cause::Fork,
                    _ => return Err(FormatError::Field("cause")),
                },
                oldest: r.lsn()?,
                points: r.list(MAX_POINTS, "points", Reader::point)?,
            },
            2 => Verdict::Diverged(r.lsn()?),
            _ => return Err(FormatError::Field("verdict")),
        })
    }
}

impl Role {
    pub(super) fn write(self, w: &mut Writer) {
        w.flag(self == Role::Primary);
    }
    pub(super) fn read(r: &mut Reader) -> Result<Role, FormatError> {
        Ok(if r.flag("role")? { Role::Primary } else { Role::Shadow })
    }
}

impl Opening {
    pub(super) fn write(&self, w: &mut Writer) {
        w.generation(self.generation).point(self.at);
    }
    pub(super) fn read(r: &mut Reader) -> Result<Opening, FormatError> {
        Ok(Opening { generation: r.generation()?, at: r.point()? })
    }
}

impl Identity {
    fn write(&self, w: &mut Writer) {
        w.group(self.group).node(self.node).name(&self.name);
        self.role.write(w);
        w.term(self.term);
        w.list(&self.volumes, |w, (number, size)| {
            w.u8(*number).u64(*size);
        });
        w.flag(self.blank);
        w.point(self.tail).generation(self.tail_generation).point(self.oldest).lsn(self.applied);
        w.list(&self.openings, |w, o| o.write(w));
        w.flag(self.resyncing).flag(self.rewinds).u64(self.apply_delay).flag(self.cascades);
        w.list(&self.sources, |w, n| {
            w.node(*n);
        });
        w.name(&self.primary);
    }
    fn read(r: &mut Reader) -> Result<Identity, FormatError> {
        Ok(Identity {
            group: r.group()?,
            node: r.node()?,
            name: r.name(MAX_NAME, "name")?,
            role: Role::read(r)?,
            term: r.term()?,
            volumes: r.list(MAX_VOLUMES, "volumes", |r| Ok((r.u8()?, r.u64()?)))?,
            blank: r.flag("blank")?,
            tail: r.point()?,
            tail_generation: r.generation()?,
            oldest: r.point()?,
            applied: r.lsn()?,
            openings: r.list(MAX_GENERATIONS, "openings", Opening::read)?,
            resyncing: r.flag("resyncing")?,
            rewinds: r.flag("rewinds")?,
            apply_delay: r.u64()?,
            cascades: r.flag("cascades")?,
            sources: r.list(MAX_CHAIN, "sources", Reader::node)?,
            primary: r.name(MAX_NAME, "primary's name")?,
        })
    }
}
