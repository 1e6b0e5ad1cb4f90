//! The command's end of the control socket.
//!
//! Owns: one exchange. Invariant: a reply is bounded, and a daemon that is not there is told apart
//! from one that does not answer.

use super::{MAX_REPLY, Reply, Request, VERSION, Verb};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How an exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody listens: the daemon is down.
    #[error("the daemon is not running")]
    Down,
    /// It listens but does not answer.
    #[error("the daemon does not answer")]
    Silent,
    /// The exchange broke off.
    #[error("talking to the daemon: {0}")]
    Io(#[from] io::Error),
    /// The reply makes no sense to this version.
    #[error("the daemon's reply is not understood: {0}")]
    Reply(#[from] serde_json::Error),
}

/// Asks, and waits for the answer: for `limit`, or as long as it takes.
pub fn call(socket: &Path, verb: Verb, limit: Option<Duration>) -> Result<Reply, CallError> {
    let mut stream = UnixStream::connect(socket).map_err(|e| match e.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => CallError::Down,
        _ => CallError::Io(e),
    })?;
    stream.set_read_timeout(limit)?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    let mut line = serde_json::to_vec(&Request { version: VERSION, verb })?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut reply = Vec::new();
    let read = BufReader::new(&stream).take(MAX_REPLY as u64 + 1).read_until(b'\n', &mut reply);
    match read {
        Ok(_) if reply.ends_with(b"\n") => Ok(serde_json::from_slice(&reply)?),
        Ok(_) => Err(CallError::Io(io::Error::new(ErrorKind::UnexpectedEof, "it closed the connection"))),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Err(CallError::Silent),
        Err(e) => Err(CallError::Io(e)),
    }
}
