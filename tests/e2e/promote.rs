//! A shadow that holds much back is promoted: it serves at once, reads through its journal's index, and its image
//! catches up meanwhile.

use crate::pair::{Pair, Setup, client, installed};
use crate::place::until;
use std::fs;

const VOLUME: usize = 96 << 20;

/// A volume, as it should be, and how to change both.
struct Model(Vec<u8>);

impl Model {
    fn write(&mut self, uri: &str, pattern: u8, at: usize, len: usize) {
        client(
            "qemu-io",
            &["-f", "raw", "-c", &format!("write -P {pattern} {at} {len}"), "-c", "flush", uri],
        );
        self.0[at..at + len].fill(pattern);
    }

    #[track_caller]
    fn equals(&self, found: &[u8], what: &str) {
        let differs = self.0.iter().zip(found).position(|(a, b)| a != b);
        assert_eq!((differs, found.len()), (None, self.0.len()), "{what} differs at this byte");
    }

    /// Everything, read as a client reads it.
    #[track_caller]
    fn is_served(&self, pair: &Pair, uri: &str) {
        let copy = pair.shadow.place.path().join("copy");
        client("nbdcopy", &[uri, copy.to_str().unwrap()]);
        self.equals(&fs::read(&copy).unwrap(), "what is served");
    }
}

#[test]
fn what_was_held_back_is_served_at_once() {
    if !["qemu-io", "nbdcopy"].iter().all(|p| installed(p)) {
        return;
    }
    let setup =
        Setup { volumes: vec![("data", VOLUME as u64)], journal: "512M", cache: "8M", ..Setup::default() };
    let mut pair = Pair::prepare(&setup);
    pair.shadow.configure(|t| t.replacen("apply_delay = \"0s\"", "apply_delay = \"1h\"", 1));
    pair.primary.start();
    pair.shadow.start();
    pair.wait_following();
    let uri = pair.primary.attach("nbd-socket").remove(0);
    let mut model = Model(vec![0; VOLUME]);
    blake3::Hasher::new().update(b"held back").finalize_xof().fill(&mut model.0);
    let noise = pair.primary.place.path().join("noise");
    fs::write(&noise, &model.0).unwrap();
    client("nbdcopy", &["--flush", noise.to_str().unwrap(), &uri]);
    model.write(&uri, 7, (5 << 20) + 512, 64 << 10);
    let tail = until("the shadow has everything", || {
        let (p, s) = (pair.primary.status(), pair.shadow.status());
        (s["durable_lsn"] == p["tail_lsn"]).then(|| p["tail_lsn"].as_u64().unwrap())
    });
    assert!(pair.shadow.status()["applied_lsn"].as_u64().unwrap() < tail / 2, "it is held back");
    pair.primary.kill();
    pair.promote();
    let uri = pair.shadow.attach("nbd-socket").remove(0);
    // Over what is held back, beside it, and more than the cache has room for.
    model.write(&uri, 8, (5 << 20) + 4096, 4096);
    model.write(&uri, 9, 40 << 20, 16 << 20);
    model.is_served(&pair, &uri);
    model.write(&uri, 10, 60 << 20, 1 << 20);
    pair.shadow.kill();
    pair.shadow.start();
    pair.shadow.wait_attached();
    model.write(&uri, 11, 20 << 20, 1 << 20);
    model.is_served(&pair, &uri);
    until("the image has caught up", || (pair.shadow.status()["drain_records"] == 0).then_some(()));
    model.is_served(&pair, &uri);
    pair.shadow.place.run(&["detach", "g"]).expect(0, &[]);
    pair.shadow.stop();
    model.equals(&fs::read(pair.shadow.backing("data")).unwrap(), "the backing");
}
