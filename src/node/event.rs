//! What the shell tells a node and what a node asks of the shell.
//!
//! Owns: the complete boundary between decisions and effects. Invariant: whatever a node does is a
//! function of its configuration, its files and the sequence of (now, event); so a simulator that
//! repeats the sequence repeats the run.

use crate::disk::{DiskRequest, DiskResult, IoError, Memory, Payload, Token};
use crate::format::message::Message;
use crate::format::record::{EncodeJob, Encoded};
use crate::format::salvage::{Head, Trailer};
use crate::node::history::HistoryEvent;
use crate::node::status::{MarkStatus, Status};
use crate::resync::hash::{Job, Product};
use crate::units::{Extent, Lsn};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// A front end's name for a request in flight; opaque to the node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

/// A connection to a peer. The shell draws a new number for each; never reused in a process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LinkId(pub u64);

/// An administrator's request in flight; opaque to the node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct AdminId(pub u64);

/// A block request. The front end has checked that the extent lies within its volume.
#[derive(Clone, Debug)]
pub enum Op {
    /// Answered with exactly the extent's bytes.
    Read(Extent),
    /// `data` is exactly the extent's length, at most [`MAX_REQUEST`].
    Write {
        /// Where.
        extent: Extent,
        /// What; the node copies it before it answers.
        data: Payload,
        /// Durable (to the group's ack level) when answered.
        fua: bool,
    },
    /// TRIM and WRITE_ZEROES: reads as zeroes afterwards, on every node.
    Zero {
        /// Where.
        extent: Extent,
        /// Durable when answered.
        fua: bool,
    },
    /// Every write answered before this was submitted is durable (to the ack level) when answered.
    Flush,
}

/// Largest payload of one request, bytes.
pub const MAX_REQUEST: u64 = 32 << 20;

/// What the shell tells the node.
#[derive(Debug)]
pub enum Event {
    /// A front end's request.
    Request {
        /// Comes back in [`Action::Complete`].
        id: RequestId,
        /// What.
        op: Op,
    },
    /// A request of a front end that offers a view; answered in the same way.
    View {
        /// Comes back in [`Action::Complete`].
        id: RequestId,
        /// What.
        op: Op,
    },
    /// The answer to [`Action::Disk`].
    Disk {
        /// Of the request.
        token: Token,
        /// Its outcome.
        result: DiskResult,
    },
    /// The answer to [`Action::Encode`].
    Encoded {
        /// Of the job.
        token: Token,
        /// Its product.
        encoded: Encoded,
    },
    /// The answer to [`Action::Compare`].
    Compared {
        /// Of the job.
        token: Token,
        /// Its product.
        product: Product,
    },
    /// The answer to [`Action::OpenStage`].
    Stage {
        /// The mapped file that says what is in the stage; or why there is none.
        result: Result<Box<dyn Memory>, String>,
    },
    /// The answer to [`Action::Salvage`].
    Salvaged {
        /// The path of the file, once it has ended; or why it can't be written.
        result: Result<Option<String>, String>,
    },
    /// A connection stands: one that [`Action::Dial`] asked for, or one from a peer.
    LinkUp {
        /// Its number.
        link: LinkId,
        /// The index of the dialled peer in the configuration; `None` for an accepted one.
        dialed: Option<usize>,
        /// Fresh random bytes for the proof of the shared key.
        nonce: [u8; 32],
    },
    /// A whole message arrived, its frame already checked and decoded.
    Message {
        /// On which connection.
        link: LinkId,
        /// What.
        message: Message,
    },
    /// The connection is gone. Also told for one that the node closed; nothing follows it.
    LinkDown {
        /// Which.
        link: LinkId,
    },
    /// [`Action::Dial`] failed.
    DialFailed {
        /// Which peer.
        peer: usize,
    },
    /// An administrator's request.
    Admin {
        /// Comes back in [`Action::Answer`].
        id: AdminId,
        /// What.
        op: AdminOp,
    },
    /// The deadline of [`Actions::wake`] has come (early or spurious ones do no harm).
    Wake,
}

/// What an administrator asks of a running node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminOp {
    /// The state now. Always answered at once.
    Status,
    /// Answered `Done` once the node is a primary that serves requests; refused on a shadow.
    Open,
    /// Every accepted write into the journal and the backing, checkpointed. Never waits for a shadow.
    Drain,
    /// `Drain`, then the superblock marked clean; later requests are refused with ESHUTDOWN.
    Shutdown,
    /// Name this place in the write order; answered `Marked` once it is durable here.
    Mark {
        /// How: see `format::record::is_mark`.
        text: String,
    },
    /// Become the primary.
    Promote(Promote),
    /// On the primary: a member of the sync set is lost; FLUSH does not wait for it until it has caught up. Answered
    /// once that is durable.
    Outdate {
        /// Its name.
        member: String,
        /// The operator's word, or the fence hook's, that it is stopped.
        fenced: bool,
        /// Only say what would happen.
        dry_run: bool,
    },
    /// On the primary: serve for so many ns from now, then stop by itself; `None`: no lease is needed any more.
    Lease {
        /// For so long.
        ns: Option<u64>,
    },
    /// Prove a shadow equal, and repair it. On the primary it is handed to the connected shadow. Answered
    /// once the comparison has begun (or goes on where an earlier one was interrupted); its progress and
    /// its outcome are in [`Status::refresh`].
    Refresh(Refresh),
    /// End the comparison that is under way; what was repaired stays.
    RefreshStop,
    /// On the primary: hand the place over to a shadow that has everything. Answered when that one is the primary,
    /// or when nothing was moved.
    Switchover {
        /// The shadow's name.
        to: String,
        /// Only say what would happen.
        dry_run: bool,
    },
    /// Answered `Done` when this node has become the primary without anybody here having asked for it: its
    /// predecessor has handed the place over, or did not get rid of it. The volumes are to be attached then, and the
    /// database started.
    AwaitTakeover,
    /// Freeze a shadow's image for [`Event::View`]. Answered `Done` when it is frozen.
    View {
        /// What is written to the view is kept, in an overlay, as long as the view is open.
        scratch: bool,
        /// At exactly this record; none: where the image is.
        at: Option<At>,
    },
    /// Give the image free again, and drop the overlay.
    ViewClose,
    /// Give up what this node holds and the primary does not, and follow.
    Rejoin {
        /// The operator's word that this peer's side is kept.
        keep: Option<String>,
        /// Only say what would happen.
        dry_run: bool,
    },
}

/// A promotion.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Promote {
    /// The operator's word that the old primary can no longer write.
    pub fenced: bool,
    /// A node that knows that it lacks what was acknowledged is promoted all the same.
    pub accept_outdated: bool,
    /// Only say what would happen.
    pub dry_run: bool,
    /// As of which record, of those that are held back; `None`: the newest.
    pub at: Option<At>,
}

/// A record of those that a shadow has not put into its image.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum At {
    /// This one.
    Lsn(Lsn),
    /// The last one sealed at or before that time, ns since 1970.
    Time(u64),
    /// The mark of that text.
    Mark(String),
}

/// A part of a salvage file.
#[derive(Clone, Debug)]
pub enum Salvage {
    /// It begins; whatever one of the same name held is gone once the new one has ended.
    Begin(Head),
    /// Records.
    Append(Vec<Bytes>),
    /// It ends, and is durable when this is answered.
    End(Trailer),
}

/// What a refresh is to do.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Refresh {
    /// On a primary with several shadows: the name of the one that is meant.
    pub peer: Option<String>,
    /// Trust what the hash index knows; read only the rest.
    pub quick: bool,
    /// Only compare: a shadow with differences stays as it is.
    pub verify: bool,
    /// Bytes of the volumes that each side may read in a second; 0: as fast as it goes.
    pub rate: u64,
    /// A resync that is under way or needed makes the new image over the old one: no room for a stage is
    /// needed, and until it ends there is no usable image here.
    pub in_place: bool,
    /// A shadow that holds its image back gives that up until it ends: its window is empty then.
    pub suspend_delay: bool,
}

/// Why an administrator's request was not done. Each maps to one exit code of the CLI.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// It failed (exit 1).
    Failed,
    /// The node is in a state in which it cannot be done now (exit 11).
    Busy,
    /// A peer that is needed cannot be reached (exit 12).
    Unreachable,
    /// It would lose data (exit 13).
    WouldLoseData,
    /// The histories have diverged (exit 14).
    Diverged,
    /// The old primary may still be writing (exit 15).
    Unfenced,
}

/// The outcome of an [`AdminOp`].
#[derive(Clone, Debug)]
pub enum Answer {
    /// To [`AdminOp::Status`].
    Status(Box<Status>),
    /// To [`AdminOp::Mark`].
    Marked(MarkStatus),
    /// Done; what to tell the administrator.
    Done(String),
    /// Not done: why, and what to do next.
    Refused(Refusal, String),
}

/// What the node asks of the shell.
#[derive(Debug)]
pub enum Action {
    /// Answer with [`Event::Disk`].
    Disk(DiskRequest),
    /// Compress and hash; answer with [`Event::Encoded`]. Any order, any thread.
    Encode {
        /// Comes back with the answer.
        token: Token,
        /// The work.
        job: EncodeJob,
    },
    /// Hash, pack or unpack for a comparison; answer with [`Event::Compared`]. Any order, any thread.
    Compare {
        /// Comes back with the answer.
        token: Token,
        /// The work.
        job: Job,
    },
    /// Open the files of the stage, next to the journal: per volume a file of its size, and the map of
    /// `apply::stage::stage_len` bytes; answer with [`Event::Stage`]. Until it is dropped, the stage's names in
    /// disk requests mean them.
    OpenStage {
        /// Make them anew, the volumes' files sparse, the map with all its blocks, all zeroes.
        fresh: bool,
    },
    /// Remove the files of the stage, if there are any, and give their room back.
    DropStage,
    /// Write a part of the salvage file; answer with [`Event::Salvaged`]. One at a time.
    Salvage(Salvage),
    /// Keep it, durably, in the order of these actions; a mark and what is given up before what follows is done.
    History(HistoryEvent),
    /// A front end's request is finished: a read's bytes, nothing otherwise.
    Complete {
        /// Which.
        id: RequestId,
        /// Its outcome.
        result: Result<Bytes, IoError>,
    },
    /// Connect to the peer with this index; answer with `LinkUp` or `DialFailed`.
    Dial {
        /// Which.
        peer: usize,
    },
    /// Send, in order. The node bounds what it has in flight.
    Send {
        /// On which connection.
        link: LinkId,
        /// What.
        message: Message,
    },
    /// Close after what was sent; answer with `LinkDown`.
    Close {
        /// Which.
        link: LinkId,
    },
    /// An administrator's request is finished.
    Answer {
        /// Which.
        id: AdminId,
        /// Its outcome.
        answer: Answer,
    },
    /// Say it in the log.
    Log {
        /// How loud.
        level: Level,
        /// What happened, to what, and what to do.
        text: String,
    },
    /// The node can't go on; the process is to end with this text. Nothing more is promised.
    Stop {
        /// What happened and what to do.
        text: String,
    },
}

/// Loudness of a log line.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    /// Needs a person.
    Error,
    /// May need a person.
    Warn,
    /// A change of state.
    Info,
    /// For developers.
    Debug,
}

/// What one step asks for.
#[derive(Debug, Default)]
pub struct Actions {
    /// In order.
    pub list: Vec<Action>,
    /// When to send [`Event::Wake`], on the monotonic clock; replaces the earlier wish.
    pub wake: Option<u64>,
}

impl Actions {
    /// Adds one.
    pub fn push(&mut self, action: Action) {
        self.list.push(action);
    }
    /// Logs.
    pub fn log(&mut self, level: Level, text: impl Into<String>) {
        self.list.push(Action::Log { level, text: text.into() });
    }
}

/// How far a shadow is: each includes all before it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Positions {
    /// Last record received.
    pub received: Lsn,
    /// Last record durable in the shadow's journal.
    pub durable: Lsn,
    /// Last record in the shadow's image.
    pub applied: Lsn,
}
