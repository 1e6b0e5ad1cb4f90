//! `volrep join`: sets up a shadow from a token.
//!
//! Owns: nothing that outlives the command. Invariant: what a volume holds is overwritten only
//! after the user has said so.

use super::backing::{self, Backing, FileKey, Spec, amount, spec_text};
use super::config::{self, Peer, check_address};
use super::failure::{Exit, Failure};
use super::invitation::{Invitation, MAX_TOKEN};
use super::output::{Output, confirm};
use super::places::{Places, check_name};
use super::setup::{self, NewNode, NodeArgs};
use super::size::Size;
use super::{interrupt, provision};
use crate::format::FormatError;
use crate::format::message::Role;
use std::io::Read;

/// Set up a shadow from a token
///
/// The token of a primary makes a shadow of that primary. The token of a shadow makes a shadow of that shadow: it gets
/// its first copy and all records through it.
#[derive(clap::Args, Clone, Debug)]
pub struct Join {
    /// What `volrep token` printed on the node that is to be followed; `-` reads it from stdin
    #[arg(value_name = "TOKEN")]
    token: String,
    /// A volume of the same name and size as the primary's: an existing file or block device (it will
    /// be overwritten), or a path at which a sparse file is created
    #[arg(long = "volume", value_name = "NAME=PATH[:SIZE]", required = true)]
    volumes: Vec<Spec>,
    /// Where the node that is to be followed is reached [default: as the token says]
    #[arg(long, value_name = "HOST:PORT", value_parser = check_address)]
    from: Option<String>,
    /// Name of the group on this machine [default: as on the primary]
    #[arg(long, value_name = "NAME", value_parser = check_name)]
    group: Option<String>,
    /// Overwrite volumes that hold something, without asking
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    node: NodeArgs,
}

impl Join {
    /// Does it.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        interrupt::watch(|| {})?;
        let token = Invitation::decode(&self.read_token()?).map_err(refuse_token)?;
        let group = self.group.as_deref().unwrap_or(&token.group);
        let _alone = if self.node.dry_run { None } else { Some(provision::exclusive(places)?) };
        provision::refuse_existing(places, group)?;
        let specs = match_volumes(&token, &self.volumes)?;
        let backings = backing::inspect(&specs, places)?;
        check_against(&token, &backings)?;
        let config = self.config(places, group, &token, &backings)?;
        let mut new = NewNode { group, config, key: token.key, role: Role::Shadow, backings, blank: false };
        if self.node.dry_run {
            setup::report(&new, places, true, "run it without --dry-run", out);
            return Ok(());
        }
        new.blank = setup::all_blank(&new.backings)?;
        if !new.blank {
            self.confirm_overwrite(group, &new.backings)?;
        }
        setup::create(&new, places)?;
        setup::report(&new, places, false, &format!("start it: volrep serve {group}"), out);
        Ok(())
    }

    fn read_token(&self) -> Result<String, Failure> {
        if self.token != "-" {
            return Ok(self.token.clone());
        }
        let mut text = String::new();
        let read = std::io::stdin().lock().take(MAX_TOKEN as u64 + 2).read_to_string(&mut text);
        read.map_err(|e| {
            Failure::usage(format!("can't read the token from stdin: {e}"), "give it as the argument")
        })?;
        Ok(text)
    }

    fn config(
        &self,
        places: &Places,
        group: &str,
        token: &Invitation,
        backings: &[Backing],
    ) -> Result<config::Config, Failure> {
        let node = match &self.node.node {
            Some(name) => name.clone(),
            None if !token.peer.is_empty() => token.peer.clone(),
            None => setup::host_name()?,
        };
        if node == token.primary {
            let what = format!("this node would be called `{node}`, as the primary is");
            return Err(Failure::usage(what, "give it another name with --node"));
        }
        let address = self.from.clone().unwrap_or_else(|| token.address.clone());
        let cascade = token.shadow_of.is_some();
        let mut peers = vec![Peer {
            name: token.primary.clone(),
            address: Some(address),
            dial: Some(true),
            sync: false,
            cascade,
        }];
        if let Some(name) = token.shadow_of.clone().filter(|n| !n.is_empty() && *n != node) {
            // It is not dialled from here; but a fence hook has to be told whom it is to fence.
            peers.push(Peer { name, address: None, dial: None, sync: false, cascade: false });
        }
        setup::new_config(&self.node, places, (group, token.id), node, peers, backings)
    }

    fn confirm_overwrite(&self, group: &str, backings: &[Backing]) -> Result<(), Failure> {
        for b in backings.iter().filter(|b| !b.create) {
            eprintln!(
                "volrep: {} ({}) is not empty: the first copy will overwrite it",
                b.path.display(),
                b.name
            );
        }
        confirm(group, "overwrite these volumes", self.yes).map_err(|f| match f.exit {
            Exit::Usage => Failure { exit: Exit::WouldLoseData, ..f },
            _ => f,
        })
    }
}

fn refuse_token(e: FormatError) -> Failure {
    let next = match e {
        FormatError::Version(_) => "use the same version of volrep on both nodes",
        _ => "copy the whole line that `volrep token` printed, or print a new one",
    };
    Failure::usage(format!("the token is not usable: {e}"), next)
}

/// The given volumes in the token's order, each with a size to create it at.
fn match_volumes(token: &Invitation, given: &[Spec]) -> Result<Vec<Spec>, Failure> {
    let wanted = || token.volumes.iter().map(|v| spec_text(&v.name, v.size)).collect::<Vec<_>>().join(" ");
    if let Some(extra) = given.iter().find(|s| token.volumes.iter().all(|v| v.name != s.name)) {
        let what = format!("the group `{}` has no volume `{}`", token.group, extra.name);
        return Err(Failure::usage(what, format!("give: {}", wanted())));
    }
    let mut specs = Vec::new();
    for v in &token.volumes {
        let mut of_name = given.iter().filter(|s| s.name == v.name);
        let (Some(spec), None) = (of_name.next(), of_name.next()) else {
            let what = format!("volume `{}` of the group `{}` is to be given once", v.name, token.group);
            return Err(Failure::usage(what, format!("give: {}", wanted())));
        };
        if let Some(size) = spec.size.filter(|s| s.0 != v.size) {
            return Err(wrong_size(&v.name, size.0, v.size));
        }
        // For what exists the true size is compared later, against the token and not against a flag.
        let size = (!spec.path.exists()).then_some(Size(v.size));
        specs.push(Spec { size, ..spec.clone() });
    }
    Ok(specs)
}

fn wrong_size(name: &str, is: u64, wanted: u64) -> Failure {
    let what =
        format!("volume `{name}` would have {} here, but has {} on the primary", amount(is), amount(wanted));
    Failure::new(Exit::WouldLoseData, what, format!("make it exactly {wanted} bytes"))
}

fn check_against(token: &Invitation, backings: &[Backing]) -> Result<(), Failure> {
    let boot = config::boot_id()?;
    for (v, b) in token.volumes.iter().zip(backings) {
        if !b.create {
            let m = std::fs::metadata(&b.path).map_err(|e| Failure::io("use", &b.path, &e))?;
            let here = FileKey::of(&m).fingerprint(boot);
            if let Some(same) = token.volumes.iter().find(|v| v.file == here) {
                let what = format!("{} is the primary's own volume `{}`", b.path.display(), same.name);
                return Err(Failure::new(
                    Exit::WouldLoseData,
                    what,
                    "give the shadow a file or device of its own",
                ));
            }
        }
        if b.size != v.size {
            return Err(wrong_size(&v.name, b.size, v.size));
        }
    }
    Ok(())
}
