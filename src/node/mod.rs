//! One node of one consistency group: the sole owner of its machines.
//!
//! Owns: the order in which the machines see things. Invariant: a node is a function of its
//! configuration, its two memories, its files, and the sequence of (now, event).
//!
//! `boot` finds the journal's end, `asking` waits for news of a promotion; `run` is the node afterwards: `primary` and `shadow` are its
//! roles, `image` the backing and its checkpoint, `feed` the way of records to their readers,
//! `links` the connections, `greeting` their handshake,
//! `compare`, `job` and `refresh` the comparison of images, `scrub` the journal read again, `offer`, `rebase` and `remake` the resync of a shadow
//! that its primary's journal can't feed, `view` what others see of a shadow, `retire` and `salvage` the end of a primary,
//! `drain` a primary that serves before its image has caught up, `reading` how such an image is read, `delay` the image that is held back, `rewind` a promotion as of an earlier record,
//! `marks` the named places in the write order, `history` what is kept of all that for people,
//! `foresight` the FLUSH that is about to come, `followers` what a primary owes its shadows, `outdate` the loss of one that it waits for, `cascade` what a shadow passes on to others, `calling` that a member is to follow the primary itself, `heartbeat` what is told of
//! clocks and of the primary, `lease` a cluster manager's hold on a primary, `admin` what administrators ask, `report` what they are told.

mod admin;
mod asking;
mod boot;
mod calling;
mod cascade;
mod compare;
pub mod config;
mod delay;
mod drain;
pub mod event;
mod feed;
mod followers;
mod foresight;
mod greeting;
mod heartbeat;
pub mod history;
mod image;
mod job;
mod lease;
mod links;
mod marks;
mod meta;
mod offer;
mod outdate;
mod primary;
mod reading;
mod rebase;
mod refresh;
mod remake;
mod report;
mod retire;
mod rewind;
mod run;
mod salvage;
mod scrub;
mod sealing;
mod shadow;
pub mod status;
mod switchover;
mod view;

use crate::disk::{DiskRequest, IoError, Memory};
use crate::units::Now;
use boot::Boot;
use config::NodeConfig;
use event::{Action, Actions, AdminId, AdminOp, Answer, Event, Level, Op, Refusal, RequestId};
use run::Run;

/// Owners of tokens.
const SUPER: u8 = 0;
const JOURNAL: u8 = 1;
const JOURNAL_RECOVERY: u8 = 2;
const APPLY: u8 = 3;
const READER: u8 = 4;
const FRONT: u8 = 5;
const MAPS: u8 = 6;
const ENCODE: u8 = 7;
const COMPARE: u8 = 8;
const STAGE: u8 = 9;
const INDEX: u8 = 10;
const SCRUB: u8 = 11;
const VIEW: u8 = 12;
/// Reads of the journal for those who read a volume whose image has not caught up.
pub const BACKLOG: u8 = 13;

/// The mapped files of a node.
pub struct Memories {
    /// The write cache's ring, `cache::ring_len`; all zeroes when new. It is taken up if it belongs to this
    /// group and boot.
    pub ring: Option<Box<dyn Memory>>,
    /// The dirty maps, `journal::maps::maps_len`.
    pub maps: Box<dyn Memory>,
    /// The hash index, `resync::index::index_len`.
    pub index: Box<dyn Memory>,
}

/// A node. Feed it events; do what it asks.
pub struct Node {
    cfg: NodeConfig,
    stage: Stage,
    /// Requests that came before the node could serve them.
    early: Vec<(RequestId, Op)>,
    early_admin: Vec<(AdminId, AdminOp)>,
}

#[expect(clippy::large_enum_variant, reason = "there is one, and it stays where it is")]
enum Stage {
    New(Memories),
    Booting {
        ring: Option<Box<dyn Memory>>,
        boot: Boot,
    },
    Running(Box<Run>),
    /// Boot ended badly; why.
    Broken(String),
}

impl Node {
    /// A node over its mapped files. The shell holds the locks of all files before this.
    pub fn new(cfg: NodeConfig, memories: Memories) -> Node {
        Node { cfg, stage: Stage::New(memories), early: Vec::new(), early_admin: Vec::new() }
    }

    /// Begins recovery; call once, before the first `step`.
    pub fn start(&mut self, _now: Now, actions: &mut Actions) {
        let stage = std::mem::replace(&mut self.stage, Stage::Broken("it was not started".into()));
        if let Stage::New(Memories { ring, maps, index }) = stage {
            let mut disk = Vec::new();
            self.stage = Stage::Booting { ring, boot: Boot::new(maps, index, &mut disk) };
            submit(disk, actions);
        }
    }

    /// Takes one event, and says what to do.
    pub fn step(&mut self, now: Now, event: Event, actions: &mut Actions) {
        match &mut self.stage {
            Stage::Running(run) => run.step(now, event, actions),
            Stage::Booting { boot, .. } => {
                if let Event::Disk { token, result } = event {
                    let mut disk = Vec::new();
                    let ended = boot.complete(&self.cfg, token, result, &mut disk);
                    submit(disk, actions);
                    match ended {
                        None => {}
                        Some(Ok(booted)) => self.run(now, booted, actions),
                        Some(Err(text)) => self.broken(text, actions),
                    }
                } else {
                    self.not_running(event, "Recovering", actions);
                }
            }
            Stage::New(_) | Stage::Broken(_) => self.not_running(event, "Failed", actions),
        }
    }

    fn run(&mut self, now: Now, booted: boot::Booted, actions: &mut Actions) {
        let stage = std::mem::replace(&mut self.stage, Stage::Broken(String::new()));
        let Stage::Booting { ring, .. } = stage else { unreachable!("only boot ends so") };
        let cut = booted.recovered.cut;
        if cut > 0 {
            let at = booted.recovered.tail.point.lsn;
            actions.log(Level::Warn, format!("the journal's end was torn: it goes on after LSN {at}"));
        }
        let mut run = Box::new(Run::new(self.cfg.clone(), ring, booted, now));
        run.advance(now, actions);
        for (id, op) in self.early.drain(..) {
            run.step(now, Event::Request { id, op }, actions);
        }
        for (id, op) in self.early_admin.drain(..) {
            run.step(now, Event::Admin { id, op }, actions);
        }
        self.stage = Stage::Running(run);
    }

    fn broken(&mut self, text: String, actions: &mut Actions) {
        for (id, _) in self.early.drain(..) {
            actions.push(Action::Complete { id, result: Err(IoError::EIO) });
        }
        for (id, _) in self.early_admin.drain(..) {
            actions.push(Action::Answer { id, answer: Answer::Refused(Refusal::Failed, text.clone()) });
        }
        actions.push(Action::Stop { text: text.clone() });
        self.stage = Stage::Broken(text);
    }

    /// Before recovery has ended, or after it has failed.
    fn not_running(&mut self, event: Event, state: &str, actions: &mut Actions) {
        let broken = match &self.stage {
            Stage::Broken(text) => Some(text.clone()),
            _ => None,
        };
        match event {
            Event::Request { id, op } => match broken {
                Some(_) => actions.push(Action::Complete { id, result: Err(IoError::EIO) }),
                None => self.early.push((id, op)),
            },
            // A view lives in a process: there is none yet, and none any more.
            Event::View { id, .. } => actions.push(Action::Complete { id, result: Err(IoError::EIO) }),
            Event::LinkUp { link, .. } => actions.push(Action::Close { link }),
            Event::Admin { id, op: AdminOp::Status } => {
                let status = Box::new(report::bare(&self.cfg, state, broken));
                actions.push(Action::Answer { id, answer: Answer::Status(status) });
            }
            Event::Admin { id, op } => match broken {
                Some(text) => {
                    actions.push(Action::Answer { id, answer: Answer::Refused(Refusal::Failed, text) });
                }
                None => self.early_admin.push((id, op)),
            },
            _ => {}
        }
    }
}

fn submit(disk: Vec<DiskRequest>, actions: &mut Actions) {
    actions.list.extend(disk.into_iter().map(Action::Disk));
}
