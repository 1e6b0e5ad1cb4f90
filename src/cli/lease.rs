//! `volrep lease`: the cluster manager's word that this primary may serve, for a while.
//!
//! Owns: nothing. Invariant: none here; the node keeps it.

use super::failure::Failure;
use super::output::Output;
use super::places::Places;
use super::remote;
use crate::control::{Reply, Verb};
use crate::node::status::SCHEMA_VERSION;
use serde_json::json;
use std::time::Duration;

/// Let this primary serve for so long, and stop by itself if the lease is not renewed
///
/// For cluster managers. Once a lease has run out, the devices give errors, and nothing is acknowledged before the daemon
/// is started anew. The time counts from this command's arrival.
#[derive(clap::Args, Clone, Debug)]
pub struct Lease {
    /// The group's name
    #[arg(value_name = "NAME")]
    group: String,
    /// For so long from now, such as 20s; 0s: it has run out
    #[arg(long = "for", value_name = "TIME", required_unless_present = "none", value_parser = humantime::parse_duration)]
    period: Option<Duration>,
    /// No lease is needed any more
    #[arg(long, conflicts_with = "period")]
    none: bool,
}

impl Lease {
    /// Does it.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        let ns = self.period.filter(|_| !self.none).map(|p| u64::try_from(p.as_nanos()).unwrap_or(u64::MAX));
        // An answer that comes later than that is none.
        match remote::ask(places, &self.group, Verb::Lease { ns }, Some(Duration::from_secs(5)))? {
            Reply::Done { text } => {
                let document =
                    json!({ "schema_version": SCHEMA_VERSION, "group": self.group, "ns": ns, "text": text });
                out.document(&document, || text.clone());
                Ok(())
            }
            _ => Err(remote::odd(&self.group)),
        }
    }
}
