#!/usr/bin/python3
"""PostgreSQL on a replicated volume: live, cut off, killed, failed over, and the verdict.

Two nodes on loopback, `east` (primary) and `west` (shadow), a link between them that can be cut, and
a client that keeps an account of acknowledged commits outside of the volumes. Nothing is configured:
every default is volrep's own. Phases:

  set up      init, token, join, serve, attach, ext4, PostgreSQL, pgbench's tables
  live        pgbench and numbered commits; the lag as the shadow reports it
  link cut    nothing passes; restored, the shadow catches up in order
  kill -9     of the primary's daemon under load; restart; nothing acknowledged is missing
  disaster    link and primary gone in one instant, for good; the shadow promoted; PostgreSQL on it
  verdict     what was acknowledged against what is there

Everything is taken away at the end, also after an error or Ctrl-C.
"""
import argparse
import glob
import json
import os
import pwd
import shutil
import signal
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from stage import TOOLS, Database, Node, Screen, Stage, Trouble, Watch, count, span, wait  # noqa: E402

WRITERS = 3
CLIENTS = 4


class Quickstart:
    def __init__(self, options, screen, stage, binaries):
        self.o, self.screen, self.stage = options, screen, stage
        self.east, self.west = Node(stage, "east"), Node(stage, "west")
        self.db = Database(stage, binaries, "postgres")
        self.log, self.mount = stage.path("commits"), stage.path("mount")
        os.makedirs(self.log)
        os.makedirs(self.mount)
        self.largest, self.load, self.rounds = 0.0, [], 0
        self.seconds = dict(live=4, cut=1.5, after=1.5) if options.quick else dict(live=12, cut=4, after=3)

    def play(self):
        self.set_up()
        self.live()
        self.link_cut()
        self.killed()
        bound = self.disaster()
        self.failover()
        self.verdict(bound)

    # Pieces

    def link(self, *command):
        return self.stage.run(os.path.join(TOOLS, "linkcut"), "--control", self.stage.path("link.sock"), *command)

    def begin_load(self):
        """pgbench, and the numbered commits."""
        s, self.rounds = self.stage, self.rounds + 1
        name = f"commitlog-{self.rounds}"
        writer = s.start(name, os.path.join(TOOLS, "commitlog"), "write", "--dsn", self.db.dsn, "--log", self.log, "--writers", str(WRITERS))
        bench = s.start(f"pgbench-{self.rounds}", os.path.join(self.db.binaries, "pgbench"), "-n", "-h", self.db.sockets, "-U", "postgres", "-c", str(CLIENTS), "-T", "3600", "-P", "1", "postgres", user="postgres")
        self.load = [writer, bench]

        def writing():
            for process in self.load:
                if process.poll() is not None:
                    raise Trouble(f"{process.name} ended with {process.returncode}")
            return s.tail(name) == ["writing"]

        wait("the first commits", writing)

    def end_load(self):
        for process in self.load:
            self.stage.end(process)
        self.load = []

    def in_step(self, seconds=60):
        """Waits until the shadow has applied all that the primary had sealed before."""
        tail = self.east.status()["tail_lsn"]
        wait(f"the shadow to apply LSN {tail}", lambda: self.west.status()["applied_lsn"] >= tail, seconds)
        return tail

    def watched(self, seconds, period=0.2):
        watch = Watch(self.east, self.west, period)
        watch.start()
        time.sleep(seconds)
        samples = watch.stop()
        self.see([s for _, _, s in samples])
        return samples

    def see(self, states):
        for lag in (s["lag"] for s in states if s["lag"]):
            self.largest = max(self.largest, lag["seconds"], lag["applied"]["max"])

    def settle(self, mount, device):
        """Mounts (which replays ext4's journal), and starts PostgreSQL (which replays its own)."""
        self.stage.run("mount", device, mount)
        took, recovered = self.db.start(mount)
        self.screen.check(recovered, f"ext4 and PostgreSQL recovered from their journals in {span(took)}", "PostgreSQL found nothing to recover: it was not a crash")

    def compare(self):
        out = self.stage.run(os.path.join(TOOLS, "commitlog"), "compare", "--dsn", self.db.dsn, "--log", self.log, "--json", check=False)
        result = json.loads(out)
        # pgbench's own promise: each transaction changed all four of its tables, or none.
        sums = self.db.sql("select (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers), (select sum(bbalance) from pgbench_branches), (select coalesce(sum(delta), 0) from pgbench_history)").split("|")
        result["whole"] = len(set(sums)) == 1
        return result

    # Phases

    def set_up(self):
        screen, s, o = self.screen, self.stage, self.o
        screen.phase("Set up: two nodes, a device, a database")
        listen = "127.0.0.1:%d" % o.port if o.port else "127.0.0.1:%d" % free_port()
        self.east.volrep("init", "demo", "--node", "east", "--listen", listen, "--volume", f"data={s.path('east.img')}:{o.size}")
        token = self.east.volrep("token", "demo", "--peer", "west")
        s.start("link", os.path.join(TOOLS, "linkcut"), "--listen", "127.0.0.1:0", "--to", listen, "--control", s.path("link.sock"))
        link = wait("the link", lambda: (s.tail("link") or [None])[0])
        # The token names the peers' own address; the link lies before it.
        self.west.volrep("join", token, "--node", "west", "--listen", "none", "--from", link, "--volume", f"data={s.path('west.img')}")
        self.east.serve()
        self.west.serve()
        device = self.east.volrep("attach", "demo", "--device", "fuse")
        screen.fact(f"east is the primary on {listen}, west its shadow through the link {link}")
        s.run("mkfs.ext4", "-q", device)
        s.run("mount", device, self.mount)
        size = s.run("blockdev", "--getsize64", device)
        screen.fact(f"{int(size) >> 20} MiB {os.path.realpath(device)} (FUSE and a loop device), ext4 on it")
        self.db.create(self.mount)
        self.db.start(self.mount)
        scale = 2 if o.quick else 10
        self.db.sql("create extension amcheck")
        self.db.run("pgbench", "-i", "-q", "-s", str(scale), "-h", self.db.sockets, "postgres")
        version = self.db.sql("show server_version").split()[0]
        tail = self.in_step()
        screen.check(True, f"PostgreSQL {version} with checksums, pgbench scale {scale}: {count(tail, 'record')}, all applied on west")

    def live(self):
        screen = self.screen
        screen.phase(f"Live: pgbench with {CLIENTS} clients, {WRITERS} writers of numbered commits")
        # Lag is counted from a daemon's start: this one's should tell of the load, not of the set-up.
        self.stage.end(self.west.process, seconds=30)
        self.west.serve()
        self.in_step()
        self.begin_load()
        samples = self.watched(self.seconds["live"])
        lag = samples[-1][2]["lag"]
        applied = lag["applied"]
        rate = (samples[-1][1]["tail_lsn"] - samples[0][1]["tail_lsn"]) / (samples[-1][0] - samples[0][0])
        tps = [line.split()[3] for line in self.stage.tail("pgbench-1", 60) if line.startswith("progress")]
        if tps:
            screen.fact(f"pgbench {float(tps[-1]):.0f} transactions/s, {rate:.0f} records/s")
        screen.fact(f"lag at the end {lag['records']} records; most seen {max(s['lag']['records'] for _, _, s in samples)}")
        names = ", ".join(f"{q} {span(applied[q])}" for q in ("p50", "p99", "max"))
        screen.check(lag["count"] > 0 and samples[-1][2]["state"] == "UpToDate", f"lag from seal to applied: {names} over {count(lag['count'], 'record')}")

    def link_cut(self):
        screen, cut = self.screen, self.seconds["cut"]
        screen.phase("Link cut: nothing passes, the primary goes on")
        before = self.west.status()["applied_lsn"]
        self.link("cut")
        samples = self.watched(cut)
        _, p, s = samples[-1]
        behind = p["tail_lsn"] - s["applied_lsn"]
        told = s["lag"]["seconds"]
        screen.check(behind > 0 and p["tail_lsn"] > before and told >= cut / 2, f"after {cut:g} s west is {count(behind, 'record')} and {span(told)} behind; west says {s['state']}")
        self.link("restore")
        begin = time.monotonic()
        seen = [s["applied_lsn"]]

        def caught_up():
            state = self.west.status()
            self.see([state])
            seen.append(state["applied_lsn"])
            return state["state"] == "UpToDate" and state["applied_lsn"] >= p["tail_lsn"]

        wait("the shadow to catch up", caught_up, 60, 0.05)
        screen.check(seen == sorted(seen), f"restored: caught up within {span(time.monotonic() - begin)}, LSN {seen[0]} to {seen[-1]}, in order", f"the shadow's position went back: {seen}")

    def killed(self):
        screen, s = self.screen, self.stage
        screen.phase("kill -9 of the primary's daemon under load, and its restart")
        time.sleep(self.seconds["after"])
        self.east.kill()
        screen.fact("killed: the device gives errors, PostgreSQL stops")
        self.end_load()
        self.db.stop(signal.SIGQUIT)
        s.unmount(self.mount)
        begin = time.monotonic()
        self.east.serve()
        device = self.east.volrep("attach", "demo", "--device", "fuse")
        screen.fact(f"restarted and attached again within {span(time.monotonic() - begin)}")
        self.settle(self.mount, device)
        r = self.compare()
        screen.check(r["lost"] == 0 and r["acknowledged"] > 0, f"{count(r['acknowledged'], 'acknowledged commit')}, {r['lost']} lost", f"{count(r['lost'], 'acknowledged commit')} of {r['acknowledged']} lost on a restart")
        screen.check(r["prefix"] and r["whole"], "rows 1..k of each writer without a gap, pgbench's sums agree", f"not a prefix: {'; '.join(r['why']) or 'pgbench`s sums differ'}")
        self.in_step()

    def disaster(self):
        """Returns since when an acknowledged commit may be missing: what was acknowledged before is on the shadow."""
        screen = self.screen
        screen.phase(f"Disaster: a shadow at {self.o.rtt:g} ms, then link and primary gone in one instant")
        self.link("rtt", str(self.o.rtt))
        self.begin_load()
        watch = Watch(self.east, self.west, 0.05)
        watch.start()
        time.sleep(self.seconds["after"])
        samples = watch.stop()
        self.link("cut")
        self.east.kill()
        self.end_load()
        self.db.stop(signal.SIGQUIT)
        self.stage.unmount(self.mount)
        last = self.west.status()
        self.see([s for _, _, s in samples] + [last])
        # A commit acknowledged before the primary was asked is at or below the durable LSN it
        # told; once the shadow reported that much, the commit is there.
        held = max(last["durable_lsn"], max(s["durable_lsn"] for _, _, s in samples))
        sure = [at for at, p, _ in samples if p["durable_lsn"] <= held]
        if not sure:
            raise Trouble("the shadow never reported what the primary had")
        begin = time.monotonic()
        wait("west to give up east", lambda: self.west.status()["peers"][0]["state"] == "Disconnected")
        screen.fact(f"east is gone; west, which waits {span(time.monotonic() - begin)} more before it believes that, ends at LSN {last['tail_lsn']}")
        return max(sure)

    def failover(self):
        screen, s = self.screen, self.stage
        screen.phase("Failover: west promoted, PostgreSQL on it")
        begin = time.monotonic()
        self.west.volrep("promote", "demo", "--i-fenced-the-old-primary", "--yes")
        state = wait("west to serve", lambda: (lambda t: t if t["role"] == "primary" and t["state"] == "UpToDate" else None)(self.west.status()))
        device = self.west.volrep("attach", "demo", "--device", "fuse")
        screen.check(state["term"] > 1, f"west is the primary of term {state['term']}, attached within {span(time.monotonic() - begin)}", f"the term did not rise: {state['term']}")
        self.settle(self.mount, device)
        begin = time.monotonic()
        self.db.run("pg_amcheck", "-h", self.db.sockets, "--heapallindexed", "--parent-check", "postgres", timeout=120)
        screen.check(True, f"pg_amcheck: no damage in any table or index ({span(time.monotonic() - begin)})")

    def verdict(self, bound):
        screen = self.screen
        screen.phase("Verdict, from the log of acknowledged commits outside")
        r = self.compare()
        screen.fact(f"{count(r['acknowledged'], 'commit')} acknowledged on east by {r['writers']} writers, {r['present']} on west")
        screen.check(r["prefix"] and r["present"] > 0, "an exact prefix: rows 1..k of each writer, in order, without a gap", f"not a prefix: {'; '.join(r['why']) or 'nothing there'}")
        screen.check(r["whole"], "pgbench's four tables agree", "pgbench's four tables differ")
        early = [t for t in r["lost_at"] if t < bound]
        window = f"all of them younger than the shadow's last position ({span(max(r['lost_at']) - min(r['lost_at']))} wide)" if r["lost"] else "asynchronous: it could have been the last ones"
        screen.check(not early, f"{count(r['lost'], 'acknowledged commit')} lost in the failover, {window}", f"{len(early)} of {r['lost']} lost commits are older than the shadow's last position")
        screen.fact(f"largest lag seen: {span(self.largest)} (the link was cut for {self.seconds['cut']:g} s)")
        # The promoted node takes writes.
        self.db.sql("insert into commitlog (writer, n) values (-1, 1)")
        self.db.stop()
        self.stage.unmount(self.mount)
        self.west.volrep("detach", "demo")
        self.stage.end(self.west.process, seconds=30)
        self.stage.run("e2fsck", "-fn", self.stage.path("west.img"))
        screen.check(True, "west takes writes; stopped cleanly, its volume holds a clean ext4")


def free_port():
    import socket
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def binaries():
    """Where the newest server with pgbench and pg_amcheck lies."""
    found = [d for d in glob.glob("/usr/lib/postgresql/*/bin") if all(os.path.exists(os.path.join(d, p)) for p in ("postgres", "initdb", "pgbench", "pg_amcheck"))]
    return max(found, key=lambda d: int(d.split("/")[-2]), default=None)


def why_not():
    if os.geteuid() != 0:
        return "a block device needs root (mount, loop): run it as root. Without root volrep serves NBD: see README.md"
    for device in "/dev/fuse", "/dev/loop-control":
        if not os.access(device, os.R_OK | os.W_OK):
            return f"no {device} here: modprobe {'fuse' if 'fuse' in device else 'loop'}, or allow it to this container. Without it volrep serves NBD: see README.md"
    if not binaries():
        return "no PostgreSQL server of version 14 or later below /usr/lib/postgresql"
    return None


def main():
    parser = argparse.ArgumentParser(prog="tools/quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volrep", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="shorter phases, smaller tables")
    parser.add_argument("--keep", action="store_true", help="at the end wait for Enter or Ctrl-C, to look around")
    parser.add_argument("--dir", help="an empty or new directory to work in [default: a new one in /tmp]")
    parser.add_argument("--rtt", type=float, default=20, metavar="MS", help="round trip to the shadow in the disaster [default: 20]")
    parser.add_argument("--size", default="1G", help="size of the volume [default: 1G]")
    parser.add_argument("--port", type=int, help="the primary's port [default: a free one]")
    o = parser.parse_args()
    reason = why_not()
    if reason:
        print(f"quickstart: {reason}", file=sys.stderr)
        return 77
    if o.dir and os.path.isdir(o.dir) and os.listdir(o.dir):
        print(f"quickstart: {o.dir} is not empty", file=sys.stderr)
        return 2
    directory = o.dir or tempfile.mktemp(prefix="volrep-quickstart-")
    if len(directory) > 60:
        print(f"quickstart: {directory} is too long for the paths of sockets below it", file=sys.stderr)
        return 2
    return perform(o, directory)


def perform(o, directory):
    def interrupted(*_):
        raise KeyboardInterrupt

    for s in signal.SIGTERM, signal.SIGHUP:
        signal.signal(s, interrupted)
    screen, code = Screen(), 0
    stage = Stage(directory, os.path.realpath(o.volrep))
    screen.say(screen.paint("1", "volrep quickstart") + f"  PostgreSQL on a replicated volume, in {stage.dir}")
    try:
        Quickstart(o, screen, stage, binaries()).play()
    except KeyboardInterrupt:
        screen.say("\ninterrupted")
        code = 130
    except (Trouble, OSError, ValueError, KeyError) as e:
        screen.check(False, "", str(e) or type(e).__name__)
        for process in ("east", "west", "postgres", *(p.name for p in stage.processes if "-" in p.name)):
            lines = stage.tail(process)
            if lines:
                screen.say(f"\n{process}.log ends:\n  " + "\n  ".join(lines))
    code = code or (1 if screen.failures else 0)
    if o.keep and code != 130:
        keep(screen, stage, o)
    # A second Ctrl-C must not leave half of it.
    for s in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(s, signal.SIG_IGN)
    left = stage.clear()
    for line in left:
        screen.check(False, "", f"not cleaned up: {line}")
    total = f"in {time.monotonic() - screen.start:.0f} s; everything taken away" if not left else "something is left behind"
    if code != 130:
        code = 1 if screen.failures else 0
        word = screen.paint("32;1", "All true") if code == 0 else screen.paint("31;1", f"{len(screen.failures)} not true")
        screen.say(f"\n{word}, {total}")
    return code


def keep(screen, stage, o):
    screen.say(f"\nkept, with logs, in {stage.dir}; to look around:")
    for node in "east", "west":
        screen.say(f"  VOLREP_SHM_DIR={stage.shm}/{node} {stage.volrep} --config {stage.path(node)} status demo")
    screen.say("Enter (or Ctrl-C) takes it away")
    try:
        if sys.stdin.isatty():
            sys.stdin.readline()
        else:
            signal.pause()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    sys.exit(main())
