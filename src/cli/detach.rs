//! `volrep detach`: takes the devices away and drains to the backing.
//!
//! Owns: nothing. Invariant: when it succeeds, every accepted write is in the backing.

use super::failure::Failure;
use super::output::Output;
use super::places::Places;
use super::remote;
use crate::control::{Reply, Verb};
use crate::node::status::SCHEMA_VERSION;
use serde_json::json;

/// Take the devices away and drain to the backing; never waits for a shadow
#[derive(clap::Args, Clone, Debug)]
pub struct Detach {
    /// The group's name
    #[arg(value_name = "NAME")]
    group: String,
    /// Only say what would be taken away
    #[arg(long)]
    dry_run: bool,
}

impl Detach {
    /// Does it; waits for the drain.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        if self.dry_run {
            let status = super::status::obtain(places, &self.group)?;
            let devices: Vec<&str> = status.volumes.iter().filter_map(|v| v.device.as_deref()).collect();
            let document = json!({
                "schema_version": SCHEMA_VERSION, "group": self.group, "dry_run": true, "devices": devices,
            });
            out.document(&document, || match devices.is_empty() {
                true => "nothing is attached".to_owned(),
                false => format!("would take away: {}", devices.join(" ")),
            });
            return Ok(());
        }
        let reply = remote::ask(places, &self.group, Verb::Detach, None)?;
        let Reply::Done { text } = reply else { return Err(remote::odd(&self.group)) };
        if out.json {
            let document = json!({
                "schema_version": SCHEMA_VERSION, "group": self.group, "dry_run": false, "text": text,
            });
            out.document(&document, String::new);
        } else if !text.is_empty() {
            eprintln!("volrep: {text}");
        }
        Ok(())
    }
}
