//! What has befallen this node: the events that are kept beside its journal for people and tools.
//!
//! Owns: their vocabulary, and which marks are still true. Invariant: a mark is believed only while nothing tells
//! that the history above it was given up; whatever gives it up is told before it is done.

use super::event::Action;
use super::marks::Mark;
use super::run::Run;
use super::status::{MarkStatus, rfc3339};
use crate::units::{Generation, Lsn, NodeId};
use serde::{Deserialize, Serialize};

/// Something that happened.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct HistoryEvent {
    /// When, by this node's clock, RFC 3339.
    pub at: String,
    /// The highest term that the node knew.
    pub term: u64,
    /// The newest record in its journal.
    pub lsn: u64,
    /// What.
    #[serde(flatten)]
    pub what: Happening,
}

/// What happened.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Happening {
    /// The node has recovered its journal.
    Started {
        /// "primary" or "shadow".
        role: String,
    },
    /// A run of a primary began, here or on the primary that is followed.
    Generation {
        /// The primary's name.
        primary: String,
        /// Which run under its term.
        start: u32,
        /// The last record before it.
        after: u64,
    },
    /// Another term is followed.
    Term {
        /// Its primary's name.
        primary: String,
    },
    /// This node was promoted.
    Promoted {
        /// It was cut back to this record first.
        cut: Option<u64>,
    },
    /// This node was the primary, and another one was promoted.
    Superseded {
        /// That one's name.
        by: String,
    },
    /// It has become a shadow.
    Retired,
    /// A member of the sync set was lost, and is not waited for: a peer's, or this node's own name.
    Outdated {
        /// Its name.
        peer: String,
    },
    /// A shadow is a member of the sync set: a peer, or this node, which was outdated.
    TakenIn {
        /// Its name.
        peer: String,
    },
    /// An administrator gives up what only this node holds.
    Rejoining,
    /// What only this node held was saved.
    Salvaged {
        /// Where.
        path: String,
        /// Records.
        records: u64,
    },
    /// Its history and a peer's differ.
    Diverged {
        /// The peer's name.
        peer: String,
        /// What is known of it.
        reason: String,
    },
    /// A resync began.
    Resync {
        /// Why.
        cause: String,
    },
    /// It stopped.
    ResyncStopped {
        /// Why.
        reason: String,
    },
    /// The image is that of the primary's history again.
    ResyncDone,
    /// A comparison ended.
    Compared {
        /// "refresh", "verify", "first copy" or "resync".
        cause: String,
        /// "Done", "Stopped" or "Failed".
        outcome: String,
        /// Bytes compared.
        compared: u64,
        /// Bytes that differed.
        differ: u64,
        /// Bytes repaired.
        repaired: u64,
        /// At which record it was identical.
        identical_at: Option<u64>,
        /// Why it stopped or failed.
        reason: Option<String>,
    },
    /// The delay of the image is another one than was configured, or again that.
    Delay {
        /// "Held", "Shortened" or "Suspended".
        state: String,
        /// Why.
        reason: Option<String>,
    },
    /// The records after this one are given up: no mark above it is true any more.
    GivenUp {
        /// That record.
        after: u64,
        /// Why.
        reason: String,
    },
    /// A mark is in the journal.
    Mark {
        /// It.
        mark: MarkStatus,
    },
}

impl Happening {
    /// In words.
    pub fn text(&self) -> String {
        match self {
            Happening::Started { role } => format!("started as {role}"),
            Happening::Generation { primary, start, after } => {
                format!("{primary} began to write, start {start} of the term, after LSN {after}")
            }
            Happening::Term { primary } => format!("the term of {primary} is followed"),
            Happening::Promoted { cut: Some(lsn) } => format!("promoted, cut back to LSN {lsn}"),
            Happening::Promoted { cut: None } => "promoted".into(),
            Happening::Superseded { by } => format!("{by} was promoted over this primary"),
            Happening::Retired => "became a shadow".into(),
            Happening::Outdated { peer } => {
                format!("{peer} was lost as a member of the sync set: outdated, FLUSH does not wait for it")
            }
            Happening::TakenIn { peer } => format!("{peer} is a member of the sync set: FLUSH waits for it"),
            Happening::Rejoining => "gives up what only it holds".into(),
            Happening::Salvaged { path, records } => format!("{records} records saved in {path}"),
            Happening::Diverged { peer, reason } => format!("diverged from {peer}: {reason}"),
            Happening::Resync { cause } => format!("resync: {cause}"),
            Happening::ResyncStopped { reason } => format!("the resync stopped: {reason}"),
            Happening::ResyncDone => "the resync is done".into(),
            Happening::Compared { cause, outcome, compared, differ, repaired, identical_at, reason } => {
                let end = match (identical_at, reason) {
                    (Some(lsn), _) => format!(", identical at LSN {lsn}"),
                    (None, Some(reason)) => format!(" ({reason})"),
                    (None, None) => String::new(),
                };
                let outcome = outcome.to_lowercase();
                format!(
                    "{cause} {outcome}: {compared} bytes compared, {differ} differed, {repaired} repaired{end}"
                )
            }
            Happening::Delay { state, reason } => {
                let why = reason.as_ref().map_or_else(String::new, |r| format!(": {r}"));
                format!("apply_delay {}{why}", state.to_lowercase())
            }
            Happening::GivenUp { after, reason } => {
                format!("the history after LSN {after} was given up: {reason}")
            }
            Happening::Mark { mark: m } => format!("mark at LSN {}: {}", m.lsn, m.text),
        }
    }
}

/// Marks that are remembered, at most; of the oldest half is forgotten then. The file holds fewer.
const MAX_MARKS: usize = 16 << 10;

/// The marks that are true after some events.
#[derive(Default)]
pub struct Standing {
    /// By number in the order of the events, oldest first.
    marks: Vec<(usize, u64, String)>,
    seen: usize,
}

impl Standing {
    /// After these.
    pub fn after(events: &[HistoryEvent]) -> Standing {
        let mut standing = Standing::default();
        for event in events {
            standing.note(event);
        }
        standing
    }

    /// The next event. `false`: it is a mark that is known already.
    pub fn note(&mut self, event: &HistoryEvent) -> bool {
        let number = self.seen;
        self.seen += 1;
        match &event.what {
            // A journal that ends before them does not hold them.
            Happening::Started { .. } => self.give_up(event.lsn),
            Happening::GivenUp { after, .. } => self.give_up(*after),
            Happening::Mark { mark: m } => {
                if self.marks.iter().any(|(_, lsn, hash)| (*lsn, hash) == (m.lsn, &m.hash)) {
                    return false;
                }
                // One history's marks rise: what was above this one was given up, though nobody could tell.
                self.give_up(m.lsn.saturating_sub(1));
                self.marks.push((number, m.lsn, m.hash.clone()));
                if self.marks.len() > MAX_MARKS {
                    self.marks.drain(..MAX_MARKS / 2);
                }
            }
            _ => {}
        }
        true
    }

    fn give_up(&mut self, after: u64) {
        self.marks.retain(|(_, lsn, _)| *lsn <= after);
    }

    /// Whether the event of this number is a mark that is true.
    pub fn is_true(&self, number: usize) -> bool {
        self.marks.iter().any(|(n, ..)| *n == number)
    }
}

/// The events that lines tell; what is torn or unknown is left out.
pub fn parse(lines: &str) -> Vec<HistoryEvent> {
    lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

impl Run {
    /// Tells what has happened.
    pub(super) fn tell(&mut self, what: Happening) {
        let (term, lsn) = (self.meta.sb.term.counter, self.journal.tail().point.lsn.0);
        let at = rfc3339(self.now.wall).unwrap_or_default();
        self.out.push(Action::History(HistoryEvent { at, term, lsn, what }));
    }

    pub(super) fn tell_mark(&mut self, mark: &Mark) {
        self.tell(Happening::Mark { mark: MarkStatus::from(mark) });
    }

    /// The records after this one are about to be given up.
    pub(super) fn tell_given_up(&mut self, after: Lsn, reason: &str) {
        self.tell(Happening::GivenUp { after: after.0, reason: reason.into() });
    }

    pub(super) fn tell_generation(&mut self, generation: Generation, after: Lsn) {
        let (primary, start) = (self.name_of(generation.term.node), generation.count());
        self.tell(Happening::Generation { primary, start, after: after.0 });
    }

    /// A node's name, as far as it is known here.
    pub(super) fn name_of(&self, node: NodeId) -> String {
        if node == self.cfg.node {
            return self.cfg.name.clone();
        }
        let known = self.primary_name_known().filter(|_| node == self.meta.sb.term.node);
        let met = self.links.view(node).map(|v| v.name.clone());
        met.or(known).unwrap_or_else(|| format!("{node:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(lsn: u64, what: Happening) -> HistoryEvent {
        HistoryEvent { at: "2026-01-02T03:04:05.678Z".into(), term: 3, lsn, what }
    }

    fn mark(lsn: u64, hash: &str) -> HistoryEvent {
        let (text, time) = ("m".into(), "2026-01-02T03:04:05.678Z".into());
        event(lsn, Happening::Mark { mark: MarkStatus { text, lsn, time, hash: hash.into() } })
    }

    fn standing(events: &[HistoryEvent]) -> Vec<usize> {
        let standing = Standing::after(events);
        (0..events.len()).filter(|n| standing.is_true(*n)).collect()
    }

    #[test]
    fn a_mark_above_what_was_given_up_is_not_believed() {
        let given_up = |after| event(20, Happening::GivenUp { after, reason: "x".into() });
        let started = |lsn| event(lsn, Happening::Started { role: "shadow".into() });
        assert_eq!(standing(&[mark(5, "a"), mark(9, "b")]), [0, 1]);
        assert_eq!(standing(&[mark(5, "a"), mark(9, "b"), given_up(8)]), [0]);
        assert_eq!(standing(&[mark(5, "a"), mark(9, "b"), given_up(9)]), [0, 1]);
        assert_eq!(standing(&[mark(5, "a"), started(4)]), [0; 0]);
        assert_eq!(
            standing(&[mark(5, "a"), given_up(4), mark(5, "a")]),
            [2],
            "it was found there all the same"
        );
        assert_eq!(standing(&[mark(5, "a"), mark(9, "b"), mark(7, "c")]), [0, 2], "another history");
        assert_eq!(standing(&[mark(5, "a"), mark(5, "a")]), [0], "told twice");
    }

    #[test]
    fn lines_stay_as_they_are() {
        let what = Happening::GivenUp { after: 7, reason: "cut".into() };
        let lines = [
            (
                mark(5, "ab"),
                r#"{"at":"2026-01-02T03:04:05.678Z","term":3,"lsn":5,"event":"mark","mark":{"text":"m","lsn":5,"time":"2026-01-02T03:04:05.678Z","hash":"ab"}}"#,
            ),
            (
                event(9, what),
                r#"{"at":"2026-01-02T03:04:05.678Z","term":3,"lsn":9,"event":"given_up","after":7,"reason":"cut"}"#,
            ),
            (
                event(9, Happening::Retired),
                r#"{"at":"2026-01-02T03:04:05.678Z","term":3,"lsn":9,"event":"retired"}"#,
            ),
        ];
        for (event, line) in lines {
            assert_eq!(serde_json::to_string(&event).unwrap(), line);
            assert_eq!(parse(line), [event]);
        }
        assert_eq!(parse("{\"at\":\"20\nnothing\n{\"event\":\"dance\"}\n"), []);
    }
}
