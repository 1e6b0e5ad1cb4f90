//! What `run` refuses before a node exists.

use super::*;
use crate::node::config::{FullPolicy, Timing, VolumeConfig};
use crate::units::{GroupId, NodeId};
use std::fs;

/// Options over files in `dir`; all of them good.
fn options(dir: &Path) -> DaemonOptions {
    let file = |name: &str, len: u64| {
        let path = dir.join(name);
        fs::File::create(&path).unwrap().set_len(len).unwrap();
        path
    };
    let volume = VolumeConfig { number: 3, name: "data".into(), size: 1 << 20, block: 4096 };
    let config = NodeConfig {
        group_name: "g".into(),
        group: GroupId([1; 16]),
        node: NodeId(1),
        name: "n".into(),
        volumes: vec![volume],
        peers: vec![],
        key: [0; 32],
        boot: process::boot_id().unwrap(),
        salt: 0,
        full: FullPolicy::Block,
        accept_lost_cache: false,
        apply_delay: 0,
        level: Some(1),
        feed_bytes: 1 << 20,
        batch_bytes: crate::node::config::BATCH,
        window_bytes: 1 << 20,
        timing: Timing::default(),
    };
    DaemonOptions {
        config,
        superblock: file("superblock", 2 * SLOT as u64),
        journal: file("journal", 8 << 20),
        journal_bytes: 8 << 20,
        dirty_maps: file("maps", 8192 + 4096),
        dirty_maps_bytes: 8192 + 4096,
        hash_index: dir.join("index"),
        salvage: dir.join("salvage"),
        history: dir.join("history"),
        cache: dir.join("shm/cache"),
        cache_bytes: 1 << 20,
        backings: vec![BackingPath { number: 3, path: file("data", 1 << 20), direct: true }],
        listen: Some("127.0.0.1:0".parse().unwrap()),
        dial: vec![],
        workers: 1,
    }
}

fn refusal(change: impl FnOnce(&mut DaemonOptions)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path());
    change(&mut options);
    run(options, |_| panic!("it must not get as far as this")).unwrap_err().to_string()
}

#[test]
fn unusable_files_are_refused_with_what_to_do() {
    let text = refusal(|o| o.journal = o.backings[0].path.clone());
    assert!(text.contains("are the same file"), "{text}");
    let text = refusal(|o| o.config.volumes[0].size = 2 << 20);
    assert!(text.contains("has 1048576 bytes and must have at least 2097152"), "{text}");
    let text = refusal(|o| o.backings.clear());
    assert!(text.contains("volume data has no backing"), "{text}");
    let text = refusal(|o| o.dirty_maps_bytes = 4096);
    assert!(text.contains("restore the setting"), "{text}");
    let text = refusal(|o| o.journal = o.journal.parent().unwrap().into());
    assert!(text.contains("neither a regular file nor a block device"), "{text}");
    let text = refusal(|o| fs::write(&o.superblock, []).unwrap());
    assert!(text.contains("must have at least"), "{text}");
    let text = refusal(|o| o.listen = Some("192.0.2.1:1".parse().unwrap()));
    assert!(text.contains("can't listen for peers on 192.0.2.1:1"), "{text}");
}
