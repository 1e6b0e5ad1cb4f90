//! Configurations that load, and those that say why not.

use super::*;

fn sample() -> Config {
    Config {
        group: GroupId([7; 16]),
        node_id: NodeId(9),
        node: "db1".into(),
        listen: Some("127.0.0.1:7654".into()),
        key_file: "epic.key".into(),
        on_full: OnFull::Behind,
        apply_delay: Span(Duration::from_secs(900)),
        compression: 3,
        hooks: Hooks { start: None, stop: Some("/sbin/stop".into()), timeout: Span(Duration::from_secs(7)) },
        fence_hook: Some("/etc/volrep/fe\"nce".into()),
        cache: Cache { size: Size(8 << 20), accept_lost: true },
        journal: Journal { dir: Some("/j".into()), segment: Size(2 << 20), segments: 9 },
        link: Link { feed: Size(5 << 20), window: Size(3 << 20) },
        device: Device { dead_after: Span(Duration::from_secs(90)) },
        volumes: vec![Volume { name: "data".into(), path: "/v/a b".into(), size: Size(1536), direct: false }],
        peers: vec![
            Peer {
                name: "db2".into(),
                address: Some("db2.lan:7654".into()),
                dial: Some(false),
                sync: true,
                cascade: false,
            },
            Peer { name: "db3".into(), address: None, dial: None, sync: false, cascade: false },
            Peer {
                name: "db4".into(),
                address: Some("db4:1".into()),
                dial: None,
                sync: false,
                cascade: true,
            },
        ],
        timing: TimingOverrides {
            seal_after: Some(Span(Duration::from_micros(1500))),
            seal_bytes: Some(Size(8192)),
            heartbeat: Some(Span(Duration::from_secs(61))),
            ..Default::default()
        },
    }
}

#[test]
fn what_is_written_loads_to_the_same() {
    let full = sample();
    assert_eq!(parse(&render("epic", &full)).unwrap(), full);
    let least = Config {
        listen: None,
        fence_hook: None,
        journal: Journal::default(),
        peers: vec![],
        timing: TimingOverrides::default(),
        ..full
    };
    assert_eq!(parse(&render("epic", &least)).unwrap(), least);
}

#[test]
fn every_commented_default_is_the_default() {
    let least = Config { timing: TimingOverrides::default(), ..sample() };
    let text = render("epic", &least);
    let (before, timing) = text.split_once("[timing]").unwrap();
    let uncommented =
        timing.replace("\n#", "\n").lines().filter(|l| l.contains(" = ")).collect::<Vec<_>>().join("\n");
    let c = parse(&format!("{before}[timing]\n{uncommented}")).unwrap();
    let d = crate::node::config::Timing::default();
    let spans =
        [(c.timing.seal_after, d.seal_after), (c.timing.silence, d.silence), (c.timing.redial, d.redial)];
    assert!(spans.iter().all(|(shown, default)| shown.map(Span::nanos) == Some(*default)));
    assert_eq!(c.timing.heartbeat, Some(Span(Duration::from_millis(500))));
    assert_eq!(c.timing.seal_bytes, Some(Size(64 << 10)));
}

#[test]
fn an_unknown_key_is_named_with_the_nearest_known_one() {
    let text = render("epic", &sample()).replace("compression =", "compresion =");
    let (what, next) = parse(&text).unwrap_err();
    assert!(what.contains("line ") && what.contains("`compresion`"), "{what}");
    assert_eq!(next, "did you mean `compression`?");
    let text = render("epic", &sample()).replace("heartbeat =", "heart_beat =");
    assert_eq!(parse(&text).unwrap_err().1, "did you mean `heartbeat`?");
    let text = render("epic", &sample()).replace("on_full = \"behind\"", "on_full = \"bhind\"");
    assert_eq!(parse(&text).unwrap_err().1, "did you mean `behind`?");
}

#[test]
fn bounds_are_told_by_the_key() {
    for (from, to, expected) in [
        ("size = \"8M\"", "size = \"8Q\"", "8Q"),
        ("size = \"8M\"", "size = \"1M\"", "cache.size"),
        ("segments = 9", "segments = 3", "journal.segments"),
        ("dead_after = \"1m30s\"", "dead_after = \"1500ms\"", "device.dead_after"),
        ("dead_after = \"1m30s\"", "dead_after = \"0s\"", "device.dead_after"),
        ("compression = 3", "compression = 77", "compression"),
        ("size = \"1536\"", "size = 100", "multiple of 512"),
        ("path = \"/v/a b\"", "path = \"v\"", "absolute"),
        ("\"127.0.0.1:7654\"", "\"db1\"", "listen"),
        ("seal_after = \"1ms500us\"", "seal_after = \"1h\"", "timing.seal_after"),
        ("seal_after = \"1ms500us\"", "seal_after = \"soon\"", "soon"),
        ("name = \"db3\"", "name = \"db2\"", "two nodes"),
        ("name = \"db3\"", "name = \"../x\"", "can't be a name"),
        ("node_id = \"0000000000000009\"", "node_id = \"0000000000000000\"", "not all 0"),
    ] {
        let text = render("epic", &sample());
        assert!(text.contains(from), "{from}");
        let (what, _) = parse(&text.replacen(from, to, 1)).unwrap_err();
        assert!(what.contains(expected), "{to}: {what}");
    }
}

#[test]
fn addresses() {
    for good in ["10.0.0.1:1", "db2.lan:7654", "[::1]:7654"] {
        assert!(check_address(good).is_ok(), "{good}");
    }
    for bad in ["", "db2", "db2:", ":1", "db2:0", "db2:99999", "::1:7654", "a b:1"] {
        assert!(check_address(bad).is_err(), "{bad}");
    }
}

#[test]
fn a_journal_of_about_a_size() {
    assert_eq!(Journal::of_size(Size(1 << 30), None), Journal::default());
    assert_eq!(Journal::of_size(Size(1), None).geometry(), Geometry { segment: 2 << 20, segments: 4 });
    assert_eq!(Journal::of_size(Size(u64::MAX), None).segments, 1 << 20);
}
