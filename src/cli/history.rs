//! `volrep history`: what has befallen this node.
//!
//! Owns: nothing. Invariant: it reads what the daemon has kept, and works without it; marks that are not true any
//! more are told as such.

use super::config;
use super::failure::Failure;
use super::output::Output;
use super::places::Places;
use super::size::grouped;
use crate::daemon::history::read;
use crate::node::history::{Happening, HistoryEvent, Standing};
use crate::node::status::SCHEMA_VERSION;
use serde_json::{Value, json};

/// Show what has befallen this node: promotions, resyncs, comparisons, marks
///
/// It works without the daemon. An event is shown a moment after it, when it is durable. The oldest events go when
/// there are many.
#[derive(clap::Args, Clone, Debug)]
pub struct History {
    /// The group's name
    #[arg(value_name = "NAME")]
    group: String,
}

impl History {
    /// Does it.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        let config = config::load(places, &self.group)?;
        let path = places.history(&self.group);
        let events = read(&path).map_err(|e| Failure::io("read", &path, &e))?;
        let standing = Standing::after(&events);
        let given_up =
            |n: usize, e: &HistoryEvent| matches!(e.what, Happening::Mark { .. }) && !standing.is_true(n);
        let list: Vec<Value> = events
            .iter()
            .enumerate()
            .map(|(n, event)| {
                let mut value = serde_json::to_value(event).unwrap_or_default();
                if matches!(event.what, Happening::Mark { .. }) {
                    value["given_up"] = given_up(n, event).into();
                }
                value
            })
            .collect();
        let document = json!({
            "schema_version": SCHEMA_VERSION, "group": self.group, "node": config.node, "events": list,
        });
        let line = |(n, e): (usize, &HistoryEvent)| {
            let end = if given_up(n, e) { " (given up since)" } else { "" };
            format!("{}  term {}  LSN {}  {}{end}", e.at, e.term, grouped(e.lsn), e.what.text())
        };
        out.document(&document, || match events.is_empty() {
            true => "nothing has happened here yet".to_owned(),
            false => events.iter().enumerate().map(line).collect::<Vec<_>>().join("\n"),
        });
        Ok(())
    }
}
