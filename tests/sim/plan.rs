//! What one seed does: geometry, timings, workload, and which faults strike when.
//!
//! Owns: the swarm: each seed has its own mix, most features off in most seeds, so that their
//! combinations are met. Invariant: a plan depends on its seed alone.

use crate::cascade::Topology;
use crate::prng::Prng;
use volrep::node::config::{FullPolicy, Timing};
use volrep::units::{MICROS, MILLIS, SECONDS};

/// A thing that goes wrong (or is done by hand) at some moment of the work.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Fault {
    /// kill -9 of the primary's daemon.
    KillPrimary,
    /// The primary's machine loses power.
    PowerPrimary,
    /// kill -9 of a shadow's daemon.
    KillShadow,
    /// A shadow's machine loses power.
    PowerShadow,
    /// kill -9 of every daemon.
    KillAll,
    /// All machines lose power at once.
    PowerAll,
    /// A clean stop and start of the primary.
    RestartPrimary,
    /// A clean stop and start of a shadow.
    RestartShadow,
    /// A connection breaks.
    Cut,
    /// One side of a connection goes and the other never hears of it.
    HalfOpen,
    /// Two nodes cannot reach each other for a while.
    Partition,
    /// A connection stands still for a while.
    Stall,
    /// A message is lost.
    DropMessage,
    /// A message comes twice.
    DuplicateMessage,
    /// A bit of a message turns.
    FlipBit,
    /// Dials fail for a while.
    DialFailure,
    /// A disk request of the primary fails.
    IoErrorPrimary,
    /// A disk request of a shadow fails.
    IoErrorShadow,
    /// A wall clock jumps.
    ClockJump,
    /// A node is woken without reason.
    SpuriousWake,
    /// A disk is slow for a while.
    SlowDisk,
    /// A shadow is down for a large part of the work.
    Away,
    /// A request to a shadow's stage fails, or there is no room for one.
    StageFull,
    /// A node restarts without its dirty maps.
    LostMaps,
    /// A node restarts without its hash index.
    LostIndex,
    /// A shadow's disk changes by itself.
    Rot,
    /// An administrator asks for a refresh.
    Refresh,
    /// For one with the hash index.
    Quick,
    /// For a comparison alone.
    Verify,
    /// For the end of the one under way.
    StopRefresh,
    /// He gives the old image of a shadow up, should it need a resync.
    InPlace,
    /// He moves the primary to another node.
    Switchover,
    /// Somebody opens a view of a shadow.
    View,
    /// Somebody closes it.
    ViewClose,
    /// An administrator marks the write order.
    Mark,
    /// A member of the sync set is lost, and the primary is told to go on without it.
    Outdate,
    /// A cluster manager gives the primary a lease, and does not renew it.
    Lease,
}

/// Every kind that any plan may have.
pub const FAULTS: [Fault; 35] = [
    Fault::KillPrimary,
    Fault::PowerPrimary,
    Fault::KillShadow,
    Fault::PowerShadow,
    Fault::KillAll,
    Fault::PowerAll,
    Fault::RestartPrimary,
    Fault::RestartShadow,
    Fault::Cut,
    Fault::HalfOpen,
    Fault::Partition,
    Fault::Stall,
    Fault::DropMessage,
    Fault::DuplicateMessage,
    Fault::FlipBit,
    Fault::DialFailure,
    Fault::IoErrorPrimary,
    Fault::IoErrorShadow,
    Fault::ClockJump,
    Fault::SpuriousWake,
    Fault::SlowDisk,
    Fault::Away,
    Fault::StageFull,
    Fault::LostMaps,
    Fault::LostIndex,
    Fault::Rot,
    Fault::Refresh,
    Fault::Quick,
    Fault::Verify,
    Fault::StopRefresh,
    Fault::InPlace,
    Fault::Switchover,
    Fault::View,
    Fault::ViewClose,
    Fault::Mark,
];

/// How the primary is lost before the promotion.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loss {
    /// It never comes back.
    Forever,
    /// Its process is killed; it is started again after the promotion.
    Kill,
    /// Its machine loses power; it is started again after the promotion.
    Power,
}

/// Chances, in thousandths, and sizes of requests.
#[derive(Clone, Debug)]
pub struct Mix {
    /// Requests outstanding at once.
    pub depth: u64,
    /// Requests in all.
    pub requests: u64,
    /// Largest write, sectors.
    pub largest: u64,
    /// Reads.
    pub read: u64,
    /// Flushes.
    pub flush: u64,
    /// Zeroings.
    pub zero: u64,
    /// Writes with FUA.
    pub fua: u64,
    /// Writes in the hot range.
    pub hot: u64,
    /// Writes that do not compress.
    pub rich: u64,
    /// Longest pause between requests, ns.
    pub think: u64,
}

/// What one seed does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Nodes; the first is the primary.
    pub nodes: usize,
    /// Number, bytes, block of each volume.
    pub volumes: Vec<(u8, u64, u64)>,
    /// Bytes of a journal segment.
    pub segment: u64,
    /// Segments.
    pub segments: u32,
    /// Bytes of the write cache.
    pub cache: u64,
    /// Compression.
    pub level: Option<i32>,
    /// When the journal is full.
    pub full: FullPolicy,
    /// Shadows that a FLUSH waits for, as bits by node.
    pub sync: u8,
    /// Intervals of the nodes.
    pub timing: Timing,
    /// See the node's configuration.
    pub feed: u64,
    /// See the node's configuration.
    pub window: u64,
    /// See the node's configuration.
    pub batch: u64,
    /// The workload.
    pub mix: Mix,
    /// Faults, by the number of requests submitted before, rising.
    pub faults: Vec<(u64, Fault)>,
    /// What is on the volumes before anything runs: volume, first sector, sectors; the first on every node
    /// that is not blank, the second over it on the primary alone.
    pub before: [Vec<(u8, u64, u64)>; 2],
    /// Nodes whose volumes are all zeroes at the start, as bits.
    pub blank: u8,
    /// How many of the steps of a resync are followed by a fault, in thousandths.
    pub ambush: u64,
    /// The same of the steps by which a node changes its place in the group.
    pub role_ambush: u64,
    /// How many of the writes of a superblock are followed by two deaths, in thousandths: the process dies while that
    /// write is on its way, and the next one loses power while its own first one is.
    pub slot_ambush: u64,
    /// How long an administrator looks at two primaries before he chooses one, ns.
    pub patience: u64,
    /// The promotion, after this many requests, and the node promoted.
    pub promotion: Option<(u64, Loss, usize)>,
    /// The primary is moved, there and back; nobody is promoted then.
    pub moves: bool,
    /// How long shadows hold their images back, ns.
    pub apply_delay: u64,
    /// The third node's, if it has one of its own.
    pub far_delay: Option<u64>,
    /// The promotion is as of an earlier record, mostly.
    pub rewind: bool,
    /// How many of the steps of such a promotion are followed by a death, in thousandths.
    pub ambush_promotion: u64,
    /// How many of the writes that put the journal into the image of a primary that serves already are followed by
    /// a death, in thousandths.
    pub ambush_drain: u64,
    /// How many of a primary's starts are followed by a loss of power while its image is read, in thousandths.
    pub ambush_start: u64,
    /// Who holds records of its own after that is told to rejoin.
    pub rejoin: bool,
    /// Another shadow is promoted, too.
    pub double: bool,
    /// After so many requests the primary is copied, and after so many put back to the copy.
    pub rollback: Option<(u64, u64)>,
    /// For how long the others do not see a machine that was put back, ns.
    pub apart: (u64, u64),
    /// Who follows whom.
    pub topology: Topology,
    /// Slowest disk write, ns.
    pub disk_write: u64,
    /// Slowest sync, ns.
    pub disk_sync: u64,
}

impl Plan {
    /// The plan of a seed.
    pub fn draw(rng: &mut Prng) -> Plan {
        let nodes = if rng.permille(350) { 3 } else { 2 };
        // Writes go round the journal several times, and shadows stay away for long.
        let resyncs = rng.permille(350);
        // Views are left open while the journal goes round.
        let views = rng.permille(300);
        let mut mix = draw_mix(rng);
        let laps = views && rng.permille(300);
        if laps {
            (mix.largest, mix.zero, mix.rich) = (4000, 0, 1000);
            mix.requests = rng.within(40, 100);
        } else if resyncs {
            mix.largest = rng.pick(&[256, 512]);
            mix.requests = rng.log(120, 600);
            mix.rich = rng.pick(&[700, 1000]);
        }
        let sync = if rng.permille(350) { rng.within(1, (1 << (nodes - 1)) - 1) as u8 } else { 0 } << 1;
        let rewind = rng.permille(210);
        // There is something to choose from only while it is held.
        let apply_delay = match rewind {
            true => rng.log(300 * MILLIS, 10 * SECONDS),
            false if rng.permille(110) => rng.log(10 * MILLIS, 5 * SECONDS),
            false => 0,
        };
        let promotion = rng.permille(if rewind { 800 } else { 350 }).then(|| {
            let at = rng.within(mix.requests / 4, mix.requests * 3 / 4);
            (
                at,
                rng.pick(&[Loss::Forever, Loss::Kill, Loss::Power]),
                rng.within(1, nodes as u64 - 1) as usize,
            )
        });
        let behind = rng.permille(if resyncs { 900 } else { 200 });
        let volumes = draw_volumes(rng);
        let full = rng.permille(if resyncs { 400 } else { 50 });
        let before = if full {
            [draw_extents(&volumes, rng), draw_extents(&volumes, rng)]
        } else {
            Default::default()
        };
        let blank = if full { rng.next() as u8 & 0xfe } else { 0xff };
        let mut faults = draw_faults(rng, mix.requests);
        if resyncs {
            let count = rng.within(1, 3);
            let away = (0..count).map(|_| (rng.within(1, mix.requests / 2), Fault::Away));
            faults.extend(away);
            let more = (0..rng.pick(&[0, 0, 1, 2])).map(|_| {
                (
                    rng.within(1, mix.requests),
                    rng.pick(&[
                        Fault::StageFull,
                        Fault::LostMaps,
                        Fault::PowerShadow,
                        Fault::KillShadow,
                        Fault::Cut,
                    ]),
                )
            });
            let more: Vec<_> = more.collect();
            faults.extend(more);
            faults.sort_unstable();
        }
        if rng.permille(300) {
            // A course of comparisons: with some rot between, and the index of the one used by the next.
            let kinds =
                [Fault::Refresh, Fault::Quick, Fault::Quick, Fault::Verify, Fault::Rot, Fault::KillShadow];
            let count = rng.within(2, 8);
            faults.extend((0..count).map(|_| (rng.within(1, mix.requests), rng.pick(&kinds))));
            faults.sort_unstable();
        }
        if rng.permille(if rewind { 900 } else { 400 }) {
            let count = rng.within(1, 12);
            faults.extend((0..count).map(|_| (rng.within(1, mix.requests), Fault::Mark)));
            faults.sort_unstable();
        }
        if views {
            // A course of views, with what goes on without regard to them.
            let kinds = [
                Fault::ViewClose,
                Fault::Partition,
                Fault::Cut,
                Fault::KillShadow,
                Fault::PowerShadow,
                Fault::IoErrorShadow,
                Fault::RestartShadow,
                Fault::Refresh,
                Fault::StageFull,
            ];
            for _ in 0..rng.within(1, 5) {
                let at = rng.within(1, if laps { mix.requests / 3 } else { mix.requests });
                faults.push((at, Fault::View));
                if rng.permille(500) {
                    faults.push((rng.within(at, mix.requests), rng.pick(&kinds)));
                }
            }
            faults.sort_unstable();
        }
        let moves = promotion.is_none() && rng.permille(400);
        if moves {
            let count = rng.within(1, 6);
            faults.extend((0..count).map(|_| (rng.within(1, mix.requests), Fault::Switchover)));
            faults.sort_unstable();
        }
        let mut plan = Plan {
            nodes,
            volumes,
            before,
            blank,
            role_ambush: 0,
            slot_ambush: 0,
            patience: 0,
            ambush_drain: 0,
            ambush_start: 0,
            batch: 4 << 20,
            ambush: if resyncs { rng.pick(&[0, 50, 300]) } else { 0 },
            segment: 2 << 20,
            segments: if laps { 4 } else { rng.pick(&[4, 4, 4, 5, 8]) },
            cache: rng.pick(&[1, 2, 4, 8]) << 20,
            // Much data that hardly compresses takes its time, and tells nothing new.
            level: rng.pick(if laps || resyncs { &[None, None, Some(1)] } else { &[None, Some(1), Some(3)] }),
            full: if behind { FullPolicy::Behind } else { FullPolicy::Block },
            sync,
            timing: draw_timing(rng),
            feed: rng.log(64 << 10, 16 << 20),
            window: rng.log(64 << 10, 16 << 20),
            faults,
            mix,
            promotion,
            moves,
            apply_delay,
            far_delay: None,
            rewind,
            ambush_promotion: rng.pick(&[0, 50, 200, 500]),
            rejoin: rng.permille(700),
            double: rng.permille(700),
            rollback: None,
            apart: (10 * MILLIS, 5 * SECONDS),
            topology: Topology::Star,
            disk_write: rng.log(50 * MICROS, 20 * MILLIS),
            disk_sync: rng.log(100 * MICROS, 50 * MILLIS),
        };
        // Not drawn, for the seeds that were looked at before it.
        plan.slot_ambush = if plan.disk_write.is_multiple_of(4) { 60 } else { 0 };
        plan.ambush_start = if plan.disk_sync.is_multiple_of(4) { 400 } else { 0 };
        // Drawn last, for the seeds that were looked at before it.
        plan.role_ambush = rng.pick(&[0, 0, 0, 100, 400]);
        if plan.double && plan.rejoin && plan.promotion.is_some() {
            // Two promotions are rare: what happens to them is worth more.
            plan.role_ambush = rng.pick(&[0, 400, 1000]);
        }
        plan.timing.ask = rng.pick(&[MILLIS, 50 * MILLIS, SECONDS, SECONDS, 3 * SECONDS]);
        if plan.promotion.is_none() && !plan.moves && plan.sync == 0 && rng.permille(200) {
            let first = rng.within(1, plan.mix.requests / 2);
            plan.rollback = Some((first, rng.within(first + 1, plan.mix.requests * 3 / 4 + 1)));
            (plan.ambush, plan.role_ambush, plan.before, plan.blank) = (0, 0, Default::default(), 0xff);
            (plan.slot_ambush, plan.ambush_start) = (0, 0);
            plan.faults.clear();
            if plan.disk_write.is_multiple_of(2) {
                // What the two copies wrote is out of the journal before the shadow is met again.
                (plan.mix.largest, plan.mix.rich, plan.mix.zero) = (2000, 1000, 0);
                (plan.full, plan.segments, plan.apart) = (FullPolicy::Behind, 4, (2 * SECONDS, 10 * SECONDS));
                plan.mix.requests += 100;
                plan.level = None;
            }
        }
        plan.patience = rng.pick(&[0, 0, 20 * MILLIS, 100 * MILLIS, 500 * MILLIS, 2 * SECONDS]);
        if plan.double && plan.rejoin && plan.promotion.is_some() && rng.permille(700) {
            // The conflict ends under load.
            plan.patience = rng.pick(&[5 * MILLIS, 20 * MILLIS, 50 * MILLIS]);
            (plan.role_ambush, plan.mix.think) = (rng.pick(&[100, 400, 1000]), 100 * MICROS);
            plan.mix.requests += 200;
        }
        plan.ambush_drain = rng.pick(&[0, 0, 20, 200]);
        // Small ones, so that the journal goes into the image in many steps.
        plan.batch = rng.pick(&[4 << 20, 4 << 20, 512 << 10, 64 << 10, 8 << 10]);
        if plan.apply_delay > 0 && plan.rollback.is_none() && rng.permille(500) {
            // What is held back is looked at, as of its marks too.
            for kind in [Fault::View, Fault::Mark] {
                let count = rng.within(2, 8);
                plan.faults.extend((0..count).map(|_| (rng.within(1, plan.mix.requests), kind)));
            }
            plan.faults.sort_unstable();
        }
        // From a stream of its own: seeds that draw nothing here run as they did before.
        let rng = &mut rng.clone();
        if plan.rollback.is_none() && rng.permille(250) {
            plan.nodes = 3;
            plan.topology = rng.pick(&[
                Topology::Chain,
                Topology::Chain,
                Topology::Chain,
                Topology::Either,
                Topology::Ring,
            ]);
            // Whom the primary does not see can't be waited for.
            plan.sync &= 0b010;
            plan.draw_cascade(rng);
            plan.draw_delays(rng);
        }
        if plan.sync != 0 && rng.permille(600) {
            let count = rng.within(1, 4);
            plan.faults.extend((0..count).map(|_| (rng.within(1, plan.mix.requests), Fault::Outdate)));
            plan.faults.sort_unstable();
            plan.mix.flush = plan.mix.flush.max(100);
        }
        if plan.rollback.is_none() && rng.permille(60) {
            let count = rng.within(1, 3);
            plan.faults.extend((0..count).map(|_| (rng.within(1, plan.mix.requests), Fault::Lease)));
            plan.faults.sort_unstable();
        }
        plan
    }

    /// What makes a shadow's image lag behind what it passes on, and comparisons with it meanwhile.
    fn draw_cascade(&mut self, rng: &mut Prng) {
        if rng.permille(400) && self.before[0].is_empty() {
            self.before = [draw_extents(&self.volumes, rng), draw_extents(&self.volumes, rng)];
            self.blank = rng.next() as u8 & 0xfe;
        }
        if rng.permille(600) {
            let kinds = [Fault::Refresh, Fault::Quick, Fault::Verify, Fault::SlowDisk, Fault::View];
            let requests = self.mix.requests;
            let count = rng.within(4, 16);
            self.faults.extend((0..count).map(|_| (rng.within(1, requests), rng.pick(&kinds))));
            let closed = rng.within(0, 2);
            self.faults.extend((0..closed).map(|_| (rng.within(1, requests), Fault::ViewClose)));
            self.faults.sort_unstable();
        }
    }

    /// A near shadow that holds its image back, or a far one, each for a time of its own.
    fn draw_delays(&mut self, rng: &mut Prng) {
        let drawn = |rng: &mut Prng, rewind| match rewind {
            true => rng.log(300 * MILLIS, 10 * SECONDS),
            false => rng.log(10 * MILLIS, 5 * SECONDS),
        };
        let other = rng.permille(400) && self.promotion.is_some();
        self.rewind |= other;
        if rng.permille(if other { 1000 } else { 350 }) {
            self.apply_delay = drawn(rng, self.rewind);
        }
        self.far_delay = match rng.below(4) {
            0 | 1 => Some(0),
            2 => Some(drawn(rng, self.rewind)),
            _ => None,
        };
        if other {
            let count = rng.within(1, 8);
            self.faults.extend((0..count).map(|_| (rng.within(1, self.mix.requests), Fault::Mark)));
            self.faults.sort_unstable();
        }
    }

    /// How long a node holds its image back.
    pub fn delay_of(&self, node: usize) -> u64 {
        match node {
            0 => 0,
            2 => self.far_delay.unwrap_or(self.apply_delay),
            _ => self.apply_delay,
        }
    }

    /// An old primary that comes back finds the promoted one in time.
    pub fn finds_the_promoted(&self) -> bool {
        self.faults.is_empty()
            && self.ambush + self.role_ambush + self.ambush_start == 0
            && self.timing.ask >= SECONDS
    }
}

fn draw_volumes(rng: &mut Prng) -> Vec<(u8, u64, u64)> {
    let mut one = |number: u8, largest: u64| {
        let block = rng.pick(&[512, 4096]);
        let blocks = rng.within(64 << 10, largest) / block;
        (number, blocks * block, block)
    };
    let first = one(0, 4 << 20);
    let second = one(3, 1 << 20);
    if rng.permille(300) { vec![first, second] } else { vec![first] }
}

fn draw_extents(volumes: &[(u8, u64, u64)], rng: &mut Prng) -> Vec<(u8, u64, u64)> {
    let mut one = |&(number, size, _): &(u8, u64, u64)| {
        let sectors = size / 512;
        let len = rng.log(1, sectors);
        (number, rng.below(sectors - len + 1), len)
    };
    volumes.iter().chain(volumes).chain(volumes).map(&mut one).collect()
}

fn draw_mix(rng: &mut Prng) -> Mix {
    let largest = if rng.permille(50) { 6000 } else { rng.pick(&[1, 8, 16, 32, 128, 512]) };
    Mix {
        depth: rng.log(1, 48),
        requests: if largest > 512 {
            rng.within(20, 60)
        } else if largest > 64 {
            rng.log(60, 300)
        } else {
            rng.log(100, 700)
        },
        largest,
        read: rng.pick(&[0, 100, 300]),
        flush: rng.pick(&[0, 20, 100, 300]),
        zero: rng.pick(&[0, 0, 50, 150]),
        fua: rng.pick(&[0, 0, 50, 300]),
        hot: rng.pick(&[0, 500, 900]),
        rich: rng.pick(&[0, 200, 1000]),
        think: rng.pick(&[0, 100 * MICROS, 3 * MILLIS]),
    }
}

fn draw_timing(rng: &mut Prng) -> Timing {
    let heartbeat = rng.log(20 * MILLIS, 500 * MILLIS);
    Timing {
        seal_after: rng.log(50 * MICROS, 20 * MILLIS),
        seal_bytes: rng.pick(&[4 << 10, 64 << 10, 64 << 10, 1 << 20]),
        sync_after: rng.log(100 * MICROS, 50 * MILLIS),
        heartbeat,
        silence: heartbeat * rng.within(4, 12),
        redial: rng.log(10 * MILLIS, 500 * MILLIS),
        write_back_after: rng.log(100 * MICROS, 500 * MILLIS),
        checkpoint_after: rng.log(5 * MILLIS, SECONDS),
        ask: 0,
    }
}

fn draw_faults(rng: &mut Prng, requests: u64) -> Vec<(u64, Fault)> {
    let count = rng.pick(&[0, 1, 2, 3, 5, 8, 12]);
    let mut kinds = FAULTS.to_vec();
    rng.shuffle(&mut kinds);
    kinds.truncate(rng.within(1, 5) as usize);
    let mut faults: Vec<_> = (0..count).map(|_| (rng.within(1, requests), rng.pick(&kinds))).collect();
    faults.sort_unstable();
    faults
}
