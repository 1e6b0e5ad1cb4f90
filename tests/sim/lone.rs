//! One shadow alone, and a primary of which every word is made here.
//!
//! Runs of a primary have drawn names, so nodes on models never meet with the same names and other contents; two machines that
//! were made from one copy may. Here a peer says whatever it likes of its history.
//!
//! Owns: the made primary. Invariant checked (I9): equal names of runs at an equal LSN are no evidence. A shadow goes on
//! from a point only if the chain hash there is its own one; otherwise it says that the histories differ, and nothing of it changes.
//! And (I5) a clock that was not told is nobody's.

use crate::prng::Prng;
use crate::world::{Host, World};
use std::collections::VecDeque;
use volrep::disk::{Token, aligned};
use volrep::format::message::{Cause, Identity, Message, Opening, Role, Standing, Verdict, proof};
use volrep::format::record::{self, Compressor, Content, EncodeJob, Encoded, Kind, Record, Stamp, flags};
use volrep::node::Node;
use volrep::node::event::{Action, Actions, AdminId, AdminOp, Answer, At, Event, LinkId, Promote, Refusal};
use volrep::node::status::Status;
use volrep::units::{Address, Extent, Generation, Hash, HistoryPoint, Lsn, MILLIS, NodeId, SECONDS, Term};

/// Records that the shadow gets first, and how many of them are in its image.
const ALL: u64 = 6;
const APPLIED: u64 = 3;

/// What came of a verdict.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Heard {
    /// It asks for the records from here on.
    Begin(u64),
    /// It names this common point for a resync.
    Since(Option<u64>),
    /// It says that the histories differ.
    Differs,
    /// It lets the connection go.
    Nothing,
}

struct Lone {
    world: World,
    node: Node,
    now: u64,
    wake: Option<u64>,
    link: u64,
    up: bool,
    dialling: bool,
    said: Vec<Message>,
    status: Option<Box<Status>>,
    /// What it answered to a command.
    told: Option<Result<String, (Refusal, String)>>,
    term: Term,
    /// The primary's history; its run began at the first point.
    records: Vec<Record>,
    /// Its clock is so far ahead of the shadow's, ns.
    ahead: i64,
    /// What the disk has begun and not done, if it takes its time.
    slow: Option<Vec<(u64, Token)>>,
}

impl Lone {
    /// A shadow that follows the made primary, has all its records, and may not apply the last ones.
    fn new() -> Lone {
        Lone::of(0, 0)
    }

    /// The same of a primary whose clock is so far ahead, and of a shadow that holds its image back for so long.
    fn of(ahead: i64, delay: u64) -> Lone {
        // While a word of the primary is not missing, no silence makes up for its clock.
        let mut plan = crate::sweep::plain_plan();
        plan.timing.heartbeat = 170 * MILLIS;
        let mut world = World::planned(plan, Prng::new(1), false);
        world.hosts[1].config.apply_delay = delay;
        let node = Node::new(world.hosts[1].config.clone(), world.hosts[1].memories());
        let term = Term { counter: 1, node: world.hosts[0].id };
        let mut lone = Lone {
            world,
            node,
            now: 0,
            wake: None,
            link: 0,
            up: false,
            dialling: false,
            said: Vec::new(),
            status: None,
            told: None,
            term,
            records: Vec::new(),
            ahead,
            slow: None,
        };
        let mut actions = Actions::default();
        lone.node.start(lone.host().now(0), &mut actions);
        lone.perform(actions);
        assert_eq!(lone.welcome(Verdict::Compare(lone.point(0))), Heard::Begin(1));
        for lsn in 1..=ALL {
            let record = lone.seal(lsn);
            lone.records.push(record.clone());
            lone.hear(Message::Record(record));
        }
        lone.rest(200 * MILLIS);
        let status = lone.ask();
        assert_eq!(
            (status.tail_lsn, status.durable_lsn, status.applied_lsn),
            (ALL, ALL, if delay > 0 { 0 } else { APPLIED })
        );
        lone
    }

    fn host(&self) -> &Host {
        &self.world.hosts[1]
    }

    fn run(&self) -> Generation {
        Generation { term: self.term, start: 1 }
    }

    fn seal(&self, lsn: u64) -> Record {
        let mut buf = aligned(record::room(1) + 4096);
        buf.resize(record::room(1) + 4096, lsn as u8);
        let extent = Extent::new(Address(0), 4096).expect("whole sectors");
        let job = EncodeJob { extents: vec![(extent, Content::Data)], buf, level: None };
        let writes = record::encode(job, &mut Compressor::default());
        self.seal_as(lsn, Kind::Writes, writes, APPLIED.min(lsn - 1))
    }

    fn seal_as(&self, lsn: u64, kind: Kind, encoded: Encoded, durable: u64) -> Record {
        let stamp = Stamp {
            group: self.host().config.group,
            generation: self.run(),
            lsn: Lsn(lsn),
            prev: self.point(lsn - 1).hash,
            time: self.wall(),
            flags: if lsn == 1 { flags::OPENS } else { 0 },
            last_write: lsn,
            durable: Lsn(durable),
            kind,
        };
        record::seal(encoded, stamp)
    }

    /// What the primary's clock says.
    fn wall(&self) -> u64 {
        self.host().now(self.now).wall.saturating_add_signed(self.ahead)
    }

    /// The primary says where it is; `echo`: it answers.
    fn beat(&mut self, echo: u64) {
        let applied = &self.records[APPLIED as usize];
        let (wall, tail, time) = (self.wall(), Some(Lsn(ALL)), applied.stamp.time);
        let (bytes, feeds, standing) = (applied.wire_len(), Vec::new(), Standing::None);
        let live = true;
        self.hear(Message::Heartbeat { wall, echo, tail, time, bytes, silent: 0, live, feeds, standing });
    }

    /// The lag that the shadow tells, ns.
    fn lag(&mut self) -> u64 {
        (self.ask().lag.expect("it has heard of its primary").seconds * SECONDS as f64) as u64
    }

    /// The point of the history that the shadow has.
    fn point(&self, lsn: u64) -> HistoryPoint {
        match lsn.checked_sub(1).and_then(|at| self.records.get(at as usize)) {
            Some(record) => record.point(),
            None => HistoryPoint { lsn: Lsn(0), hash: record::origin(self.host().config.group) },
        }
    }

    /// Of the same name, and of another history.
    fn other(&self, lsn: u64) -> HistoryPoint {
        HistoryPoint { hash: Hash([0xee; 32]), ..self.point(lsn) }
    }

    fn step(&mut self, event: Event) {
        let (now, mut actions) = (self.host().now(self.now), Actions::default());
        self.node.step(now, event, &mut actions);
        self.perform(actions);
    }

    /// Whatever is asked of the disk is done at once.
    fn perform(&mut self, actions: Actions) {
        let mut waiting = VecDeque::from([actions]);
        while let Some(actions) = waiting.pop_front() {
            self.wake = actions.wake;
            for action in actions.list {
                let answer = match action {
                    Action::Disk(request) => {
                        let (token, disk) = (request.token, &mut self.world.hosts[1].disk);
                        let ticket = disk.submit(request).expect("within the disk's rules");
                        if let Some(slow) = &mut self.slow {
                            slow.push((ticket, token));
                            continue;
                        }
                        Some(Event::Disk { token, result: disk.complete(ticket, None, &mut self.world.rng) })
                    }
                    Action::Send { link, message } => {
                        assert_eq!(link.0, self.link);
                        self.said.push(message);
                        None
                    }
                    Action::Close { link } => {
                        self.up = false;
                        Some(Event::LinkDown { link })
                    }
                    Action::Dial { peer: 0 } => {
                        self.dialling = true;
                        None
                    }
                    Action::Answer { answer: Answer::Status(status), .. } => {
                        self.status = Some(status);
                        None
                    }
                    Action::Answer { answer: Answer::Done(text), .. } => {
                        self.told = Some(Ok(text));
                        None
                    }
                    Action::Answer { answer: Answer::Refused(why, text), .. } => {
                        self.told = Some(Err((why, text)));
                        None
                    }
                    Action::Encode { token, job } => {
                        let encoded = record::encode(job, &mut Compressor::default());
                        Some(Event::Encoded { token, encoded })
                    }
                    Action::Log { .. } | Action::History(_) | Action::DropStage => None,
                    other => panic!("{other:?}"),
                };
                if let Some(event) = answer {
                    let (now, mut actions) = (self.host().now(self.now), Actions::default());
                    self.node.step(now, event, &mut actions);
                    waiting.push_back(actions);
                }
            }
        }
    }

    fn hear(&mut self, message: Message) {
        self.step(Event::Message { link: LinkId(self.link), message });
    }

    /// Time goes on.
    fn rest(&mut self, ns: u64) {
        let (end, base) = (self.now + ns, self.host().now(0).mono);
        while let Some(at) = self.wake.map(|mono| mono.saturating_sub(base)).filter(|at| *at <= end) {
            self.now = at.max(self.now + 1);
            self.step(Event::Wake);
        }
        self.now = end;
    }

    /// What the disk had begun when the next record came is done after that: something is always on its way.
    fn load(&mut self) {
        let begun = std::mem::take(self.slow.as_mut().expect("a slow disk"));
        let lsn = self.records.len() as u64 + 1;
        let record = self.seal(lsn);
        self.records.push(record.clone());
        self.hear(Message::Record(record));
        self.hear(Message::Durable { lsn: Lsn(lsn) });
        for (ticket, token) in begun {
            let result = self.world.hosts[1].disk.complete(ticket, None, &mut self.world.rng);
            self.step(Event::Disk { token, result });
        }
        self.rest(MILLIS);
    }

    fn ask(&mut self) -> Box<Status> {
        self.step(Event::Admin { id: AdminId(1), op: AdminOp::Status });
        self.status.take().expect("it is answered at once")
    }

    fn command(&mut self, op: AdminOp) -> Result<String, (Refusal, String)> {
        self.step(Event::Admin { id: AdminId(2), op });
        for _ in 0..100 {
            if let Some(told) = self.told.take() {
                return told;
            }
            self.rest(10 * MILLIS);
        }
        panic!("no answer");
    }

    /// The primary as it says it is: its names and its end are those of the history that the shadow has.
    fn identity(&self) -> Identity {
        let config = &self.host().config;
        Identity {
            group: config.group,
            node: self.term.node,
            name: "alpha".to_owned(),
            role: Role::Primary,
            term: self.term,
            volumes: config.volumes.iter().map(|v| (v.number, v.size)).collect(),
            blank: true,
            tail: self.point(self.records.len() as u64),
            tail_generation: self.run(),
            oldest: self.point(0),
            applied: Lsn(0),
            openings: vec![Opening { generation: self.run(), at: self.point(0) }],
            resyncing: false,
            rewinds: false,
            apply_delay: 0,
            cascades: false,
            sources: Vec::new(),
            primary: "alpha".to_owned(),
        }
    }

    /// The shadow dials, says who it is, and is told this.
    fn welcome(&mut self, verdict: Verdict) -> Heard {
        if std::mem::take(&mut self.up) {
            self.step(Event::LinkDown { link: LinkId(self.link) });
        }
        while !std::mem::take(&mut self.dialling) {
            assert!(self.now < 60 * SECONDS, "it never dials again");
            self.rest(10 * MILLIS);
        }
        (self.link, self.up) = (self.link + 1, true);
        self.said.clear();
        let nonce = [self.link as u8; 32];
        self.step(Event::LinkUp { link: LinkId(self.link), dialed: Some(0), nonce });
        self.hear(Message::Challenge { nonce: [9; 32] });
        let Some(Message::Hello { identity, nonce, .. }) = self.said.pop() else {
            panic!("no word of who it is: {:?}", self.said)
        };
        let end = (self.records.len() as u64, self.point(self.records.len() as u64));
        assert_eq!((identity.tail.lsn.0, identity.tail), end, "its journal is as it was");
        let identity = Box::new(self.identity());
        let proof = proof(&self.host().config.key, &nonce, &identity, Some(&verdict));
        self.hear(Message::Welcome { identity, verdict, proof });
        self.rest(100 * MILLIS);
        let heard = self.said.iter().find_map(|m| match m {
            Message::Begin { from } => Some(Heard::Begin(from.0)),
            Message::Resync { since } => Some(Heard::Since(since.map(|p| p.lsn.0))),
            Message::Refuse { text } if text.contains("histories differ") => Some(Heard::Differs),
            _ => None,
        });
        heard.unwrap_or(Heard::Nothing)
    }

    /// It was told of a history with the same names and other contents.
    fn has_parted(&mut self, verdict: Verdict) {
        assert_eq!(self.welcome(verdict.clone()), Heard::Differs, "{verdict:?}");
        let status = self.ask();
        assert_eq!(status.state, "Diverged", "{verdict:?}");
        assert_eq!((status.tail_lsn, status.applied_lsn), (ALL, APPLIED), "{verdict:?}");
        // And it is where it was, for the primary that it has followed.
        assert_eq!(self.welcome(Verdict::Compare(self.point(ALL))), Heard::Begin(ALL + 1));
    }
}

/// Every place in the shadow's journal, with its own hash and with another one.
pub fn check() {
    for lsn in 0..=ALL {
        let mut lone = Lone::new();
        let (own, other) = (lone.point(lsn), lone.other(lsn));
        lone.has_parted(Verdict::Compare(other));
        // What is in the image is never cut off.
        if lsn < APPLIED {
            lone.has_parted(Verdict::Compare(own));
        } else {
            assert_eq!(lone.welcome(Verdict::Compare(own)), Heard::Begin(lsn + 1));
            assert_eq!(lone.ask().tail_lsn, lsn);
        }
    }
    let mut lone = Lone::new();
    let beyond = HistoryPoint { lsn: Lsn(ALL + 1), ..lone.point(ALL) };
    assert_eq!(lone.welcome(Verdict::Compare(beyond)), Heard::Nothing);
    resyncs();
    lags();
    a_member_that_was_never_met_is_named_by_its_id();
    a_record_is_found_however_busy_the_journal_is();
}

/// A view of a time is a view of what there was when it was asked for: records that come later don't put it off.
fn a_record_is_found_however_busy_the_journal_is() {
    let mut lone = Lone::of(0, 3600 * SECONDS);
    lone.slow = Some(Vec::new());
    (0..10).for_each(|_| lone.load());
    let (at, asked) = (Some(At::Time(lone.wall())), lone.records.len() as u64);
    lone.step(Event::Admin { id: AdminId(2), op: AdminOp::View { scratch: false, at } });
    let answer = (0..50).find_map(|_| {
        lone.load();
        lone.told.take()
    });
    answer.expect("within fifty records").expect("there is a record of that time");
    assert_eq!(lone.ask().view.expect("it is open").lsn, Some(asked));
}

/// A promoted node goes on without a member of the sync set that it has never met, whatever that is called.
fn a_member_that_was_never_met_is_named_by_its_id() {
    let mut lone = Lone::new();
    let (own, other) = (lone.host().id, NodeId(0x77));
    let members = [own, other].iter().flat_map(|n| n.0.to_le_bytes()).collect::<Vec<_>>();
    let record = lone.seal_as(ALL + 1, Kind::SyncSet, record::encode_note(&members), ALL);
    lone.records.push(record.clone());
    lone.hear(Message::Record(record));
    lone.hear(Message::Durable { lsn: Lsn(ALL + 1) });
    lone.rest(200 * MILLIS);
    lone.step(Event::LinkDown { link: LinkId(lone.link) });
    lone.command(AdminOp::Promote(Promote { fenced: true, ..Promote::default() })).expect("it is promoted");
    lone.rest(SECONDS);
    let id = format!("{other:?}");
    assert_eq!(lone.ask().sync_set, std::slice::from_ref(&id));
    let mut outdate = |member: &str| {
        let (member, fenced, dry_run) = (member.to_owned(), true, false);
        lone.command(AdminOp::Outdate { member, fenced, dry_run })
    };
    for (name, told) in [("alpha", "not in the sync set"), ("gamma", &*id)] {
        let (_, text) = outdate(name).expect_err("it is no member's name");
        assert!(text.contains(told), "{name}: {text}");
    }
    outdate(&id).expect("it goes on without that one");
    assert!(outdate(&id).expect("once more").contains("already"));
    assert_eq!(lone.ask().ack_level, "local");
}

/// A resync goes from the newest point that has the same hash on both sides, and is in the image.
fn resyncs() {
    let offers: [(&[u64], &[u64], Option<u64>); 4] = [
        (&[1, 2, 5], &[], Some(2)),
        (&[1], &[2, 3], Some(1)),
        (&[], &[1, 2, 3], None),
        (&[4, 5, 6], &[], None),
    ];
    for (same, different, common) in offers {
        let mut lone = Lone::new();
        let mut points: Vec<_> = same.iter().map(|lsn| lone.point(*lsn)).collect();
        points.extend(different.iter().map(|lsn| lone.other(*lsn)));
        points.sort_by_key(|p| p.lsn);
        let verdict = Verdict::Resync { cause: Cause::Behind, oldest: Lsn(ALL + 9), points };
        assert_eq!(lone.welcome(verdict), Heard::Since(common), "{same:?} {different:?}");
    }
}

/// Records that the shadow lacks since it began, by a clock of which it was told nothing yet; and once it was.
fn lags() {
    for hours in [-2, 0, 2] {
        let mut lone = Lone::of(hours * 3600 * SECONDS as i64, 0);
        let sealed = lone.records[APPLIED as usize].stamp.time.saturating_add_signed(-lone.ahead);
        lone.beat(0);
        lone.rest(20 * MILLIS);
        let late = |lone: &Lone| lone.host().now(lone.now).wall - sealed;
        assert!(lone.lag() >= late(&lone), "{hours} h ahead, {} of {}", lone.lag(), late(&lone));
        let asked = |lone: &Lone| {
            let beats = lone.said.iter().filter_map(|m| match m {
                Message::Heartbeat { wall, echo: 0, .. } => Some(*wall),
                _ => None,
            });
            beats.last().expect("it asks what time it is")
        };
        let before = asked(&lone);
        for _ in 0..20 {
            lone.rest(10 * MILLIS);
            if asked(&lone) != before {
                break;
            }
        }
        // It is answered at once.
        lone.beat(asked(&lone));
        let (told, late) = (lone.lag(), late(&lone));
        assert!((late..=late + 100 * MILLIS).contains(&told), "{hours} h ahead, {told} of {late}");
    }
}
