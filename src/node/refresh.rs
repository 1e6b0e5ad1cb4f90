//! Comparisons that administrators ask for, on either side.
//!
//! Owns: who asked, and what is told to whom. Invariant: the shadow runs the job; a primary only hands the
//! wish over and repeats what the shadow says of it.

use super::compare::Side;
use super::event::{AdminId, Level, LinkId, Refresh, Refusal};
use super::job::Job;
use super::links::{Link, LinkState, PeerView};
use super::run::{Part, Run};
use super::status::RefreshStatus;
use crate::format::compare::Compare;
use crate::format::superblock::Verified;
use crate::resync::plan::Plan;
use crate::units::{Extent, Lsn};

fn is_fed(l: &Link) -> bool {
    matches!(l.state, LinkState::Sending(_))
}

/// What a comparison does to a delay.
const EMPTIES: &str = "the shadow holds its image back (apply_delay), and a comparison needs it near the primary's: its \
                       window would be empty afterwards. If that is acceptable, pass --suspend-delay";

impl Run {
    /// An administrator asks for a comparison.
    pub(super) fn refresh(&mut self, id: AdminId, wish: Refresh) {
        match self.part {
            Part::Primary(_) => self.refresh_there(id, &wish),
            Part::Shadow(_) if wish.peer.is_some() => self.refresh_there(id, &wish),
            Part::Shadow(_) => {
                let begun = self.begin_refresh(&wish);
                self.answer(id, begun);
            }
        }
    }

    /// Hands the wish to the shadow that is meant.
    fn refresh_there(&mut self, id: AdminId, wish: &Refresh) {
        let name = |l: &Link| l.peer().and_then(|n| self.links.view(n)).map(|v| v.name.clone());
        let fed = self.links.by_id.iter().filter(|(_, l)| is_fed(l));
        let mut fed: Vec<(LinkId, String)> = fed.map(|(id, l)| (*id, name(l).unwrap_or_default())).collect();
        if let Some(peer) = &wish.peer {
            fed.retain(|(_, name)| name == peer);
        }
        let link = match &fed[..] {
            [(link, _)] => *link,
            [] => {
                if let Some(refused) = self.apart(wish.peer.as_deref()) {
                    return self.answer(id, Err(refused));
                }
                let who = wish.peer.as_deref().unwrap_or("a shadow");
                let text = format!("{who} is not connected: bring it or its link back, then try again");
                return self.answer(id, Err((Refusal::Unreachable, text)));
            }
            several => {
                let names: Vec<_> = several.iter().map(|(_, n)| n.as_str()).collect();
                let text = format!("there are several shadows: name one with --peer ({})", names.join(", "));
                return self.answer(id, Err((Refusal::Busy, text)));
            }
        };
        if self.compare.asked.is_some() {
            return self.answer(id, Err((Refusal::Busy, "it is being asked for already".into())));
        }
        if matches!(self.part, Part::Shadow(_)) && self.cfg.apply_delay > 0 {
            if !wish.suspend_delay {
                return self.answer(id, Err((Refusal::Busy, EMPTIES.into())));
            }
            self.compare.lent = Some(link);
        }
        self.compare.asked = Some((id, link));
        let Refresh { quick, verify, rate, in_place, suspend_delay, .. } = *wish;
        self.say(link, Compare::Begin { quick, verify, rate, in_place, suspend_delay });
    }

    /// An administrator wants the job to end.
    pub(super) fn refresh_stop(&mut self, id: AdminId) {
        let here = self.running_job().is_some();
        let told_of = self.compare.told.is_some();
        if matches!(self.part, Part::Primary(_)) || (!here && told_of) {
            let running = |s: &RefreshStatus| matches!(s.state.as_str(), "Running" | "Waiting");
            let named = self.compare.told.as_ref().filter(|s| running(s)).map(|s| s.shadow.clone());
            let link = named.and_then(|name| {
                let view = self.links.peers.iter().find(|p| p.name == name)?;
                self.links.by_id.iter().find(|(_, l)| is_fed(l) && l.peer() == view.node).map(|(id, _)| *id)
            });
            return match link {
                Some(link) => {
                    self.say(link, Compare::Stop);
                    self.answer(id, Ok("the shadow was told to stop".into()));
                }
                None => self.answer(id, Err((Refusal::Busy, "no comparison is under way".into()))),
            };
        }
        if !here {
            return self.answer(id, Err((Refusal::Busy, "no comparison is under way".into())));
        }
        self.end_job("Stopped", Some("an administrator stopped it".into()));
        self.answer(id, Ok("stopped; what was repaired stays".into()));
    }

    /// The histories have parted, so a comparison would say nothing: whose, and what to do.
    fn apart(&self, peer: Option<&str>) -> Option<(Refusal, String)> {
        let meant = |name: &str| peer.is_none_or(|p| p == name);
        let asked = |v: &&PeerView| peer.is_some() || !v.follows;
        let views = self.links.peers.iter().filter(asked);
        let diverged = views.into_iter().find(|v| v.state == "Diverged" && meant(&v.name));
        let what = match diverged {
            Some(v) => format!("the histories of {} and this node have parted", v.name),
            None if self.is_retired() => self.promoted_since(),
            None => return None,
        };
        let group = &self.cfg.group_name;
        Some((Refusal::Diverged, format!("{what}: `volrep status {group}` tells what to do")))
    }

    /// Begins a job here.
    fn begin_refresh(&mut self, wish: &Refresh) -> Result<String, (Refusal, String)> {
        if self.is_viewed() {
            let text = "a view holds the image there: close it first (volrep view";
            return Err((Refusal::Busy, format!("{text} {} --close)", self.cfg.group_name)));
        }
        if self.resume_resync(wish.in_place) {
            return Ok("the resync begins again".into());
        }
        if self.is_remaking() {
            return Err((Refusal::Busy, "a resync is under way: it ends with an equal image".into()));
        }
        if let Some(refused) = self.apart(None).filter(|_| self.links.receiving().is_none()) {
            return Err(refused);
        }
        if self.links.receiving().is_none() {
            let text = "the primary is not connected: bring it or its link back, then try again";
            return Err((Refusal::Unreachable, text.into()));
        }
        if let Some(running) = self.running_job() {
            let text = format!("a {} is under way already; `--stop` ends it", running.status.cause);
            return Err((Refusal::Busy, text));
        }
        if self.cfg.apply_delay > 0 && !wish.suspend_delay {
            return Err((Refusal::Busy, EMPTIES.into()));
        }
        if self.is_compared_with() {
            let text = "a shadow that follows this one is being compared with it: wait for its end";
            return Err((Refusal::Busy, text.into()));
        }
        let cause = if wish.verify { "verify" } else { "refresh" };
        let plan = Plan::new(self.volume_sizes(), None, 0);
        self.begin_job(wish, cause, plan, false);
        Ok(format!("the {cause} has begun"))
    }

    /// Compares for a resync: what differs becomes the new image.
    pub(super) fn begin_resync_job(
        &mut self,
        cause: &'static str,
        candidates: Option<Vec<Extent>>,
        from: u64,
    ) {
        self.job_failed("a resync takes its place");
        let plan = Plan::new(self.volume_sizes(), candidates, from);
        self.begin_job(&Refresh::default(), cause, plan, true);
    }

    /// Whether a job of that cause runs, or waits for its link.
    pub(super) fn is_comparing(&self, cause: &str) -> bool {
        self.compare.job.as_ref().is_some_and(|j| j.is_running() && j.status.cause == cause)
    }

    /// A word of the comparison came over the link that brings records.
    pub(super) fn heard_as_shadow(&mut self, link: LinkId, word: Compare) {
        self.compare.count_wire(&word);
        match word {
            Compare::Begin { quick, verify, rate, in_place, suspend_delay } => {
                let wish = Refresh { peer: None, quick, verify, rate, in_place, suspend_delay };
                if let Err((_, text)) = self.begin_refresh(&wish) {
                    self.say(link, Compare::Fail { text });
                }
            }
            Compare::Stop => {
                if self.running_job().is_some() {
                    self.end_job("Stopped", Some("an administrator stopped it on the primary".into()));
                }
            }
            Compare::Fail { text } => self.job_failed(&text),
            word => {
                let mut out = Vec::new();
                let Some((serial, target)) = self.compare.job.as_mut().and_then(Job::comparing) else {
                    return; // the rest of what was asked for by a job that has ended
                };
                match target.heard(word, &mut out) {
                    Ok(()) => self.do_tasks(Side::Target, serial, out),
                    Err(why) => self.distrust(why),
                }
            }
        }
    }

    /// A shadow told how its job stands, or why there is none.
    pub(super) fn job_reported(&mut self, link: LinkId, json: &[u8]) {
        let Ok(status) = serde_json::from_slice::<RefreshStatus>(json) else {
            return self.drop_link(link, "its report can't be read");
        };
        if let Some((id, _)) = self.compare.asked.take_if(|(_, asked)| *asked == link) {
            self.answer(id, Ok(format!("the {} has begun on {}", status.cause, status.shadow)));
        }
        let news =
            self.compare.told.as_ref().is_none_or(|t| (t.job, &t.state) != (status.job, &status.state));
        if let (true, "Done", Some(lsn)) = (news, status.state.as_str(), status.lsn) {
            self.proved(link, Verified { time: self.now.wall, lsn: Lsn(lsn), differences: status.differ });
            let text = format!("{}: identical at LSN {lsn}, {} bytes differed", status.shadow, status.differ);
            self.log(Level::Info, text);
        }
        if !matches!(status.state.as_str(), "Running" | "Waiting") {
            self.compare.lent.take_if(|lent| *lent == link);
        }
        self.compare.told = Some(status);
    }

    /// A shadow has proved its image equal.
    fn proved(&mut self, link: LinkId, proof: Verified) {
        let node = self.links.by_id.get(&link).and_then(Link::peer);
        if let Some(known) = self.meta.sb.peers.iter_mut().find(|k| Some(k.node) == node) {
            known.verified = Some(proof);
            self.meta.save(false);
        }
    }

    /// The shadow can't do what it was asked for.
    pub(super) fn job_refused(&mut self, link: LinkId, text: String) {
        self.compare.lent.take_if(|lent| *lent == link);
        if let Some((id, _)) = self.compare.asked.take_if(|(_, asked)| *asked == link) {
            self.answer(id, Err((Refusal::Busy, text)));
        }
    }

    /// Answers whoever asked for a comparison when the link to its shadow is gone. Whether anything moved.
    pub(super) fn pump_refresh(&mut self) -> bool {
        self.compare.lent.take_if(|lent| !self.links.by_id.get(lent).is_some_and(is_fed));
        if let Some((id, link)) = self.compare.asked
            && !self.links.by_id.get(&link).is_some_and(is_fed)
        {
            self.compare.asked = None;
            self.answer(id, Err((Refusal::Unreachable, "the link to the shadow went down".into())));
        }
        self.open_early() | self.confirm_closed() | self.pump_job()
    }
}
