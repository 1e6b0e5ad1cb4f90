//! Two nodes were promoted, and both were written to.

use crate::model::Random;
use crate::nbd::Client;
use crate::outage::pour;
use crate::pair::{Node, Pair, Setup, free_port};
use crate::place::{first_difference, until};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

const SIZE: u64 = 64 << 20;
const SECTOR: usize = 512;

/// A way to a node that was not there before; gone when it is dropped.
struct Cable {
    port: u16,
    cut: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Cable {
    fn plug(port: u16, to: String) -> Cable {
        let cut = Arc::new(AtomicBool::new(false));
        let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let ended = cut.clone();
        let thread = std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                // A node that is down: whoever dialled sees the end.
                let Ok(far) = TcpStream::connect(&to) else { continue };
                for (mut from, mut to) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)]
                {
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(std::net::Shutdown::Both);
                    });
                }
            }
        });
        Cable { port, cut, thread: Some(thread) }
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.cut.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// What a node wrote, sector by sector, the last of each.
type Written = BTreeMap<u64, Vec<u8>>;

/// Writes here and there, some of it twice, and flushes.
fn scribble(node: &Node, random: &mut Random, count: u64, written: &mut Written) {
    let mut client = Client::connect(&node.socket(), "data").unwrap();
    for _ in 0..count {
        let sectors = 1 + random.below(64);
        let first = random.below(SIZE / SECTOR as u64 - sectors);
        let data: Vec<u8> =
            (0..sectors * SECTOR as u64 / 8).flat_map(|_| random.next().to_le_bytes()).collect();
        client.write(first * SECTOR as u64, &data).unwrap();
        written.extend((first..).zip(data.chunks(SECTOR).map(<[u8]>::to_vec)));
    }
    client.flush().unwrap();
}

/// Two promoted shadows that do not know of each other, and the LSN after which they differ. With `behind`, the
/// second one lacked some of the primary's writes.
struct Torn {
    pair: Pair,
    third: Node,
    ports: [u16; 2],
    listen: [String; 2],
    fork: u64,
    cables: Vec<Cable>,
}

fn torn(behind: bool) -> Torn {
    let setup = Setup { volumes: vec![("data", SIZE)], back: true, ..Setup::default() };
    let mut pair = Pair::prepare(&setup);
    let text = std::fs::read_to_string(pair.shadow.place.config().join("g.toml")).unwrap();
    let second = text.lines().find_map(|l| l.strip_prefix("listen = ")).unwrap().trim_matches('"').to_owned();
    let listen = [second, format!("127.0.0.1:{}", free_port())];
    let ports = [free_port(), free_port()];
    let mut third = Node::new();
    let token = pair.primary.place.run(&["token", "g", "--peer", "db3"]).stdout;
    let words = ["--listen", &listen[1], "--journal-size", "128M", "--volume", "data=data"];
    third.place.run(&[&["join", token.trim()], &words[..]].concat()).expect(0, &[]);
    pair.shadow.knows("db3", &format!("127.0.0.1:{}", ports[0]));
    third.knows("db2", &format!("127.0.0.1:{}", ports[1]));
    pair.primary.start();
    pair.shadow.start();
    third.start();
    pair.primary.attach("nbd-socket");
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    pour(&mut client, SIZE, 0..20, &AtomicU64::new(0));
    let both = |pair: &Pair, nodes: &[&Node]| {
        until("the shadows have everything", || {
            let tail = pair.primary.status()["tail_lsn"].clone();
            nodes.iter().all(|n| n.status()["applied_lsn"] == tail).then_some(())
        });
    };
    both(&pair, &[&pair.shadow, &third]);
    let mut fork = pair.primary.status()["tail_lsn"].as_u64().unwrap();
    if behind {
        third.stop();
        pour(&mut client, SIZE, 20..26, &AtomicU64::new(0));
        both(&pair, &[&pair.shadow]);
        fork = third.place.run(&["status", "g", "--json"]).json()["tail_lsn"].as_u64().unwrap();
    }
    drop(client);
    pair.primary.kill();
    if behind {
        third.start();
    }
    for node in [&pair.shadow, &third] {
        until("the primary is missed", || {
            node.status()["peers"]
                .as_array()
                .unwrap()
                .iter()
                .all(|p| p["state"] == "Disconnected")
                .then_some(())
        });
        node.place.run(&["promote", "g", "--i-fenced-the-old-primary", "--yes"]).expect(0, &[]);
        node.attach("nbd-socket");
    }
    Torn { pair, third, ports, listen, fork, cables: Vec::new() }
}

impl Torn {
    /// The nodes can reach each other; returns when both say that they have diverged.
    fn join(&mut self) {
        let ends = [(self.ports[0], &self.listen[1]), (self.ports[1], &self.listen[0])];
        self.cables = ends.into_iter().map(|(port, to)| Cable::plug(port, to.clone())).collect();
        for (node, name) in [(&self.pair.shadow, "db3"), (&self.third, "db2")] {
            let status = until("both say so", || Some(node.status()).filter(|s| s["state"] == "Diverged"));
            assert_eq!(status["role"], "primary", "{status}");
            assert_eq!(view(&status, name)["fork_lsn"], json!(self.fork), "{status}");
            assert_eq!(view(&status, name)["state"], "Diverged", "{status}");
            let text = node.told();
            let fork = format!("the histories part after LSN {}", self.fork);
            for word in [&fork, "volrep resolve g --keep db2", "volrep resolve g --keep db3", "Diverged"] {
                assert!(text.contains(word), "no `{word}` in {text}");
            }
        }
    }
}

fn view<'a>(status: &'a Value, name: &str) -> &'a Value {
    status["peers"].as_array().unwrap().iter().find(|p| p["name"] == name).unwrap_or(&Value::Null)
}

/// The salvage file of this node holds these sectors and nothing else.
fn check_salvage(node: &Node, fork: u64, written: &Written) {
    let listed = node.place.run(&["salvage", "g", "list", "--json"]).json();
    let files = listed["files"].as_array().unwrap();
    assert_eq!(files.len(), 1, "{listed}");
    let file = &files[0];
    assert_eq!(
        (&file["state"], &file["fork_lsn"], &file["first_lsn"]),
        (&json!("whole"), &json!(fork), &json!(fork + 1))
    );
    let done =
        node.place.run(&["salvage", "g", "extract", file["file"].as_str().unwrap(), "--to", "out", "--json"]);
    let done = done.expect(0, &[]).json();
    assert_eq!(done["records"], file["records"]);
    let out = node.place.path().join("out");
    let image = std::fs::read(out.join("data.img")).unwrap();
    let mut touched = std::collections::BTreeSet::new();
    for line in std::fs::read_to_string(out.join("map.jsonl")).unwrap().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let (offset, length) = (line["offset"].as_u64().unwrap(), line["length"].as_u64().unwrap());
        assert!(line["lsn"].as_u64().unwrap() > fork && line["content"] == "data", "{line}");
        touched.extend(offset / SECTOR as u64..(offset + length) / SECTOR as u64);
    }
    assert!(touched.iter().eq(written.keys()), "{} sectors, {} were written", touched.len(), written.len());
    for (sector, data) in written {
        let at = *sector as usize * SECTOR;
        assert!(image[at..at + SECTOR] == data[..], "sector {sector}");
    }
    let used =
        std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(out.join("data.img")).unwrap()) * 512;
    eprintln!("{} sectors in {} records, the image uses {used} bytes", written.len(), file["records"]);
}

/// The other side is given up, and becomes equal to the one that is kept.
fn resolve(torn: &mut Torn, keep_second: bool, written: &Written) {
    let fork = torn.fork;
    let (kept, given_up, keep, other) = match keep_second {
        true => (&mut torn.pair.shadow, &mut torn.third, "db2", "db3"),
        false => (&mut torn.third, &mut torn.pair.shadow, "db3", "db2"),
    };
    for node in [&*kept, &*given_up] {
        node.place
            .run(&["rejoin", "g", "--yes"])
            .expect(14, &["both were promoted", "volrep resolve g --keep"]);
    }
    kept.place.run(&["verify", "g", "--peer", other]).expect(14, &["have parted", "volrep status g"]);
    let there = format!("volrep resolve g --keep {keep}");
    kept.place
        .run(&["resolve", "g", "--keep", keep, "--yes"])
        .expect(11, &["nothing is given up", &there, other]);
    given_up.place.run(&["resolve", "g", "--keep", "db1", "--yes"]).expect(14, &[&there]);
    let before = given_up.status();
    let dry =
        given_up.place.run(&["resolve", "g", "--keep", keep, "--dry-run", "--json"]).expect(0, &[]).json();
    assert_eq!((&dry["fork_lsn"], &dry["keep"], &dry["dry_run"]), (&json!(fork), &json!(keep), &json!(true)));
    assert!(
        dry["text"].as_str().unwrap().contains(&format!("{} to {}", fork + 1, before["tail_lsn"])),
        "{dry}"
    );
    assert_eq!(given_up.status()["state"], "Diverged", "a dry run changes nothing");
    given_up.place.run(&["resolve", "g", "--keep", keep]).expect(2, &["becomes a shadow of", "--yes"]);
    given_up.place.run(&["resolve", "g", "--keep", keep, "--yes"]).expect(0, &["salvage"]);
    until("it follows", || {
        let (k, g) = (kept.status(), given_up.status());
        let current = g["applied_lsn"] == k["tail_lsn"] && k["applied_lsn"] == k["tail_lsn"];
        (g["role"] == "shadow" && g["state"] == "UpToDate" && current).then_some(())
    });
    let told = given_up.status()["refresh"].clone();
    let total = told["total"].as_u64().unwrap();
    eprintln!("compared {total} of {SIZE} bytes, {} differed, {} on the wire", told["differ"], told["wire"]);
    assert!(total < SIZE / 2, "it was compared as a whole: {told}");
    assert!(!given_up.socket().exists(), "the device is gone");
    check_salvage(given_up, fork, written);
    assert_eq!(kept.place.run(&["verify", "g", "--peer", other]).code, 0);
    kept.place.run(&["detach", "g"]).expect(0, &[]);
    until("all is applied", || (given_up.status()["applied_lsn"] == kept.status()["tail_lsn"]).then_some(()));
    given_up.stop();
    kept.stop();
    assert_eq!(first_difference(&kept.backing("data"), &given_up.backing("data")), None);
}

#[test]
fn both_sides_say_so_and_the_one_that_is_given_up_is_saved() {
    let mut torn = torn(false);
    let (mut random, mut second, mut third) = (Random(1), Written::new(), Written::new());
    scribble(&torn.pair.shadow, &mut random, 60, &mut second);
    scribble(&torn.third, &mut random, 40, &mut third);
    torn.join();
    // Both go on serving; neither applies anything of the other.
    scribble(&torn.pair.shadow, &mut random, 10, &mut second);
    scribble(&torn.third, &mut random, 10, &mut third);
    for (node, written) in [(&torn.pair.shadow, &second), (&torn.third, &third)] {
        let mut client = Client::connect(&node.socket(), "data").unwrap();
        for (sector, data) in written {
            assert!(client.read(sector * SECTOR as u64, SECTOR).unwrap() == *data, "sector {sector}");
        }
    }
    resolve(&mut torn, true, &third);
}

#[test]
fn the_side_that_had_fewer_of_the_primarys_writes_is_given_up() {
    let mut torn = torn(true);
    let (mut random, mut written) = (Random(2), Written::new());
    scribble(&torn.pair.shadow, &mut random, 30, &mut Written::new());
    scribble(&torn.third, &mut random, 40, &mut written);
    torn.join();
    resolve(&mut torn, true, &written);
}

#[test]
fn the_side_that_had_more_of_the_primarys_writes_is_given_up() {
    let mut torn = torn(true);
    let (mut random, mut written) = (Random(3), Written::new());
    for piece in 20..26u64 {
        let at = piece * crate::outage::PIECE as u64 % SIZE / SECTOR as u64;
        written.extend((at..).zip(crate::outage::noise(piece).chunks(SECTOR).map(<[u8]>::to_vec)));
    }
    scribble(&torn.pair.shadow, &mut random, 30, &mut written);
    scribble(&torn.third, &mut random, 40, &mut Written::new());
    torn.join();
    resolve(&mut torn, false, &written);
}
