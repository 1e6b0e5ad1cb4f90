//! `volrep view`: a shadow's image, frozen, as devices, while replication goes on.
//!
//! Owns: nothing. Invariant: the devices alone are on stdout, one per line in the volumes' order, as those of
//! `attach`; a view that could not be offered is not kept open.

use super::failure::Failure;
use super::output::Output;
use super::places::Places;
use super::size::grouped;
use super::{remote, status};
use crate::control::{Attached, DeviceKind, Reply, Verb};
use crate::node::event::At;
use crate::node::status::{SCHEMA_VERSION, ViewStatus};
use serde_json::json;

/// Open a shadow's frozen image as devices while replication goes on, or close it
///
/// The devices show the image of one record and nothing of later ones; the shadow goes on receiving and
/// acknowledging, and applies again once the view is closed. A view that would fill the shadow's journal fails: its
/// users get errors, the shadow goes on.
#[derive(clap::Args, Clone, Debug)]
pub struct View {
    /// The group's name
    #[arg(value_name = "NAME")]
    group: String,
    #[command(flatten)]
    mode: Mode,
    /// Freeze it at exactly this record, which the shadow has and has not applied yet: an LSN, a time (RFC 3339, or
    /// HH:MM:SS of this machine's clock: the last record sealed until then), or the text of a mark [default: at once]
    #[arg(long, value_name = "LSN|TIME|MARK", conflicts_with = "close")]
    at: Option<String>,
    /// What kind of device
    #[arg(long, value_enum, value_name = "KIND", default_value = "auto", conflicts_with = "close")]
    device: DeviceKind,
}

#[derive(clap::Args, Clone, Debug)]
#[group(required = true, multiple = false)]
struct Mode {
    /// Nothing can be written to it
    #[arg(long)]
    read_only: bool,
    /// What is written to it goes into an overlay beside the journal, which is dropped when the view is closed
    #[arg(long)]
    scratch: bool,
    /// Take the devices away, drop what was written to them, and let the shadow catch up
    #[arg(long)]
    close: bool,
}

impl View {
    /// Does it; waits until the image is frozen, or the devices are gone.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        if self.mode.close {
            return self.close(places, out);
        }
        let at = self.at.as_deref().map(super::at::parse).transpose()?;
        let opened = open(places, &self.group, self.mode.scratch, at, self.device)?;
        let lsn = opened.view.lsn.unwrap_or_default();
        eprintln!("volrep: frozen at LSN {}; `volrep view {} --close` ends it", grouped(lsn), self.group);
        let document = json!({
            "schema_version": SCHEMA_VERSION,
            "group": self.group,
            "kind": opened.kind,
            "volumes": opened.volumes,
            "view": opened.view,
        });
        out.document(&document, || opened.devices().join("\n"));
        Ok(())
    }

    fn close(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        let text = close(places, &self.group, false)?;
        if out.json {
            let document = json!({ "schema_version": SCHEMA_VERSION, "group": self.group, "text": text });
            out.document(&document, String::new);
        } else {
            eprintln!("volrep: {text}");
        }
        Ok(())
    }
}

/// A view that is open.
pub struct Opened {
    /// The kind of its devices.
    pub kind: DeviceKind,
    /// They.
    pub volumes: Vec<Attached>,
    /// As the node tells it.
    pub view: ViewStatus,
}

impl Opened {
    /// Paths or URIs, in the order of the volumes.
    pub fn devices(&self) -> Vec<&str> {
        self.volumes.iter().map(|v| v.device.as_str()).collect()
    }
}

/// Opens one.
pub fn open(
    places: &Places,
    group: &str,
    scratch: bool,
    at: Option<At>,
    device: DeviceKind,
) -> Result<Opened, Failure> {
    let reply = remote::ask(places, group, Verb::View { scratch, at, device }, None)?;
    let Reply::Attached { device: kind, volumes } = reply else { return Err(remote::odd(group)) };
    let view = status::obtain(places, group)?.view.unwrap_or_default();
    Ok(Opened { kind, volumes, view })
}

/// Closes it; what to tell.
pub fn close(places: &Places, group: &str, force: bool) -> Result<String, Failure> {
    match remote::ask(places, group, Verb::ViewClose { force }, None)? {
        Reply::Done { text } => Ok(text),
        _ => Err(remote::odd(group)),
    }
}
