//! `volrep switchover`: moves the primary to a shadow that has everything.
//!
//! Owns: the order of the steps on this side. Invariant: whatever step fails, what was done before it is undone:
//! the volumes are attached again and the database is started.

use super::config::{self, Config};
use super::failure::Failure;
use super::hooks::Hook;
use super::output::{Output, confirm};
use super::places::Places;
use super::{interrupt, remote, status};
use crate::control::{DeviceKind, Reply, Verb};
use crate::node::status::{SCHEMA_VERSION, Status};
use serde_json::json;
use std::time::Instant;

/// Move the primary to a shadow that has everything; nothing is lost
#[derive(clap::Args, Clone, Debug)]
pub struct Switchover {
    /// The group's name
    #[arg(value_name = "NAME")]
    group: String,
    /// The shadow that becomes the primary
    #[arg(long, value_name = "NODE")]
    to: String,
    /// Only say what would happen
    #[arg(long)]
    dry_run: bool,
    /// Don't ask for the group's name
    #[arg(long)]
    yes: bool,
}

impl Switchover {
    /// Does it, on the primary.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        let config = config::load(places, &self.group)?;
        let before = status::running(places, &self.group)?;
        let plan = self.ask(places, true)?;
        let devices: Vec<String> = before.volumes.iter().filter_map(|v| v.device.clone()).collect();
        for line in self.steps(&config, &devices) {
            eprintln!("volrep: {line}");
        }
        if self.dry_run {
            out.document(&self.document(&before, &plan, None), || plan.clone());
            return Ok(());
        }
        eprintln!("{plan}");
        confirm(&self.group, &format!("make {} the primary", self.to), self.yes)?;
        // What was begun is carried on or undone; only a second signal ends it between.
        interrupt::watch(|| {})?;
        let begun = Instant::now();
        let kind = self.kind(places, &devices)?;
        let done = self.hand_over(places, &config, &devices).map_err(|failure| {
            match self.restore(places, &config, &before, kind) {
                Ok(()) => failure,
                Err(also) => failure.and(&also),
            }
        })?;
        let seconds = begun.elapsed().as_secs_f64();
        out.document(&self.document(&before, &done, Some(seconds)), || {
            format!("{done} ({seconds:.1} s without a primary)")
        });
        Ok(())
    }

    /// What is done here before the place is handed over.
    fn steps(&self, config: &Config, devices: &[String]) -> Vec<String> {
        let script = config.hooks.path(Hook::Stop).filter(|_| !devices.is_empty());
        let stop = script.map(|p| format!("first: {} stop {}", p.display(), self.group));
        let away = (!devices.is_empty()).then(|| format!("then: take away {}", devices.join(" ")));
        stop.into_iter().chain(away).collect()
    }

    fn hand_over(&self, places: &Places, config: &Config, devices: &[String]) -> Result<String, Failure> {
        if !devices.is_empty() {
            config.hooks.call(Hook::Stop, &self.group, devices)?;
            remote::ask(places, &self.group, Verb::Detach, None)?;
        }
        self.ask(places, false)
    }

    fn ask(&self, places: &Places, dry_run: bool) -> Result<String, Failure> {
        match remote::ask(places, &self.group, Verb::Switchover { to: self.to.clone(), dry_run }, None)? {
            Reply::Done { text } => Ok(text),
            _ => Err(remote::odd(&self.group)),
        }
    }

    /// How the volumes are attached.
    fn kind(&self, places: &Places, devices: &[String]) -> Result<Option<DeviceKind>, Failure> {
        if devices.is_empty() {
            return Ok(None);
        }
        match remote::ask(places, &self.group, Verb::Attach { device: DeviceKind::Auto }, None)? {
            Reply::Attached { device, .. } => Ok(Some(device)),
            _ => Err(remote::odd(&self.group)),
        }
    }

    /// Back to what it was. A daemon that has given its place away and taken it back does that itself.
    fn restore(
        &self,
        places: &Places,
        config: &Config,
        before: &Status,
        kind: Option<DeviceKind>,
    ) -> Result<(), Failure> {
        let now = status::obtain(places, &self.group)?;
        let Some(device) = kind else { return Ok(()) };
        if now.role != "primary" || now.term != before.term {
            eprintln!(
                "volrep: {} is {} {} now: its volumes are not attached by this command, nor is the database started",
                now.node, now.role, now.state
            );
            return Ok(());
        }
        eprintln!("volrep: rolling back: the volumes are attached again");
        match remote::ask(places, &self.group, Verb::Attach { device }, None)? {
            Reply::Attached { volumes, .. } => {
                let devices: Vec<String> = volumes.into_iter().map(|v| v.device).collect();
                config.hooks.call(Hook::Start, &self.group, &devices)
            }
            _ => Err(remote::odd(&self.group)),
        }
    }

    fn document(&self, before: &Status, text: &str, seconds: Option<f64>) -> serde_json::Value {
        json!({
            "schema_version": SCHEMA_VERSION,
            "group": self.group,
            "node": before.node,
            "to": self.to,
            "dry_run": self.dry_run,
            "seconds": seconds,
            "text": text,
        })
    }
}
