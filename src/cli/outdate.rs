//! `volrep outdate`: a member of the sync set is lost, and the primary goes on without it.
//!
//! Owns: the call of the fence hook. Invariant: nothing counts as fencing but the hook's success and the flag that
//! says so: a member that runs may be promoted as one that holds everything.

use super::config;
use super::failure::Failure;
use super::fence::fence;
use super::output::{Output, confirm};
use super::places::Places;
use super::{remote, status};
use crate::control::{Reply, Verb};
use crate::node::status::{SCHEMA_VERSION, Status};
use serde_json::{Value, json};

/// Go on without a member of the sync set that is lost
///
/// Run it on the primary. FLUSH does not wait for the member any more, once that is durable; the member is marked as
/// outdated, learns it when it is back, and is a member again by itself once it has caught up.
#[derive(clap::Args, Clone, Debug)]
pub struct Outdate {
    /// The group's name
    #[arg(value_name = "NAME")]
    group: String,
    /// The member that is lost
    #[arg(long, value_name = "NODE")]
    member: String,
    /// Only say what would happen
    #[arg(long)]
    dry_run: bool,
    /// Your word that the member's daemon is stopped; nothing else stands for it
    #[arg(long)]
    i_fenced_the_member: bool,
    /// Don't ask for the group's name
    #[arg(long)]
    yes: bool,
}

impl Outdate {
    /// Does it.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        let config = config::load(places, &self.group)?;
        let before = status::running(places, &self.group)?;
        let named = self.i_fenced_the_member;
        // With a hook the plan is that for a fenced member: the hook runs only after the plan is confirmed.
        let plan = self.ask(places, named || config.fence_hook.is_some(), true)?;
        let hook = config.fence_hook.as_ref().filter(|_| !named);
        if self.dry_run {
            if let Some(hook) = hook {
                eprintln!("volrep: would call {} first, and go on only if it succeeds", hook.display());
            }
            out.document(&self.document(&before, &plan), || plan.clone());
            return Ok(());
        }
        eprintln!("{plan}");
        confirm(&self.group, &format!("go on without {}", self.member), self.yes)?;
        let fenced = match hook {
            Some(hook) => fence(hook, &self.member, before.term, "--i-fenced-the-member").map(|()| true)?,
            None => named,
        };
        let done = self.ask(places, fenced, false)?;
        out.document(&self.document(&before, &done), || done.clone());
        Ok(())
    }

    fn ask(&self, places: &Places, fenced: bool, dry_run: bool) -> Result<String, Failure> {
        let verb = Verb::Outdate { member: self.member.clone(), fenced, dry_run };
        match remote::ask(places, &self.group, verb, None)? {
            Reply::Done { text } => Ok(text),
            _ => Err(remote::odd(&self.group)),
        }
    }

    fn document(&self, before: &Status, text: &str) -> Value {
        json!({
            "schema_version": SCHEMA_VERSION,
            "group": self.group,
            "node": before.node,
            "member": self.member,
            "dry_run": self.dry_run,
            "text": text,
        })
    }
}
