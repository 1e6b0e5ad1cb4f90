//! `volrep rejoin` and `volrep resolve`: a node gives up what only it holds, and follows the other primary.
//!
//! Owns: what is said before it. Invariant: nothing is given up before the plan was confirmed, and everything that
//! is given up is in a salvage file first (the node sees to that).

use super::failure::Failure;
use super::output::{Output, confirm};
use super::places::Places;
use super::{remote, status};
use crate::control::{Reply, Verb};
use crate::node::status::{SCHEMA_VERSION, Status};
use serde_json::{Value, json};

/// Have an old primary follow the one that was promoted since; what only it holds is saved first
///
/// Run it on the old primary, once `volrep status` calls it Retired (or, on a shadow whose history differs from its
/// primary's, Diverged). Its own records after the point at which the histories part go to a salvage file (`volrep
/// salvage` shows and extracts them). Then only what was written on either side since that point is resynced. Devices
/// that are still attached are taken away first; one that is mounted or open is not, and nothing is done.
///
/// To keep the old primary's side instead, promote it: it then outranks the other, which can rejoin.
#[derive(clap::Args, Clone, Debug)]
pub struct Rejoin {
    #[command(flatten)]
    act: ActArgs,
}

/// After two nodes were promoted: give up this side, and follow the one that is kept
///
/// Run it on the node that is NOT kept. What only it holds is saved in a salvage file first, and its devices are
/// taken away; one that is mounted or open is not, and nothing is done.
#[derive(clap::Args, Clone, Debug)]
pub struct Resolve {
    #[command(flatten)]
    act: ActArgs,
    /// The node whose side is kept
    #[arg(long, value_name = "PEER", required = true)]
    keep: String,
}

#[derive(clap::Args, Clone, Debug)]
struct ActArgs {
    /// The group's name
    #[arg(value_name = "NAME")]
    group: String,
    /// Only say what would be given up and what would happen
    #[arg(long)]
    dry_run: bool,
    /// Don't ask for the group's name
    #[arg(long)]
    yes: bool,
}

impl Rejoin {
    /// Does it.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        self.act.run(None, places, out)
    }
}

impl Resolve {
    /// Does it.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        self.act.run(Some(&self.keep), places, out)
    }
}

impl ActArgs {
    fn run(&self, keep: Option<&str>, places: &Places, out: &Output) -> Result<(), Failure> {
        let before = status::running(places, &self.group)?;
        if let Some(keep) = keep {
            check_name(keep, &before)?;
        }
        let plan = self.ask(keep, true, places)?;
        let text = format!("{plan}.{}", self.consequences(&before, places));
        if self.dry_run {
            out.document(&self.document(keep, &before, &text, places), || text.clone());
            return Ok(());
        }
        eprintln!("{text}");
        confirm(&self.group, "give up what only this node holds", self.yes)?;
        self.ask(keep, false, places)?;
        let done = format!("it follows; `volrep status {}` tells how far it is", self.group);
        out.document(&self.document(keep, &before, &text, places), || done);
        Ok(())
    }

    fn ask(&self, keep: Option<&str>, dry_run: bool, places: &Places) -> Result<String, Failure> {
        let verb = Verb::Rejoin { keep: keep.map(str::to_owned), dry_run };
        match remote::ask(places, &self.group, verb, None)? {
            Reply::Done { text } => Ok(text),
            _ => Err(remote::odd(&self.group)),
        }
    }

    /// Where what is given up goes, and which devices.
    fn consequences(&self, before: &Status, places: &Places) -> String {
        let mut text = format!("\nSalvage files are in {}", places.salvage(&self.group).display());
        let devices = devices(before);
        if !devices.is_empty() {
            text += &format!("\nTaken away first: {}", devices.join(" "));
        }
        text
    }

    fn document(&self, keep: Option<&str>, before: &Status, text: &str, places: &Places) -> Value {
        let of_kept = |name: &str| keep.is_none_or(|keep| keep == name);
        let fork = before.peers.iter().filter(|p| of_kept(&p.name)).find_map(|p| p.fork_lsn);
        json!({
            "schema_version": SCHEMA_VERSION,
            "group": self.group,
            "node": before.node,
            "dry_run": self.dry_run,
            "keep": keep,
            "term": before.term,
            "fork_lsn": fork,
            "tail_lsn": before.tail_lsn,
            "salvage_dir": places.salvage(&self.group).display().to_string(),
            "devices": devices(before),
            "text": text,
        })
    }
}

fn devices(s: &Status) -> Vec<&str> {
    s.volumes.iter().filter_map(|v| v.device.as_deref()).collect()
}

/// A name that was mistyped is told before anything is asked.
fn check_name(keep: &str, s: &Status) -> Result<(), Failure> {
    let peers: Vec<&str> = s.peers.iter().map(|p| p.name.as_str()).collect();
    if keep == s.node || peers.contains(&keep) {
        return Ok(());
    }
    let what = format!("no node of `{}` is known here by the name `{keep}`", s.group);
    Err(Failure::usage(what, format!("known are: {}", peers.join(", "))))
}
