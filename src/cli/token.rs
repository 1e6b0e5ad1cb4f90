//! `volrep token`: what a shadow needs to join, on one line.
//!
//! Owns: nothing. Invariant: the token alone is on stdout.

use super::backing::FileKey;
use super::config::{self, check_address};
use super::failure::{Exit, Failure};
use super::invitation::{Invitation, Volume};
use super::output::Output;
use super::places::{Places, check_name};
use super::{state, status};
use crate::format::message::Role;
use crate::node::status::SCHEMA_VERSION;
use serde_json::json;
use std::net::SocketAddr;

/// Print a token with which a shadow joins this node; it holds the group's key
///
/// On the primary: for a shadow of the primary. On a shadow: for a shadow of that shadow, which passes on what it gets
/// (one that is far away is fed by a near one, and the primary sends everything once).
#[derive(clap::Args, Clone, Debug)]
pub struct Token {
    /// The group's name
    #[arg(value_name = "NAME")]
    group: String,
    /// Name for the node that joins [default: its host's]
    #[arg(long, value_name = "NAME", value_parser = check_name)]
    peer: Option<String>,
    /// Where the shadow reaches this node [default: where it listens]
    #[arg(long, value_name = "HOST:PORT", value_parser = check_address)]
    address: Option<String>,
}

impl Token {
    /// Does it.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        let config = config::load(places, &self.group)?;
        let superblock = state::read(&places.superblock(&self.group))?;
        state::check(&superblock, &config, &places.superblock(&self.group))?;
        let shadow_of = (superblock.role == Role::Shadow).then(|| {
            let told = status::obtain(places, &self.group).ok().and_then(|s| s.primary);
            told.and_then(|p| p.name).unwrap_or_default()
        });
        let address = self.address.clone().map_or_else(|| address(&config), Ok)?;
        let boot = config::boot_id()?;
        let volume = |v: &config::Volume| {
            let file = std::fs::metadata(&v.path).map(|m| FileKey::of(&m).fingerprint(boot));
            let file = file.map_err(|e| Failure::io("use", &v.path, &e))?;
            Ok(Volume { name: v.name.clone(), size: v.size.0, file })
        };
        let invitation = Invitation {
            group: self.group.clone(),
            id: config.group,
            volumes: config.volumes.iter().map(volume).collect::<Result<_, Failure>>()?,
            primary: config.node.clone(),
            address: address.clone(),
            peer: self.peer.clone().unwrap_or_default(),
            key: config::load_key(places, &config)?,
            shadow_of: shadow_of.clone(),
        };
        let token = invitation.encode();
        eprintln!("volrep: the token holds the group's key: treat it like a password");
        if shadow_of.is_some() {
            eprintln!(
                "volrep: {} is a shadow: the node that joins gets its records and its first copy through it",
                config.node
            );
        }
        let document = json!({
            "schema_version": SCHEMA_VERSION,
            "group": self.group,
            "primary": config.node,
            "cascade": shadow_of.is_some(),
            "address": address,
            "token": token,
        });
        out.document(&document, || token.clone());
        Ok(())
    }
}

/// Where this node is reached, from where it listens.
fn address(config: &config::Config) -> Result<String, Failure> {
    let listen = config.listen.as_ref().and_then(|l| l.parse::<SocketAddr>().ok());
    let Some(listen) = listen else {
        let what = format!("`{}` listens nowhere, so nobody can join it", config.node);
        return Err(Failure::new(Exit::Failure, what, "set `listen` in its configuration"));
    };
    if !listen.ip().is_unspecified() {
        return Ok(listen.to_string());
    }
    let host = nix::unistd::gethostname().ok().and_then(|h| h.into_string().ok()).unwrap_or_default();
    let address = check_address(&format!("{host}:{}", listen.port()));
    address.map_err(|e| Failure::usage(e, "say where the shadow reaches this node: --address HOST:PORT"))
}
