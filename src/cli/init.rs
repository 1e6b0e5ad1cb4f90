//! `volrep init`: sets up a group's primary.
//!
//! Owns: nothing that outlives the command. Invariant: a group that exists is never touched.

use super::backing::{self, Spec};
use super::config::{Peer, check_address};
use super::failure::Failure;
use super::output::Output;
use super::places::{Places, check_name};
use super::setup::{self, NewNode, NodeArgs};
use super::{interrupt, provision};
use crate::format::message::Role;
use crate::units::GroupId;

/// Set up a group's primary: configuration, key, journal
#[derive(clap::Args, Clone, Debug)]
pub struct Init {
    /// The group's name
    #[arg(value_name = "NAME", value_parser = check_name)]
    group: String,
    /// A volume: an existing file or block device (its contents are kept), or with SIZE a new sparse
    /// file. Several make one group in one write order
    #[arg(long = "volume", value_name = "NAME=PATH[:SIZE]", required = true)]
    volumes: Vec<Spec>,
    /// A FLUSH waits for this shadow, too. Several may be given
    #[arg(long = "sync", value_name = "PEER[=HOST:PORT]", value_parser = parse_sync)]
    sync: Vec<Peer>,
    #[command(flatten)]
    node: NodeArgs,
}

fn parse_sync(text: &str) -> Result<Peer, String> {
    let (name, address) = match text.split_once('=') {
        Some((name, address)) => (name, Some(check_address(address)?)),
        None => (text, None),
    };
    Ok(Peer { name: check_name(name)?, address, dial: None, sync: true, cascade: false })
}

impl Init {
    /// Does it.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        interrupt::watch(|| {})?;
        let _alone = if self.node.dry_run { None } else { Some(provision::exclusive(places)?) };
        provision::refuse_existing(places, &self.group)?;
        let backings = backing::inspect(&self.volumes, places)?;
        let name = self.node.node.clone().map_or_else(setup::host_name, Ok)?;
        let id = GroupId(setup::random()?);
        let config =
            setup::new_config(&self.node, places, (&self.group, id), name, self.sync.clone(), &backings)?;
        let mut new = NewNode {
            group: &self.group,
            config,
            key: setup::random()?,
            role: Role::Primary,
            backings,
            blank: false,
        };
        let action = format!("start it: volrep serve {}", self.group);
        if self.node.dry_run {
            setup::report(&new, places, true, "run it without --dry-run", out);
            return Ok(());
        }
        new.blank = setup::all_blank(&new.backings)?;
        setup::create(&new, places)?;
        setup::report(&new, places, false, &action, out);
        Ok(())
    }
}
