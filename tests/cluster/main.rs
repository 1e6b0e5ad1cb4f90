//! Failover by Pacemaker: two nodes and a quorum device in namespaces, PostgreSQL on a volrep device, a client outside.
//!
//! Owns: nothing; `cluster.py` runs in namespaces of its own, which end with it, and all that it started with them. Invariant:
//! after each disturbance exactly one node writes, and no acknowledged commit is lost. Only with VOLREP_LONG=1, or
//! VOLREP_CLUSTER=ROUNDS (each takes minutes), or VOLREP_CLUSTER=short, which leaves out `recipes.py`: the other configurations.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;

const PYTHON: &str = "/usr/bin/python3"; // Debian's own: another one in PATH would not see its modules

const SCENARIOS: [&str; 13] = [
    "agent", "database", "daemon", "node", "network", "shadow", "qdevice", "isolated", "alone", "move",
    "failback", "unfenced", "remote",
];

/// What fits into 80 s on a quiet machine.
const SHORT: [&str; 7] = ["agent", "database", "daemon", "node", "network", "move", "shadow"];

/// The labs of `recipes.py`.
const RECIPES: [&str; 4] = ["lsb", "systemd", "pcs", "rpo"];

/// One lab at a time: its figures are outages.
static ONE: Mutex<()> = Mutex::new(());

/// What can't be done here, if anything; `more` is needed, too.
fn missing(more: &[&str]) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("namespaces and mounts need root".into());
    }
    let files = [
        PYTHON,
        "/dev/fuse",
        "/dev/loop-control",
        "/usr/sbin/corosync",
        "/usr/sbin/corosync-qdevice",
        "/usr/bin/corosync-qnetd",
        "/usr/sbin/pacemakerd",
        "/usr/sbin/crm",
        "/usr/sbin/ocf-tester",
        "/usr/bin/xmllint",
        "/usr/bin/jq",
        "/usr/lib/ocf/resource.d/heartbeat/pgsql",
        "/usr/lib/postgresql/15/bin/postgres",
    ];
    if let Some(file) = files.iter().chain(more).find(|f| !Path::new(f).exists()) {
        return Some(format!("{file} is not there"));
    }
    let able = |program: &str, args: &[&str]| {
        let mut run = Command::new(program);
        run.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        run.status().is_ok_and(|s| s.success())
    };
    if !able(PYTHON, &["-c", "import psycopg2"]) {
        return Some("python3-psycopg2 is not there".into());
    }
    // The bridge and the overlay are what kernels lack.
    let lab = "mount -t tmpfs t /mnt && mkdir /mnt/u /mnt/w /mnt/r && \
               mount -t overlay o -o lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w /mnt/r && \
               ip link add sw type bridge && ip link add va type veth peer name vb";
    if !able("unshare", &["--mount", "--net", "sh", "-c", lab]) {
        return Some("no namespaces with an overlay, a bridge and veth".into());
    }
    None
}

fn lab(script: &str, rounds: &str, what: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster").join(script);
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc", PYTHON]);
    command.arg(script).arg(env!("CARGO_BIN_EXE_volrep")).arg(dir.path()).arg(rounds).args(what);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let (told, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{told}");
    detach(dir.path());
    assert!(output.status.success() && told.contains("all true"), "{errors}");
}

/// The loop devices of killed nodes, by their volume's name: nothing else takes them away before a reboot. And the cgroups of
/// nodes with a systemd of their own, if the lab did not come to its end.
fn detach(scratch: &Path) {
    let volume = format!("/{}", scratch.file_name().unwrap().to_str().unwrap().trim_start_matches('.'));
    for entry in unified().iter().flat_map(std::fs::read_dir).flatten().flatten() {
        let name = format!("/{}", entry.file_name().to_string_lossy());
        if name.starts_with(&volume.replacen('/', "/volrep-", 1)) {
            let all = ["-depth", "-type", "d", "-exec", "rmdir", "{}", ";"];
            Command::new("find").arg(entry.path()).args(all).status().unwrap();
        }
    }
    for n in 0..256 {
        let backing =
            std::fs::read_to_string(format!("/sys/block/loop{n}/loop/backing_file")).unwrap_or_default();
        if backing.trim_end().trim_end_matches(" (deleted)").ends_with(&volume) {
            Command::new("losetup").arg("--detach").arg(format!("/dev/loop{n}")).status().unwrap();
        }
    }
}

/// Where cgroups of version 2 are mounted.
fn unified() -> Option<String> {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let found = mounts.lines().map(|l| l.split(' ').collect::<Vec<_>>()).find(|f| f[2] == "cgroup2");
    found.map(|f| f[1].to_owned())
}

fn cluster(rounds: &str, what: &[&str]) {
    let _one = ONE.lock();
    match missing(&[]) {
        Some(why) => eprintln!("skipped: {why}"),
        None => lab("cluster.py", rounds, what),
    }
}

fn recipes(rounds: &str) {
    let _one = ONE.lock();
    let more = ["/usr/sbin/pcs", "/usr/sbin/mkfs.xfs", "/lib/systemd/systemd", "/usr/bin/dbus-daemon"];
    let grouped = unified().ok_or("no cgroups of version 2 are mounted".to_owned()).err();
    let why = missing(&more).or(grouped);
    match why {
        Some(why) => eprintln!("skipped: {why}"),
        None => RECIPES.iter().for_each(|which| lab("recipes.py", rounds, &[which])),
    }
}

fn long() -> bool {
    std::env::var("VOLREP_LONG").is_ok_and(|v| v != "0")
}

#[test]
fn the_agent_does_what_pacemaker_asks_and_a_pair_survives_what_happens_to_a_node() {
    match std::env::var("VOLREP_CLUSTER") {
        Ok(short) if short == "short" => cluster("1", &SHORT),
        Ok(rounds) => cluster(&rounds, &SCENARIOS),
        Err(_) if long() => cluster("10", &SCENARIOS),
        Err(_) => eprintln!("skipped: a round takes minutes: VOLREP_CLUSTER=1, or short"),
    }
}

#[test]
fn the_other_configurations_do_what_they_say() {
    match std::env::var("VOLREP_CLUSTER") {
        Ok(short) if short == "short" => eprintln!("skipped: minutes more: VOLREP_CLUSTER=1"),
        Ok(rounds) => recipes(&rounds),
        Err(_) if long() => recipes("3"),
        Err(_) => eprintln!("skipped: a round takes minutes: VOLREP_CLUSTER=1"),
    }
}
