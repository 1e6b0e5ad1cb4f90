//! `volrep bench` with the real fio, beside a group that is in use.

use crate::pair::{Pair, Setup, installed};
use serde_json::Value;
use std::process::Command;

fn has_nbd() -> bool {
    let told = Command::new("fio").arg("--enghelp=nbd").output();
    let has = told.is_ok_and(|t| t.status.success());
    if !has {
        eprintln!("skipped: fio has no nbd engine");
    }
    has
}

#[test]
fn a_measurement_tells_fios_figures_and_leaves_the_group_alone() {
    if !installed("fio") || !has_nbd() {
        return;
    }
    let mut pair = Pair::start(&Setup { volumes: vec![("data", 16 << 20)], ..Setup::default() });
    pair.settle();
    let place = &pair.primary.place;
    let (before, tree) = (pair.primary.status(), place.tree());
    let args = [
        "bench",
        "g",
        "--profile",
        "mixed",
        "--seconds",
        "1",
        "--size",
        "64M",
        "--shadow",
        ".",
        "--sync",
        "--json",
    ];
    let report = place.run(&args).expect(0, &["through volrep, replicated"]).json();
    let rows = report["rows"].as_array().unwrap();
    let kinds: Vec<_> =
        rows.iter().map(|r| (r["job"].as_str().unwrap(), r["op"].as_str().unwrap())).collect();
    assert_eq!(kinds, [("mixed", "read"), ("mixed", "write"), ("mixed", "fsync")]);
    for row in rows {
        for side in ["bare", "volrep"] {
            let figure = |name: &str| row[side][name].as_f64().unwrap();
            assert!(figure("per_second") > 0.0 && figure("p50_seconds") > 0.0, "{row}");
            assert!(figure("p50_seconds") <= figure("p99_seconds"), "{row}");
        }
    }
    // fio's own documents say the same.
    let written = |on: &str| report["fio"][on]["jobs"][0]["write"]["io_bytes"].as_u64().unwrap();
    assert_eq!(report["bytes_written"], written("volrep"));
    assert!(written("bare") > 0);
    let [primary, shadow] = &report["nodes"].as_array().unwrap()[..] else { panic!("{report}") };
    let figure = |node: &Value, name: &str| node[name].as_f64().unwrap();
    for node in [primary, shadow] {
        assert!(figure(node, "cpu_seconds") > 0.0, "{node}");
        let journal = figure(node, "journal_bytes_per_byte_written");
        assert!(journal > 0.3 && journal < 2.0, "half of it is compressible: {node}");
    }
    assert!(figure(primary, "wire_bytes") > 0.0);
    assert!(report["lag"]["count"].as_u64().unwrap() > 0, "{}", report["lag"]);
    assert_eq!(report["live_group_shares_its_disks"], true);
    // The group has noticed nothing.
    let after = pair.primary.status();
    for same in ["written_bytes", "term", "state", "journal_bytes"] {
        assert_eq!(before[same], after[same], "{same}");
    }
    assert_eq!(place.tree(), tree);
    pair.finish();
}
