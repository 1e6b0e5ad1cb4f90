//! What to do with the devices that earlier daemons of this group left.
//!
//! Owns: the decision, which is pure. Invariant: at most one device of a volume is taken over, only one
//! that has the volume's shape and has not failed anybody's request; each other one of ours is removed,
//! and a device of anybody else is never named.

/// What a read of a device that was left says about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pulse {
    /// It waits for the next daemon, or still has the last one's socket.
    Waits,
    /// It is answered: the last daemon's socket lives.
    Answers,
    /// It fails: its users have waited for too long, or somebody disconnected it.
    Fails,
}

/// A device of the kernel's NBD driver that bears a volume's identity.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Left {
    /// Its number.
    pub index: u32,
    /// Bytes.
    pub size: u64,
    /// Logical block, bytes.
    pub block: u32,
    pub pulse: Pulse,
}

/// What to do for a volume.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Plan {
    /// The device to take over; without one, a new one is made.
    pub take_over: Option<u32>,
    /// Devices to disconnect first.
    pub remove: Vec<u32>,
}

/// Decides for a volume of `size` bytes with blocks of `block` bytes.
pub(super) fn plan(left: &[Left], size: u64, block: u32) -> Plan {
    let usable = |l: &&Left| (l.size, l.block) == (size, block) && l.pulse != Pulse::Fails;
    // One that waits has users who were promised that it comes back.
    let best = left.iter().filter(usable).min_by_key(|l| (l.pulse != Pulse::Waits, l.index));
    let take_over = best.map(|l| l.index);
    let remove = left.iter().map(|l| l.index).filter(|index| Some(*index) != take_over).collect();
    Plan { take_over, remove }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PULSES: [Pulse; 3] = [Pulse::Waits, Pulse::Answers, Pulse::Fails];
    const SHAPES: [(u64, u32); 3] = [(1 << 20, 4096), (2 << 20, 4096), (1 << 20, 512)];

    /// Every combination of up to two devices left.
    #[test]
    fn the_whole_table() {
        let one = || SHAPES.into_iter().flat_map(|shape| PULSES.map(|pulse| (shape, pulse)));
        let device = |index, ((size, block), pulse)| Left { index, size, block, pulse };
        let mut tables: Vec<Vec<Left>> = vec![vec![]];
        tables.extend(one().map(|a| vec![device(0, a)]));
        tables.extend(one().flat_map(|a| one().map(move |b| vec![device(0, a), device(3, b)])));
        assert_eq!(tables.len(), 1 + 9 + 81);
        for left in &tables {
            let plan = plan(left, 1 << 20, 4096);
            let good = |l: &Left| (l.size, l.block) == SHAPES[0] && l.pulse != Pulse::Fails;
            match plan.take_over.map(|index| left.iter().find(|l| l.index == index).expect("of the table")) {
                Some(taken) => {
                    assert!(good(taken), "{left:?}");
                    let waits = left.iter().any(|l| good(l) && l.pulse == Pulse::Waits);
                    assert_eq!(taken.pulse == Pulse::Waits, waits, "{left:?}");
                }
                None => assert!(!left.iter().any(good), "{left:?}"),
            }
            // Each device is either taken over or removed, and no other is touched.
            let mut touched: Vec<u32> = plan.remove.iter().copied().chain(plan.take_over).collect();
            touched.sort_unstable();
            assert_eq!(touched, left.iter().map(|l| l.index).collect::<Vec<_>>());
        }
    }
}
