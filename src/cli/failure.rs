//! What a command says when it did not do what it was asked.
//!
//! Owns: the exit codes. Invariant: a failure says what happened, to what, and what to do next.

use crate::control::Kind;
use serde_json::{Value, json};
use std::fmt;
use std::io;
use std::path::Path;

/// How a command ends; the numbers are promised to scripts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// It failed.
    Failure = 1,
    /// The command line is wrong.
    Usage = 2,
    /// There is no such group here.
    NoGroup = 10,
    /// Something is in use, or in a state in which this can't be done.
    Busy = 11,
    /// A peer that is needed can't be reached.
    Unreachable = 12,
    /// Data would be lost.
    WouldLoseData = 13,
    /// The histories have diverged.
    Diverged = 14,
    /// Nothing proves that the old primary can no longer write.
    Unfenced = 15,
    /// A signal ended it.
    Interrupted = 130,
}

impl Exit {
    /// Its name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Exit::Ok => "ok",
            Exit::Failure => "failure",
            Exit::Usage => "usage",
            Exit::NoGroup => "no_such_group",
            Exit::Busy => "busy",
            Exit::Unreachable => "peer_unreachable",
            Exit::WouldLoseData => "would_lose_data",
            Exit::Diverged => "diverged",
            Exit::Unfenced => "fencing_unconfirmed",
            Exit::Interrupted => "interrupted",
        }
    }
}

impl From<Kind> for Exit {
    fn from(kind: Kind) -> Exit {
        match kind {
            Kind::Failed => Exit::Failure,
            Kind::Busy => Exit::Busy,
            Kind::Unreachable => Exit::Unreachable,
            Kind::WouldLoseData => Exit::WouldLoseData,
            Kind::Diverged => Exit::Diverged,
            Kind::Unfenced => Exit::Unfenced,
        }
    }
}

/// Why a command was not done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// How the process ends.
    pub exit: Exit,
    /// What happened, and to what.
    pub what: String,
    /// What to do next; empty when `what` says it.
    pub next: String,
}

impl Failure {
    /// A failure of any kind.
    pub fn new(exit: Exit, what: impl Into<String>, next: impl Into<String>) -> Failure {
        Failure { exit, what: what.into(), next: next.into() }
    }

    /// This one, and what else went wrong when it was to be undone.
    pub fn and(self, also: &Failure) -> Failure {
        Failure { what: format!("{}; and it could not be undone: {}", self.what, also.what), ..self }
    }

    /// The command line asks for something that can't be meant.
    pub fn usage(what: impl Into<String>, next: impl Into<String>) -> Failure {
        Failure::new(Exit::Usage, what, next)
    }

    /// An operation on a file failed: `doing` is "create", "read" and so on.
    pub fn io(doing: &str, path: &Path, e: &io::Error) -> Failure {
        Failure::new(Exit::Failure, format!("can't {doing} {}: {e}", path.display()), advice(e))
    }

    /// A signal ended it before it was done.
    pub fn interrupted() -> Failure {
        Failure::new(Exit::Interrupted, "interrupted; what was begun has been undone", "run it again")
    }

    /// The form for scripts.
    pub fn json(&self) -> Value {
        json!({
            "schema_version": crate::node::status::SCHEMA_VERSION,
            "error": {
                "exit": self.exit as u8,
                "kind": self.exit.name(),
                "what": self.what,
                "next": self.next,
            },
        })
    }
}

/// What to do about an error of the system's.
pub fn advice(e: &io::Error) -> &'static str {
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some space there, or choose another place or smaller sizes, and run it again"
        }
        io::ErrorKind::PermissionDenied => {
            "run it as a user who may do that, or choose other places with --config DIR"
        }
        io::ErrorKind::NotFound => "check the path",
        io::ErrorKind::ReadOnlyFilesystem => "choose a place that can be written to",
        _ => "look at the kernel's log (dmesg) for the cause",
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        if self.next.is_empty() { Ok(()) } else { write!(f, "\n  next: {}", self.next) }
    }
}

impl std::error::Error for Failure {}
