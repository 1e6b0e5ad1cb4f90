//! A failing run made smaller: without the faults and the parts of its plan that do not matter.
//!
//! Owns: what is left out of a plan, and how that is written in one word of a command line. Invariant: a run
//! that was made smaller breaks the same promise as the whole one did.

use crate::plan::Plan;
use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

type Part = (&'static str, fn(&mut Plan));

/// What can be left out as a whole.
const PARTS: [Part; 14] = [
    ("ambush", |p| p.ambush = 0),
    ("role-ambush", |p| p.role_ambush = 0),
    ("slot-ambush", |p| p.slot_ambush = 0),
    ("start-ambush", |p| p.ambush_start = 0),
    ("promotion", |p| p.promotion = None),
    ("double", |p| p.double = false),
    ("rejoin", |p| p.rejoin = false),
    ("moves", |p| p.moves = false),
    ("reads", |p| p.mix.read = 0),
    ("zeroes", |p| p.mix.zero = 0),
    ("flushes", |p| p.mix.flush = 0),
    ("fua", |p| p.mix.fua = 0),
    ("depth", |p| p.mix.depth = 1),
    ("think", |p| p.mix.think = 0),
];

/// What is left out of a plan.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Cut {
    requests: Option<u64>,
    faults: BTreeSet<usize>,
    parts: BTreeSet<&'static str>,
}

impl Cut {
    /// Leaves it out.
    pub fn apply(&self, plan: &mut Plan) {
        if let Some(most) = self.requests {
            plan.mix.requests = plan.mix.requests.min(most);
        }
        let mut number = 0..;
        plan.faults.retain(|_| !number.next().is_some_and(|n| self.faults.contains(&n)));
        PARTS.iter().filter(|(name, _)| self.parts.contains(name)).for_each(|(_, part)| part(plan));
    }

    /// Reads what [`fmt::Display`] has written.
    pub fn parse(text: &str) -> Option<Cut> {
        let mut cut = Cut::default();
        for word in text.split(',').filter(|w| !w.is_empty()) {
            match word.split_once('=') {
                Some(("requests", n)) => cut.requests = Some(n.parse().ok()?),
                Some(("fault", n)) => cut.faults.extend([n.parse::<usize>().ok()?]),
                Some(_) => return None,
                None => cut.parts.extend([PARTS.iter().find(|(name, _)| *name == word)?.0]),
            }
        }
        Some(cut)
    }

    /// Nothing is left out.
    pub fn is_empty(&self) -> bool {
        *self == Cut::default()
    }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let requests = self.requests.map(|n| format!("requests={n}"));
        let faults = self.faults.iter().map(|n| format!("fault={n}"));
        let parts = self.parts.iter().map(|p| (*p).to_owned());
        let words: Vec<_> = requests.into_iter().chain(parts).chain(faults).collect();
        f.write_str(&words.join(","))
    }
}

/// The smallest cut found in so much time with which `fails` still holds. `requests` and `faults` of the plan.
pub fn minimise(requests: u64, faults: usize, limit: Duration, fails: impl Fn(&Cut) -> bool) -> Cut {
    let until = Instant::now() + limit;
    let mut best = Cut::default();
    let attempt = |best: &mut Cut, change: &dyn Fn(&mut Cut)| {
        let mut cut = best.clone();
        change(&mut cut);
        let better = cut != *best && Instant::now() < until && fails(&cut);
        if better {
            *best = cut;
        }
        better
    };
    loop {
        let before = best.clone();
        for (name, _) in PARTS {
            attempt(&mut best, &|c| c.parts.extend([name]));
        }
        let mut piece = faults.next_power_of_two();
        while piece > 0 {
            for first in (0..faults).step_by(piece) {
                attempt(&mut best, &|c| c.faults.extend(first..(first + piece).min(faults)));
            }
            piece /= 2;
        }
        let mut step = requests / 2;
        while step > 0 {
            let now = best.requests.unwrap_or(requests);
            let smaller = now > step && attempt(&mut best, &|c| c.requests = Some(now - step));
            if !smaller {
                step /= 2;
            }
        }
        if best == before || Instant::now() >= until {
            return best;
        }
    }
}

/// What does not matter is left out, what does stays, and the words come back.
pub fn check() {
    let fails = |c: &Cut| {
        let kept = !c.faults.contains(&3) && !c.faults.contains(&11) && !c.parts.contains("moves");
        kept && c.requests.is_none_or(|n| n >= 37)
    };
    let cut = minimise(400, 20, Duration::from_secs(60), fails);
    assert_eq!((cut.requests, cut.faults.len(), cut.parts.len()), (Some(37), 18, PARTS.len() - 1));
    assert!(fails(&cut));
    assert_eq!(Cut::parse(&cut.to_string()), Some(cut));
    assert_eq!(Cut::parse(""), Some(Cut::default()));
    for wrong in ["fault", "requests=x", "nothing", "fault=1;2"] {
        assert_eq!(Cut::parse(wrong), None, "{wrong}");
    }
}
