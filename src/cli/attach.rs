//! `volrep attach`: offers the volumes as devices.
//!
//! Owns: nothing. Invariant: the devices alone are on stdout, one per line in the volumes' order.

use super::failure::Failure;
use super::output::Output;
use super::places::Places;
use super::remote;
use crate::control::{DeviceKind, Reply, Verb};
use crate::node::status::SCHEMA_VERSION;
use serde_json::json;

/// Offer the volumes as devices; prints their paths or NBD URIs
#[derive(clap::Args, Clone, Debug)]
pub struct Attach {
    /// The group's name
    #[arg(value_name = "NAME")]
    group: String,
    /// What kind of device
    #[arg(long, value_enum, value_name = "KIND", default_value = "auto")]
    device: DeviceKind,
}

impl Attach {
    /// Does it; waits until the node serves.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        let reply = remote::ask(places, &self.group, Verb::Attach { device: self.device }, None)?;
        let Reply::Attached { device, volumes } = reply else { return Err(remote::odd(&self.group)) };
        let document = json!({
            "schema_version": SCHEMA_VERSION,
            "group": self.group,
            "kind": device,
            "volumes": volumes,
        });
        out.document(&document, || volumes.iter().map(|v| v.device.as_str()).collect::<Vec<_>>().join("\n"));
        Ok(())
    }
}
