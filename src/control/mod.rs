//! The administrator's way to a running node: one JSON line asks, one answers.
//!
//! Owns: the protocol on the control socket, and the front ends that it opens. Invariant: a line is
//! bounded ([`MAX_REQUEST`], [`MAX_REPLY`]) before it is parsed; only the socket's owner gets in
//! (0600 in a 0700 directory).
#![allow(clippy::disallowed_methods, reason = "the shell: the admin socket and its threads")]

pub mod client;
pub mod fronts;
pub mod server;

use crate::node::event::{At, Refusal};
use crate::node::status::{MarkStatus, Status};
use serde::{Deserialize, Serialize};

/// The protocol's version; both ends must speak the same one.
pub const VERSION: u32 = 1;
/// Longest request, bytes.
pub const MAX_REQUEST: usize = 64 << 10;
/// Longest reply, bytes.
pub const MAX_REPLY: usize = 1 << 20;

/// A request; each has a connection of its own.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// What is asked.
    #[serde(flatten)]
    pub verb: Verb,
}

/// What is asked of a running node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case")]
pub enum Verb {
    /// The state now.
    Status,
    /// Offer the volumes as devices, once the node serves them.
    Attach {
        /// How.
        device: DeviceKind,
    },
    /// Take the devices away and drain to the backing.
    Detach,
    /// Name this place in the write order.
    Mark {
        /// How.
        text: String,
    },
    /// Become the primary.
    Promote {
        /// The operator's word that the old primary can no longer write.
        fenced: bool,
        /// Only say what would happen.
        dry_run: bool,
        /// As of which record.
        #[serde(default)]
        at: Option<At>,
        /// Though it knows that it lacks what was acknowledged.
        #[serde(default)]
        accept_outdated: bool,
    },
    /// A member of the sync set is lost: go on without it.
    Outdate {
        /// Its name.
        member: String,
        /// The operator's word that it is stopped.
        fenced: bool,
        /// Only say what would happen.
        dry_run: bool,
    },
    /// Serve for a while, then stop by itself.
    Lease {
        /// For so many ns from now; none: no lease is needed.
        ns: Option<u64>,
    },
    /// Hand the place of the primary over to a shadow.
    Switchover {
        /// Its name.
        to: String,
        /// Only say what would happen.
        dry_run: bool,
    },
    /// Prove a shadow equal; its progress is in the state.
    Refresh {
        /// Which shadow, on a primary with several.
        peer: Option<String>,
        /// Trust the hash index.
        quick: bool,
        /// Only compare.
        verify: bool,
        /// Bytes a second; 0: no limit.
        rate: u64,
        /// A resync may spoil the old image.
        in_place: bool,
        /// A delayed shadow gives its window up.
        #[serde(default)]
        suspend_delay: bool,
    },
    /// End it.
    RefreshStop,
    /// Give up what only this node holds, and follow the other primary; its devices are taken away first.
    Rejoin {
        /// The operator's word that this peer's side is kept.
        keep: Option<String>,
        /// Only say what would happen.
        dry_run: bool,
    },
    /// Freeze a shadow's image and offer it as devices.
    View {
        /// What is written there is kept until the view is closed.
        scratch: bool,
        /// The record at which it is frozen.
        at: Option<At>,
        /// How.
        device: DeviceKind,
    },
    /// Take the devices of the view away, and drop what was written there.
    ViewClose {
        /// Whoever uses them.
        force: bool,
    },
}

/// How volumes are offered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// The best that this machine can
    Auto,
    /// A ublk block device
    Ublk,
    /// A block device of the kernel's NBD driver
    Nbd,
    /// A file through FUSE, and a loop device on it
    Fuse,
    /// No block device: an NBD server on a unix socket, which needs no root
    NbdSocket,
}

impl std::fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DeviceKind::Auto => "auto",
            DeviceKind::Ublk => "ublk",
            DeviceKind::Nbd => "nbd",
            DeviceKind::Fuse => "fuse",
            DeviceKind::NbdSocket => "nbd-socket",
        })
    }
}

/// A volume that is offered.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attached {
    /// The volume's name.
    pub volume: String,
    /// The device's path or the NBD URI.
    pub device: String,
}

/// The answer.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// To [`Verb::Status`].
    Status {
        /// The state.
        status: Box<Status>,
    },
    /// To [`Verb::Attach`] and [`Verb::View`].
    Attached {
        /// How, in the end.
        device: DeviceKind,
        /// In the order of the volumes' numbers.
        volumes: Vec<Attached>,
    },
    /// To [`Verb::Mark`].
    Marked {
        /// The mark.
        mark: MarkStatus,
    },
    /// Done; what to tell.
    Done {
        /// That.
        text: String,
    },
    /// Not done.
    Refused {
        /// Which exit code.
        kind: Kind,
        /// Why, and what to do next.
        text: String,
    },
}

impl Reply {
    /// A refusal.
    pub fn refused(kind: Kind, text: impl Into<String>) -> Reply {
        Reply::Refused { kind, text: text.into() }
    }
}

/// Why a request was not done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It failed.
    Failed,
    /// In use, or in a state in which it can't be done.
    Busy,
    /// A peer that is needed can't be reached.
    Unreachable,
    /// It would lose data.
    WouldLoseData,
    /// The histories have diverged.
    Diverged,
    /// The old primary may still be writing.
    Unfenced,
}

impl From<Refusal> for Kind {
    fn from(r: Refusal) -> Kind {
        match r {
            Refusal::Failed => Kind::Failed,
            Refusal::Busy => Kind::Busy,
            Refusal::Unreachable => Kind::Unreachable,
            Refusal::WouldLoseData => Kind::WouldLoseData,
            Refusal::Diverged => Kind::Diverged,
            Refusal::Unfenced => Kind::Unfenced,
        }
    }
}

/// Reads a request, whatever bytes it is.
pub fn parse_request(line: &[u8]) -> Result<Verb, Reply> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let refuse = |text: String| Reply::refused(Kind::Failed, text);
    // The version first: the rest may be of a kind that only another version knows.
    let version =
        serde_json::from_slice::<Version>(line).map_err(|e| refuse(format!("not a request: {e}")))?;
    if version.version != VERSION {
        return Err(refuse(format!(
            "the daemon speaks version {VERSION} of the control protocol, the command version {}: use the volrep \
             that belongs to the daemon, or restart the daemon",
            version.version
        )));
    }
    let request =
        serde_json::from_slice::<Request>(line).map_err(|e| refuse(format!("not a request: {e}")))?;
    Ok(request.verb)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden() {
        let request = Request { version: VERSION, verb: Verb::Attach { device: DeviceKind::Auto } };
        let line = serde_json::to_string(&request).unwrap();
        assert_eq!(line, r#"{"version":1,"verb":"attach","device":"auto"}"#);
        assert_eq!(parse_request(line.as_bytes()), Ok(request.verb));
        let reply = Reply::refused(Kind::WouldLoseData, "no");
        let line = serde_json::to_string(&reply).unwrap();
        assert_eq!(line, r#"{"reply":"refused","kind":"would_lose_data","text":"no"}"#);
    }

    #[test]
    fn another_version_is_told_so() {
        let Err(Reply::Refused { text, .. }) = parse_request(br#"{"version":2,"verb":"dance"}"#) else {
            panic!()
        };
        assert!(text.contains("version 2"), "{text}");
        assert!(parse_request(br#"{"version":1,"verb":"dance"}"#).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = parse_request(&bytes);
        }
    }
}
