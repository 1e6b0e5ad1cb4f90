"""Two nodes with Pacemaker and a quorum device, PostgreSQL on a volrep device, and a client on the virtual IP.

Runs as root in namespaces of its own (mount, pid, net), so that all of it ends with this process:
    unshare --mount --pid --net --fork --kill-child --mount-proc cluster.py VOLREP SCRATCH ROUNDS [SCENARIO...]

The client writes rows with rising numbers and logs those whose commit was acknowledged; that log lies outside of the nodes. After
each scenario: exactly one node has the device, every logged row is there, and the client works again on the same address.
recipes.py runs the other configurations, in labs that differ from this one in what they override.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

sys.dont_write_bytecode = True  # the tree may be read-only, and stays clean

from outside import HANG, NODES, OUTSIDE, Client, Far, run, say, until

HERE = os.path.dirname(os.path.abspath(__file__))
TOOLS = os.path.join(HERE, "..", "..", "tools", "ocf")
QNETD = "/run/corosync-qnetd"
BOUND = 30.0  # seconds from the loss of quorum to a device that acknowledges nothing; see tools/ocf/README.md

COROSYNC = """
totem {
  version: 2
  cluster_name: lab
  transport: udpu
  token: 1000
  consensus: 1200
  interface {
    ringnumber: 0
    bindnetaddr: 10.77.0.0
    mcastport: 5405
  }
}
system {
  sched_rr: yes
  move_to_root_cgroup: no
}
nodelist {
  node {
    ring0_addr: 10.77.0.1
    name: a
    nodeid: 1
  }
  node {
    ring0_addr: 10.77.0.2
    name: b
    nodeid: 2
  }
}
quorum {
  provider: corosync_votequorum
  device {
    model: net
    votes: 1
    timeout: 2000
    sync_timeout: 4000
    net {
      host: 10.77.0.3
      algorithm: ffsplit
      tls: off
      connect_timeout: 1000
    }
  }
}
logging {
  to_logfile: yes
  logfile: /var/log/corosync.log
  to_syslog: no
  timestamp: hires
}
"""


class Node:
    """A machine: its overlay and disk stay when it is killed, as a real one's disks do."""

    def __init__(self, name, top, volrep):
        self.name, self.top, self.dir = name, top, os.path.join(top, name)
        self.root = os.path.join(self.dir, "root")
        self.proc = self.pid = None
        self.addresses = [f"{NODES[name]}/24"]
        self.cgroup = ""  # one of its own makes systemd its init
        for part in ("upper", "work", "root"):
            os.makedirs(os.path.join(self.dir, part))
        upper = os.path.join(self.dir, "upper")
        self.put(volrep, upper, "usr/local/bin/volrep")
        self.put(os.path.join(TOOLS, "group"), upper, "usr/lib/ocf/resource.d/volrep/group")
        self.put(os.path.join(TOOLS, "pg_ctl"), upper, "usr/lib/volrep/pg_ctl")
        self.put(os.path.join(HERE, "fence_lab"), upper, "usr/sbin/fence_lab")
        self.write("etc/corosync/corosync.conf", COROSYNC)

    @staticmethod
    def put(source, root, path):
        target = os.path.join(root, path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy(source, target)
        os.chmod(target, 0o755)

    def write(self, path, text):
        target = os.path.join(self.dir, "upper", path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w") as out:
            out.write(text)

    def boot(self):
        log = open(os.path.join(self.dir, "console"), "ab")
        self.proc = subprocess.Popen(
            ["unshare", "-n", "-m", "-u", "-i", "-p", "-f", "--kill-child", "bash", os.path.join(HERE, "node.sh"), self.name, self.top, self.cgroup],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        children = f"/proc/{self.proc.pid}/task/{self.proc.pid}/children"

        def init():
            with open(children) as file:
                pids = file.read().split()
            # The chroot has been done once init has a child of its own.
            return pids and os.path.realpath(f"/proc/{pids[0]}/root") == self.root and pids[0]

        self.pid = until(f"{self.name} boots", init)
        run("ip", "link", "add", f"v{self.name}", "type", "veth", "peer", "name", "eth0", "netns", self.pid)
        run("ip", "link", "set", f"v{self.name}", "master", "sw", "up")
        self.run("ip", "link", "set", "lo", "up")
        for address in self.addresses:
            self.run("ip", "addr", "add", address, "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        if self.cgroup:
            until(f"{self.name} has systemd on its D-Bus", lambda: subprocess.run(self.inside("busctl", "status", "org.freedesktop.systemd1"), capture_output=True).returncode == 0)

    def inside(self, *args):
        return ["nsenter", "-t", self.pid, "-m", "-u", "-i", "-n", "-p", f"--root={self.root_fd()}", f"--wd={self.root_fd()}", "env", "-i",
                "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=/run", f"TEST_SUITE_RUN={os.environ.get('TEST_SUITE_RUN', '')}", *args]

    def root_fd(self):
        return f"/proc/{self.pid}/root"

    def run(self, *args, **more):
        return run(*self.inside(*args), **more)

    def spawn(self, *args, log):
        with open(os.path.join(self.dir, log), "ab") as out:
            return subprocess.Popen(self.inside(*args), stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def cluster(self):
        """What the init system would start."""
        corosync = self.spawn("corosync", "-f", log="corosync")

        def ready():
            assert corosync.poll() is None, f"corosync on {self.name} ended: see {self.dir}/corosync"
            return subprocess.run(self.inside("corosync-cfgtool", "-s"), capture_output=True).returncode == 0
        until(f"corosync on {self.name}", ready)
        self.spawn("corosync-qdevice", "-f", log="qdevice")
        self.spawn("pacemakerd", "-f", log="pacemaker")

    def kill(self):
        """kill -9 of all that runs there, at once: its init ends."""
        if self.proc:
            os.kill(int(self.pid), signal.SIGKILL)
            self.proc.wait(timeout=HANG)
            self.proc = None
            subprocess.run(["ip", "link", "del", f"v{self.name}"], capture_output=True)

    def status(self):
        if not self.proc:
            return {}
        done = subprocess.run(self.inside("volrep", "status", "epic", "--json"), capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode == 0 and done.stdout else {}

    def writes(self):
        s = self.status()
        return s.get("role") == "primary" and any(v["device"] for v in s["volumes"])

    def cut(self, whole):
        run("ip", "link", "set", f"v{self.name}", "down" if whole else "up")


class Fencer(threading.Thread):
    """Kills the nodes that the fence agent names."""

    def __init__(self, lab):
        super().__init__(daemon=True)
        self.lab, self.dir, self.done = lab, os.path.join(lab.top, "fence"), []
        os.makedirs(self.dir)

    def run(self):
        while True:
            for ask in os.listdir(self.dir):
                if re.fullmatch(r"ask\.\w+", ask):
                    path = os.path.join(self.dir, ask)
                    with open(path) as file:
                        name = file.read().strip()
                    os.remove(path)
                    self.lab.nodes[name].kill()
                    self.done.append(name)
                    say(f"fenced {name}")
                    open(path + ".done", "w").close()
            time.sleep(0.02)


class Lab:
    RECIPE, SIZE, MKFS, PLACE = "postgresql.crm", "192M", "mkfs.ext4", "/pg"
    SYNC = True  # each other's sync set, and a remote shadow besides
    LINK = NODES  # where the daemons listen

    def __init__(self, volrep, top, far):
        self.far = Far(volrep, far) if self.SYNC else None
        # Its loop devices are known by the volume's name: those of a node that was killed stay.
        self.top, self.volume = top, os.path.basename(os.path.dirname(top)).lstrip(".")
        run("mount", "--make-rprivate", "/")
        run("mount", "-t", "tmpfs", "-o", "size=1500m", "tmpfs", top)
        os.makedirs(QNETD, exist_ok=True)
        run("mount", "-t", "tmpfs", "tmpfs", QNETD)  # another one, elsewhere, is none of this lab's business
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "sw", "type", "bridge")
        run("ip", "addr", "add", f"{OUTSIDE}/24", "dev", "sw")
        run("ip", "link", "set", "sw", "up")
        os.chmod(top, 0o755)
        self.nodes = {name: Node(name, top, volrep) for name in NODES}
        self.fencer = Fencer(self)
        self.client = Client()
        self.bounds = {}

    def disk(self, name, real):
        os.makedirs(os.path.join(real, name))
        path = os.path.join(self.top, name, "disk")
        os.makedirs(path)
        run("mount", "--bind", os.path.join(real, name), path)

    def set_up(self):
        """The group, and a database on it, made on a."""
        a, b = self.nodes["a"], self.nodes["b"]
        a.boot()
        b.boot()
        here, there = (f"{self.LINK[n]}:7654" for n in "ab")
        sizes = ("--journal-size", "128M", "--cache-size", "16M")
        sync = ("--sync", f"b={there}") if self.SYNC else ()
        a.run("volrep", "init", "epic", "--node", "a", "--listen", here, *sizes, *sync, "--volume", f"{self.volume}=/var/lib/volrep/data.img:{self.SIZE}")
        token = a.run("volrep", "token", "epic", "--peer", "b").strip()
        b.run("volrep", "join", token, "--node", "b", "--listen", there, *sizes, "--volume", f"{self.volume}=/var/lib/volrep/data.img")
        if self.SYNC:
            b.run("sed", "-i", "s/^sync = false/sync = true/", "/etc/volrep/epic.toml")
            far = a.run("volrep", "token", "epic", "--peer", "c").strip()
        first = a.spawn("volrep", "serve", "epic", log="volrep.first")
        second = b.spawn("volrep", "serve", "epic", log="volrep.first")
        until("a serves", lambda: a.status().get("state") == "UpToDate")
        a.run("volrep", "attach", "epic")
        a.run(self.MKFS, "-q", "/dev/volrep/epic")
        for node in (a, b):
            node.run("mkdir", "-p", self.PLACE)
        a.run("mount", "/dev/volrep/epic", self.PLACE)
        data = f"{self.PLACE}/cluster"
        a.run("install", "-d", "-o", "postgres", "-m", "700", data)
        as_postgres = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")
        pg = "/usr/lib/postgresql/15/bin/"
        a.run(*as_postgres, pg + "initdb", "-k", "-A", "trust", "-D", data)
        a.run("sh", "-c", f"echo host all all 10.77.0.0/24 trust >>{data}/pg_hba.conf")
        a.run("sh", "-c", f"echo 'create table log (n bigint primary key)' | setpriv --reuid=postgres --regid=postgres --clear-groups {pg}postgres --single -D {data} postgres")
        a.run("umount", self.PLACE)
        a.run("volrep", "detach", "epic")
        if self.SYNC:
            until("b is in the sync set", lambda: a.status().get("sync_set") == ["b"])
            self.far.join(far, self.volume)
            self.far.follows(a, "set up")
        else:
            until("b has its first copy", lambda: b.status().get("state") == "UpToDate")
        for node, process in ((a, first), (b, second)):
            with open(os.path.join(self.top, node.name, "disk", "epic", "lock")) as file:
                node.run("kill", file.read().strip())
            process.wait(timeout=HANG)

    def start_cluster(self):
        self.fencer.start()
        self.start_qnetd()
        for node in self.nodes.values():
            node.cluster()
        a = self.nodes["a"]

        def online():
            done = subprocess.run(a.inside("crm_mon", "-1"), capture_output=True, text=True)
            return "Online: [ a b ]" in done.stdout and "with quorum" in done.stdout
        until("both nodes are online", online)
        say("both nodes are online")
        self.configure(a)
        self.client.start()
        until("the client commits", lambda: len(self.client.acked) > 20)
        say(f"the client commits on {self.writer()}")

    def recipe(self):
        """As it stands."""
        with open(os.path.join(TOOLS, self.RECIPE)) as file:
            return file.read()

    def crm(self):
        """The whole configuration, for crm's `configure load replace`."""
        fence = "".join(f"primitive fence-{n} stonith:fence_lab params port={n} pcmk_host_list={n} op monitor interval=60s timeout=20s\n" for n in NODES)
        return self.give("recipe.crm", fence + self.recipe())

    def configure(self, node):
        node.run("crm", "-F", "configure", "load", "replace", self.crm())

    def give(self, name, text):
        """A file that both nodes see; its path there."""
        with open(os.path.join(self.top, "fence", name), "w") as out:
            out.write(text)
        return f"/run/fence/{name}"

    def close(self):
        pass

    def start_qnetd(self):
        self.qnetd = subprocess.Popen(["corosync-qnetd", "-f", "-s", "off"], stdin=subprocess.DEVNULL,
                                      stdout=open(os.path.join(self.top, "qnetd"), "ab"), stderr=subprocess.STDOUT)

    def writer(self):
        who = [n for n, node in self.nodes.items() if node.writes()]
        assert len(who) == 1, f"writers: {who}"
        return who[0]

    def other(self, name):
        return "b" if name == "a" else "a"

    def whole(self):
        """Both nodes are there, the other is a member of the sync set, and it was no full resync."""
        def ok():
            who = [n for n, node in self.nodes.items() if node.writes()]
            if len(who) != 1:
                return False
            w, s = self.nodes[who[0]].status(), self.nodes[self.other(who[0])].status()
            return w.get("sync_set") == [self.other(who[0])] and s.get("state") == "UpToDate" and s.get("role") == "shadow" and (w, s)
        w, s = until("the pair is whole again", ok)
        job = s.get("refresh")
        if job:
            say(f"  {job['cause']} of {job['shadow']}: {job['total'] >> 10} KiB of {s['volumes'][0]['size'] >> 10} compared, {job['differ'] >> 10} differed")
            assert job["total"] < s["volumes"][0]["size"] // 2, f"a full resync: {job}"

    def back(self, name):
        node = self.nodes[name]
        if not node.proc:
            node.boot()
            node.cluster()

    def check(self, scenario, begun, before, reboot=()):
        """`reboot`: nodes that the cluster may fence yet, and that come back then."""
        def again():
            for name in reboot:
                self.back(name)
            return len(self.client.acked) > before and self.client.times[-1] > begun + 0.5 and self.client.times[-1] > time.monotonic() - 1
        until(f"{scenario}: the client commits again", again)
        steady = len(self.client.acked)
        until(f"{scenario}: and goes on", lambda: len(self.client.acked) > steady + 20)
        who = self.writer()
        acked = set(self.client.acked)
        lost = acked - self.client.rows()
        assert not lost, f"{scenario}: acknowledged and lost: {sorted(lost)[:20]}"
        outage = self.client.outage(begun)
        if self.far:
            self.far.follows(self.nodes[who], scenario)
        say(f"{scenario}: on {who}, outage {outage:.2f} s, {len(acked)} commits, none lost")
        return who, outage


def agent(lab):
    """The agent by itself, without a cluster: its codes, and what ocf-tester asks of it."""
    a, b = lab.nodes["a"], lab.nodes["b"]
    path = "/usr/lib/ocf/resource.d/volrep/group"

    def call(node, action, **more):
        settings = {"OCF_ROOT": "/usr/lib/ocf", "OCF_RESOURCE_INSTANCE": "epic", "OCF_RESKEY_group": "epic", **more}
        begun = time.monotonic()
        done = subprocess.run(node.inside("env", *(f"{k}={v}" for k, v in settings.items()), path, action),
                              capture_output=True, text=True, timeout=HANG)
        say(f"  {node.name}: {action}: {done.returncode} in {time.monotonic() - begun:.2f} s")
        return done.returncode

    def kill(node):
        with open(os.path.join(lab.top, node.name, "disk", "epic", "lock")) as file:
            node.run("kill", "-9", file.read().strip())

    assert call(a, "validate-all") == 0
    assert call(a, "validate-all", OCF_RESKEY_rpo="soon") == 6
    assert call(a, "validate-all", OCF_RESKEY_group="nobody") == 5
    assert call(a, "monitor") == 7
    # The other is a member of the sync set: a FLUSH needs it.
    assert call(b, "start") == 0 and call(b, "monitor") == 0
    assert call(a, "start") == 0 and call(a, "start") == 0 and call(a, "monitor") == 0 and not a.writes()
    assert call(a, "promote") == 0 and call(a, "promote") == 0 and call(a, "monitor") == 8 and a.writes()
    assert call(a, "demote") == 0 and call(a, "demote") == 0 and call(a, "monitor") == 0 and not a.writes()
    # A device that is in use: the daemon ends, so that its users get errors.
    assert call(a, "promote") == 0
    a.run("mount", "/dev/volrep/epic", "/pg")
    assert call(a, "demote") == 0 and call(a, "monitor") == 7
    late = subprocess.run(a.inside("sh", "-c", "echo x >/pg/x && sync -f /pg/x"), capture_output=True, timeout=HANG)
    assert late.returncode != 0, "a sync succeeded on a demoted primary"
    a.run("umount", "/pg")
    assert call(a, "start") == 0 and call(a, "monitor") == 0 and call(a, "promote") == 0
    kill(a)
    until("a killed daemon is noticed", lambda: call(a, "monitor") == 7)
    # A member of the sync set is lost, and nobody vouches for it: a FLUSH waits until it is back. To attach needs none.
    assert call(a, "start") == 0 and call(b, "stop") == 0 and call(a, "promote") == 0
    flush = subprocess.Popen(a.inside("dd", "if=/dev/volrep/epic", "of=/dev/volrep/epic", "bs=4k", "count=1", "conv=notrunc,fsync"), stderr=subprocess.DEVNULL)
    until("a FLUSH waits", lambda: a.status()["state"] == "Blocked")
    assert call(a, "monitor") == 8 and flush.poll() is None
    assert call(b, "start") == 0 and flush.wait(timeout=HANG) == 0 and call(a, "monitor") == 8 and a.writes()
    kill(a)
    until("a killed daemon is noticed", lambda: call(a, "monitor") == 7)
    # Nobody vouches for the other node.
    assert call(b, "promote") == 1 and call(b, "monitor") == 0 and not b.writes()
    assert call(a, "stop") == 0 and call(a, "stop") == 0 and call(a, "monitor") == 7
    told = a.run("ocf-tester", "-n", "epic", "-o", "group=epic", path)
    assert "passed all tests" in told, told
    a.run("xmllint", "--noout", "-", input=a.run("env", "OCF_ROOT=/usr/lib/ocf", path, "meta-data"))
    assert call(b, "stop") == 0
    say("the agent by itself: true")


def unfenced(lab):
    """With fencing dead a lost node is not replaced; once it is repaired, it is."""
    name = lab.writer()
    node, other = lab.nodes[name], lab.nodes[lab.other(name)]
    before, begun, dead = len(lab.client.acked), time.monotonic(), os.path.join(lab.top, "fence", "dead")
    say(f"unfenced: {name}")
    open(dead, "w").close()
    node.cut(True)
    while time.monotonic() < begun + 12:
        assert not other.writes(), "promoted without fencing"
        time.sleep(0.2)
    assert node.proc
    os.remove(dead)
    other.run("stonith_admin", "--fence", name)
    who, outage = lab.check("unfenced", begun, before)
    assert who != name
    lab.back(name)
    lab.whole()
    return outage


def shadow(lab):
    """The shadow's node dies: FLUSH waits until the cluster has fenced it, then goes on without it, and it comes back as a member."""
    name = lab.writer()
    node, other = lab.nodes[name], lab.nodes[lab.other(name)]
    before, begun = len(lab.client.acked), time.monotonic()
    say(f"shadow: {other.name}")
    other.kill()
    until("the shadow is outdated", lambda: any(p["outdated"] for p in node.status()["peers"] if p["name"] == other.name))
    who, outage = lab.check("shadow", begun, before)
    assert who == name and node.status()["ack_level"] == "local"
    lab.back(other.name)
    lab.whole()
    return outage


def qdevice(lab):
    """The quorum device alone is lost: nothing moves, and writes go on."""
    name = lab.writer()
    before, begun = len(lab.client.acked), time.monotonic()
    say(f"qdevice: {name} writes")
    lab.qnetd.kill()
    lab.qnetd.wait(timeout=HANG)
    while time.monotonic() < begun + 12:
        assert lab.writer() == name
        time.sleep(0.2)
    assert all(node.proc for node in lab.nodes.values()), "somebody was fenced"
    who, outage = lab.check("qdevice", begun, before)
    assert who == name
    lab.start_qnetd()
    for node in lab.nodes.values():
        until(f"{node.name} has the quorum device back",
              lambda: re.search(r"Total votes:\s+3", subprocess.run(node.inside("corosync-quorumtool", "-s"), capture_output=True, text=True).stdout))
    return outage


def probe(node):
    """Writes durably to the device in the node itself, as fast as it goes; each success is one line with its time."""
    return subprocess.Popen(node.inside("sh", "-c", "touch /pg/probe; while dd if=/dev/zero of=/pg/probe bs=512 count=1 oflag=dsync conv=notrunc,nocreat 2>/dev/null; do cut -d' ' -f1 /proc/uptime; sleep 0.01; done"),
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def uptime():
    with open("/proc/uptime") as file:
        return float(file.read().split()[0])


def stops(lab, node, cut, what):
    """Without quorum the device goes away; seconds from the cut to that, and to the last write that it has acknowledged."""
    writes = probe(node)
    until("the probe writes", lambda: writes.stdout.readline())
    at = uptime()
    cut()
    until(f"{what}: {node.name} stops", lambda: not node.writes())
    gone = uptime() - at
    told, _ = writes.communicate(timeout=HANG)
    last = max([float(line) - at for line in told.split()] + [0.0])
    say(f"{what}: {node.name} acknowledged its last write {max(last, 0.0):.2f} s after the cut, its device was gone after {gone:.2f} s")
    lab.bounds.setdefault(what, []).append((last, gone))
    assert last <= BOUND and gone <= BOUND, f"{what}: later than {BOUND} s"


def isolated(lab):
    """Both links of the primary are cut, and the other node sees nobody either: nothing moves, and the device stops."""
    name = lab.writer()
    node, other = lab.nodes[name], lab.nodes[lab.other(name)]
    before, begun = len(lab.client.acked), time.monotonic()
    say(f"isolated: {name} writes")

    def cut():
        for n in lab.nodes.values():
            n.cut(True)
    stops(lab, node, cut, "isolated")
    while time.monotonic() < begun + 15:
        assert not other.writes(), "promoted without quorum"
        time.sleep(0.2)
    for n in lab.nodes.values():
        if n.proc:
            n.cut(False)
    lab.check("isolated", begun, before)
    lab.back(name)
    lab.back(other.name)
    lab.whole()
    return None


def alone(lab):
    """The shadow is lost and outdated, so the primary acknowledges alone; then it is cut off, too, and stops."""
    name = lab.writer()
    node, other = lab.nodes[name], lab.nodes[lab.other(name)]
    before, begun = len(lab.client.acked), time.monotonic()
    say(f"alone: {name} writes")
    other.kill()
    until("the shadow is outdated", lambda: any(p["outdated"] for p in node.status()["peers"] if p["name"] == other.name))
    lab.check("alone, the shadow lost", begun, before)
    before, begun = len(lab.client.acked), time.monotonic()
    stops(lab, node, lambda: node.cut(True), "alone")
    # The other comes back without its primary: it lacks what was acknowledged since, and must not be promoted.
    lab.back(other.name)
    while time.monotonic() < begun + 25:
        assert not other.writes(), "an outdated member was promoted"
        time.sleep(0.2)
    if node.proc:
        node.cut(False)
    else:
        lab.back(name)
    who, _ = lab.check("alone", begun, before, reboot=(name,))
    lab.back(lab.other(who))
    lab.whole()
    return None


def move(lab, to):
    """As an administrator moves it: to that node, and no preference stays."""
    node = lab.nodes[lab.writer()]
    node.run("crm_resource", "--move", "--resource", "epic-clone", "--promoted", "--node", to)
    # The command only asks for it: until it is done the client is served as before.
    until("it has moved", lambda: lab.nodes[to].writes())
    node.run("crm_resource", "--clear", "--resource", "epic-clone")


def failback(lab):
    """The node is killed, comes back as a shadow by changes alone, and gets its place back."""
    name = lab.writer()
    before, begun = len(lab.client.acked), time.monotonic()
    say(f"failback: {name}")
    lab.nodes[name].kill()
    who, _ = lab.check("failback, killed", begun, before)
    assert who != name, f"failback: it stayed on {name}"
    lab.back(name)
    lab.whole()
    before, begun = len(lab.client.acked), time.monotonic()
    move(lab, name)
    who, outage = lab.check("failback", begun, before)
    assert who == name, f"failback: it is on {who}"
    lab.whole()
    return outage


def forget_failures(lab):
    """So that the next disturbance does not add to the failures of this one. Not by `crm_resource --cleanup`: that forgets that
    the instance is promoted, and restarts what depends on it."""
    writer = lab.nodes[lab.writer()]
    told = writer.run("cibadmin", "--query", "--xpath", "/cib/status")
    for name in set(re.findall(r'name="((?:fail-count|last-failure)-[^"]+)"', told)):
        for node in NODES:
            writer.run("attrd_updater", "--name", name, "--delete", "--node", node)
    until("nobody has failed", lambda: "fail-count-" not in writer.run("cibadmin", "--query", "--xpath", "/cib/status"))


def remote(lab):
    """Both nodes are lost for good: the remote shadow is promoted by hand, and lacks the newest commits at most. The last scenario."""
    say(f"remote: {lab.writer()} writes")
    for node in lab.nodes.values():
        node.kill()
    acked = list(lab.client.acked)
    found = lab.far.take_over()
    lost = [n for n in acked if n not in found]
    say(f"remote: on c, {len(acked)} commits, the newest {len(lost)} lost")
    assert lost == acked[len(acked) - len(lost):], f"remote: lost in the middle: {lost[:20]}"


def disturb(lab, scenario):
    if scenario in SPECIAL:
        return SPECIAL[scenario](lab)
    name = lab.writer()
    node = lab.nodes[name]
    before, begun = len(lab.client.acked), time.monotonic()
    say(f"{scenario}: {name}")
    if scenario == "node":
        node.kill()
    elif scenario == "daemon":
        with open(os.path.join(lab.top, name, "disk", "epic", "lock")) as file:
            node.run("kill", "-9", file.read().strip())
    elif scenario == "database":
        with open(os.path.join(f"/proc/{node.pid}/root/pg/cluster/postmaster.pid")) as file:
            node.run("kill", "-9", file.readline().strip())
    elif scenario == "network":
        node.cut(True)
    elif scenario == "move":
        move(lab, lab.other(name))
    who, outage = lab.check(scenario, begun, before)
    if scenario in ("node", "network", "move"):
        assert who != name, f"{scenario}: it stayed on {name}"
    if scenario == "network":
        until(f"{name} is fenced", lambda: not node.proc)
    lab.back(name)
    lab.whole()
    return outage


# More of them in recipes.py.
SPECIAL = {"unfenced": unfenced, "shadow": shadow, "qdevice": qdevice, "isolated": isolated, "alone": alone,
           "failback": failback}


def main(make=Lab, scenarios=None):
    volrep, real, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    scenarios = scenarios or sys.argv[4:] or ["database", "daemon", "node", "network", "shadow", "qdevice", "isolated", "alone", "move", "failback", "unfenced", "remote", "agent"]
    top = os.path.join(real, "lab")
    os.makedirs(top)
    lab = make(volrep, top, os.path.join(real, "far"))
    # In a short run, which has to leave time to the suite beside it, fewer commits.
    lab.client.pause = 0.005 if rounds > 2 else 0.02
    for name in NODES:
        lab.disk(name, os.path.join(real))
    try:
        lab.set_up()
        say("set up")
        if "agent" in scenarios:
            agent(lab)
            scenarios = [s for s in scenarios if s != "agent"]
        if scenarios:
            lab.start_cluster()
        outages = {s: [] for s in scenarios if s != "remote"}
        last, scenarios = "remote" in scenarios, [s for s in scenarios if s != "remote"]
        for _ in range(rounds):
            for scenario in scenarios:
                outage = disturb(lab, scenario)
                forget_failures(lab)
                if outage is not None:
                    outages[scenario].append(outage)
        if last:
            remote(lab)
    except BaseException:
        for node in lab.nodes.values():
            if node.proc:
                print(subprocess.run(node.inside("crm_mon", "-1rfA"), capture_output=True, text=True).stdout, flush=True)
                print(json.dumps(node.status()), flush=True)
        raise
    finally:
        for node in lab.nodes.values():
            node.kill()
        lab.close()
        # Where the logs of the nodes are to be kept.
        keep = os.environ.get("CLUSTER_KEEP")
        for node in lab.nodes.values() if keep else []:
            shutil.copytree(node.dir, os.path.join(keep, node.name), dirs_exist_ok=True, symlinks=True,
                            ignore=shutil.ignore_patterns("root", "disk", "work", "usr", "*.wants"), ignore_dangling_symlinks=True)
    print("outage      rounds  p50 s  worst s")
    for scenario, values in outages.items():
        values.sort()
        if values:
            print(f"{scenario:<10} {len(values):>7} {values[len(values) // 2]:>6.2f} {values[-1]:>8.2f}")
    for what, values in lab.bounds.items():
        last, gone = max(v[0] for v in values), max(v[1] for v in values)
        print(f"{what}: last acknowledged {last:.2f} s after the cut at the latest, device gone after {gone:.2f} s")
    print("all true", flush=True)


if __name__ == "__main__":
    main()
