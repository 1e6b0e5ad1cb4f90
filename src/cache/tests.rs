//! The cache against a model of the newest bytes.

use super::*;
use crate::units::{Address, GroupId, NodeId, Term};
use bytes::Bytes;
use proptest::prelude::*;

fn id() -> RingId {
    RingId { group: GroupId([7; 16]), boot: [9; 16], term: Term { counter: 3, node: NodeId(5) } }
}

fn memory(data: u64) -> Box<dyn Memory> {
    Box::new(vec![0u8; ring_len(data) as usize])
}

fn extent(sector: u64, sectors: u64) -> Extent {
    Extent::new(Address(sector * 512), sectors * 512).unwrap()
}

fn reopened(cache: Cache, recorded: u64) -> Option<Cache> {
    match Ring::open(cache.into_memory(), id(), recorded) {
        RingState::Ours(ring) => Some(Cache::new(ring)),
        RingState::Foreign(_) => None,
    }
}

fn image(cache: &Cache) -> Vec<Option<u8>> {
    let mut image = vec![None; 128];
    for (e, data) in cache.read(extent(0, 128)) {
        for k in 0..e.len() / 512 {
            let byte = data.map_or(0, |d| d[(k * 512) as usize]);
            image[(e.start() / 512 + k) as usize] = Some(byte);
        }
    }
    image
}

#[test]
fn a_ring_has_the_data_bytes_that_were_asked_for() {
    for data in [64 << 10, 1 << 20, (1 << 20) + 4096, 64 << 20, 1 << 30] {
        let cache = Cache::new(Ring::format(memory(data), id(), 0));
        assert_eq!(cache.usage(), (0, data));
    }
}

#[test]
fn a_ring_of_another_owner_is_not_taken_up() {
    let fresh = || Cache::new(Ring::format(memory(1 << 20), id(), 0)).into_memory();
    let others = [
        RingId { group: GroupId([8; 16]), ..id() },
        RingId { boot: [0; 16], ..id() },
        RingId { term: Term { counter: 2, node: NodeId(5) }, ..id() },
        RingId { term: Term { counter: 3, node: NodeId(6) }, ..id() },
    ];
    let raised = RingId { term: Term { counter: 4, node: NodeId(5) }, ..id() };
    for ours in [id(), raised] {
        assert!(matches!(Ring::open(fresh(), ours, 0), RingState::Ours(_)));
    }
    for other in others {
        assert!(matches!(Ring::open(fresh(), other, 0), RingState::Foreign(_)));
    }
    assert!(matches!(Ring::open(memory(1 << 20), id(), 0), RingState::Foreign(_)));
}

#[test]
fn an_epoch_closes_before_it_passes_a_records_bounds() {
    let mut cache = Cache::new(Ring::format(memory(8 << 20), id(), 0));
    for i in 0..3000 {
        cache.write(extent(i * 2, 1), Some(&Bytes::from_static(&[1; 512]).into())).unwrap();
    }
    cache.close();
    let mut writes = 0;
    while let Some(Gathered { job, .. }) = cache.gather(None) {
        assert!(job.extents.len() <= MAX_EXTENTS && job.buf.len() - room(job.extents.len()) <= MAX_RAW);
        writes += job.extents.len();
    }
    assert_eq!((writes, cache.reserved()), (3000, 0));
}

proptest! {
    /// Random writes, seals, write-backs and deaths of the process, against the newest byte a sector got.
    #[test]
    fn a_read_sees_every_write_that_the_backing_lacks(
        ops in prop::collection::vec((0u8..8, 0u64..100, 1u64..24, 1u8..255), 1..120)
    ) {
        let mut cache = Cache::new(Ring::format(memory(64 << 10), id(), 10));
        let mut model = vec![None::<u8>; 128];
        let mut backing = vec![None::<u8>; 128];
        let (mut taken, mut recorded) = (10, 10);
        for (op, start, len, byte) in ops {
            match op {
                0..=3 => {
                    let data = vec![byte; (len * 512) as usize];
                    let data = (op != 3).then(|| Payload::from(Bytes::from(data)));
                    if cache.has_room(data.as_ref().map_or(0, Payload::len)) {
                        cache.write(extent(start, len), data.as_ref()).unwrap();
                        model[start as usize..(start + len) as usize].fill(Some(data.map_or(0, |_| byte)));
                    }
                }
                4 | 5 => {
                    cache.close();
                    while let Some(g) = cache.gather(None) { taken = g.last_seq; }
                    recorded = taken;
                }
                6 => {
                    let bytes = |(e, s): (Extent, Slot)| (e, s.at.map(|at| cache.ring_data(at, e.len()).to_vec()));
                    let dirty: Vec<_> = cache.dirty_up_to(recorded).map(bytes).collect();
                    for (e, data) in &dirty {
                        for k in 0..e.len() / 512 {
                            let byte = data.as_ref().map_or(0, |d| d[(k * 512) as usize]);
                            backing[(e.start() / 512 + k) as usize] = Some(byte);
                        }
                    }
                    let (used, promised) = (cache.usage().0, cache.freeable(recorded));
                    cache.written_back(dirty.iter().map(|(e, _)| *e), recorded);
                    prop_assert!(used - promised >= cache.usage().0.min(used), "{} of {} are free", promised, used);
                }
                _ => {
                    // What is in records is replayed into the backing before the ring is taken up.
                    for (cell, seen) in backing.iter_mut().zip(image(&cache)) {
                        if let Some(byte) = seen { *cell = Some(byte); }
                    }
                    cache = reopened(cache, recorded).expect("ours");
                }
            }
            let seen = image(&cache);
            for i in 0..128 {
                prop_assert_eq!(seen[i].or(backing[i]), model[i], "sector {}", i);
            }
        }
    }
}
