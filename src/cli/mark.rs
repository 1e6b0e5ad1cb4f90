//! `volrep mark`: names this place in the write order.
//!
//! Owns: nothing. Invariant: when it succeeds, the mark is durable; whatever had completed before it was called
//! is before the mark, and whatever begins afterwards is after it.

use super::failure::Failure;
use super::output::Output;
use super::places::Places;
use super::remote;
use super::size::grouped;
use crate::control::{Reply, Verb};
use crate::format::record::{MAX_MARK, is_mark};
use crate::node::event::At;
use crate::node::status::SCHEMA_VERSION;
use serde_json::json;

/// Name this place in the write order, such as "before batch"
///
/// Every write that has completed is before the mark, every one that begins after this command has ended is after
/// it. Run it on the primary. The shadows get it with the writes; `volrep history` lists it.
#[derive(clap::Args, Clone, Debug)]
pub struct Mark {
    /// The group's name
    #[arg(value_name = "NAME")]
    group: String,
    /// The mark's text, at most 200 bytes. It need not be unique: its LSN tells marks apart
    #[arg(value_name = "TEXT")]
    text: String,
}

impl Mark {
    /// Does it.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        if !matches!(super::at::parse(&self.text), Ok(At::Mark(_))) {
            let next = "choose words, so that `volrep promote --at` can tell a mark from those";
            return Err(Failure::usage(format!("`{}` is an LSN or a time", self.text), next));
        }
        if !is_mark(&self.text) {
            let what = "that can't be the text of a mark";
            let next = format!("give one visible line of at most {MAX_MARK} bytes, without spaces around it");
            return Err(Failure::usage(what, &next));
        }
        let reply = remote::ask(places, &self.group, Verb::Mark { text: self.text.clone() }, None)?;
        let Reply::Marked { mark } = reply else { return Err(remote::odd(&self.group)) };
        let document = json!({
            "schema_version": SCHEMA_VERSION, "group": self.group, "mark": mark.text, "lsn": mark.lsn,
            "time": mark.time, "hash": mark.hash,
        });
        out.document(&document, || format!("{} at LSN {}, {}", mark.text, grouped(mark.lsn), mark.time));
        Ok(())
    }
}
