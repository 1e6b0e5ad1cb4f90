//! A cluster manager's lease: without its word this primary stops by itself.
//!
//! Owns: until when it may serve. Invariant (I8): once the lease has run out nothing is acknowledged any more, whatever
//! else was on its way, also by a primary that has handed its place over and takes it back: devices give errors, until the
//! daemon is started anew.

use super::event::{AdminId, Level, Refusal};
use super::run::{Part, Run};
use crate::units::{MILLIS, SECONDS};

impl Run {
    /// The cluster manager gives the lease for so many ns from now, or takes the need for one away.
    pub(super) fn lease(&mut self, id: AdminId, ns: Option<u64>) {
        if !matches!(self.part, Part::Primary(_)) || self.is_retiring() {
            let text = "this node is not a primary: it needs no lease";
            return self.answer(id, Err((Refusal::Busy, text.into())));
        }
        if self.lease.is_none() && ns.is_some() {
            self.log(Level::Info, "this primary serves as long as the cluster manager renews its lease");
        }
        self.lease = ns.map(|ns| self.now.mono.saturating_add(ns));
        let text = match ns {
            Some(ns) => format!("the lease ends in {} ms, unless it is renewed", ns / MILLIS),
            None => "no lease is needed".into(),
        };
        self.answer(id, Ok(text));
        self.end_lease();
    }

    /// Before anything else is done: it may have run out.
    pub(super) fn end_lease(&mut self) {
        let Some(until) = self.leased() else { return };
        if self.now.mono < until {
            return;
        }
        let late = (self.now.mono - until) / SECONDS;
        self.fail(format!(
            "the cluster manager's lease has run out ({late} s ago): another node may be promoted. Nothing is acknowledged any \
             more; once the cluster has decided who is the primary, restart the daemon"
        ));
    }

    /// It is looked at again when it ends.
    pub(super) fn await_lease(&mut self) {
        if let Some(until) = self.leased() {
            self.wake_at(until);
        }
    }

    /// Until when this node may serve, while it does.
    fn leased(&self) -> Option<u64> {
        self.lease.filter(|_| self.fault.is_none() && matches!(self.part, Part::Primary(_)))
    }
}
