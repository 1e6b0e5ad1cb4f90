//! Asking the daemon of a group.
//!
//! Owns: how its refusals and its absence become failures. Invariant: a group that does not exist is
//! told apart from one that is not served.

use super::config;
use super::failure::{Exit, Failure};
use super::places::Places;
use crate::control::client::{CallError, call};
use crate::control::{Reply, Verb};
use std::time::Duration;

/// Asks; a refusal becomes a failure.
pub fn ask(places: &Places, group: &str, verb: Verb, limit: Option<Duration>) -> Result<Reply, Failure> {
    config::load(places, group)?;
    match call(&places.control_socket(group), verb, limit) {
        Ok(Reply::Refused { kind, text }) => Err(Failure::new(kind.into(), text, "")),
        Ok(reply) => Ok(reply),
        Err(e) => Err(unanswered(places, group, &e)),
    }
}

/// The failure for a daemon that gave no answer.
pub fn unanswered(places: &Places, group: &str, e: &CallError) -> Failure {
    let socket = places.control_socket(group);
    let what = format!("`{group}`: {e} ({})", socket.display());
    match e {
        CallError::Down => Failure::new(Exit::Failure, what, format!("start it: volrep serve {group}")),
        CallError::Silent => Failure::new(Exit::Busy, what, "look at its log; try again"),
        CallError::Io(io) if io.kind() == std::io::ErrorKind::PermissionDenied => {
            Failure::new(Exit::Failure, what, "run it as the user who runs the daemon")
        }
        CallError::Io(_) => Failure::new(Exit::Failure, what, "look at the daemon's log"),
        CallError::Reply(_) => {
            Failure::new(Exit::Failure, what, "use the same version of volrep as the daemon")
        }
    }
}

/// The failure for a reply of the wrong kind.
pub fn odd(group: &str) -> Failure {
    let what = format!("the daemon of `{group}` answered another question");
    Failure::new(Exit::Failure, what, "use the same version of volrep as the daemon")
}
