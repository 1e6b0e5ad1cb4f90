#!/usr/bin/python3
"""Cycles of power cuts on one pair of guests: see tests/powercut/main.rs, which runs this.

Owns: the order of events. Invariant: a cycle begins with both nodes up to date and equal, and ends so.
"""
import argparse
import collections
import ctypes
import faulthandler
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from client import Client, Observer, check, connected  # noqa: E402
from guests import Disks, Failed, Gone, Machine, Wire, images, make_database, make_disk, make_tools, run, until  # noqa: E402

# What may happen in a cycle, in this order. The first five cycles of a run, unless it is told what to do: every word is there
# once, both ack levels, both kinds of devices; the mode is that of what follows.
WORDS = ["link", "daemon", "shadow-daemon", "shadow", "primary", "both", "again", "promote"]
SHORT = [("link,primary,promote", "local"), ("daemon,shadow", "local"), ("link,both,promote", "durable"),
         ("shadow-daemon,primary", "durable"), ("both,again", "local")]
TIMING = """
[timing]
silence = "3s"
checkpoint_after = "1s"
"""


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1, help="of the first cycle; each has the next one")
    parser.add_argument("--kind", help=f"what happens in each cycle, instead of what the seed says: words of {', '.join(WORDS)}")
    parser.add_argument("--mode", choices=["durable", "local"], help="the ack level of the first cycle; with --kind, of all")
    parser.add_argument("--device", choices=["ublk", "nbd"], help="of the first cycle; the next attach has the other one")
    parser.add_argument("--minutes", type=float, help="no cycle begins after so many")
    parser.add_argument("--record", action="store_true", help="add what was run to RESULTS.md beside this file")
    for name in ("volrep", "disks", "keep"):
        parser.add_argument(f"--{name}", required=True)
    return parser.parse_args()


def plan(seed):
    """What a cycle does, and its delays: from its seed alone."""
    draw = random.Random(seed)
    kind = []
    if draw.random() < 0.35:
        kind.append("link")
    if draw.random() < 0.25:
        kind.append(draw.choice(["daemon", "shadow-daemon"]))
    cut = draw.choice(["primary", "primary", "primary", "both", "both", "shadow", "shadow,primary", ""])
    kind += cut.split(",") if cut else []
    lost = "primary" in kind or "both" in kind
    if lost and draw.random() < 0.25:
        kind.append("again")
    if lost and draw.random() < 0.5:
        kind.append("promote")
    if not kind:
        kind.append(draw.choice(["link", "daemon", "shadow-daemon"]))
    return kind, draw.choice(["durable", "local"]), draw


def outage(draw):
    """Seconds: not noticed by the other side, or longer than the silence that is."""
    return draw.choice([draw.uniform(0, 2), draw.uniform(3.5, 6)])


class Lab:
    def __init__(self, args):
        self.args, self.begun, self.stage = args, time.monotonic(), "setting up"
        self.folder = tempfile.mkdtemp(prefix="pc.")
        self.disks = Disks(args.disks)
        self.wire = Wire(self.folder)
        self.last, self.counts, self.lost, self.commits, self.laps = {}, collections.Counter(), 0, 0, collections.Counter()
        self.client = Client(os.path.join(self.folder, "commits.log"))
        self.observer = Observer(self.client)
        image = images.image([], lambda text: print(f"image: {text}", flush=True))
        self.machines = [Machine(number, self, self.folder, image) for number in (1, 2)]
        self.primary, self.shadow = self.machines
        self.short = args.kind is None and args.seed == 1
        _, drawn, draw = plan(args.seed)
        self.mode = args.mode or ("durable" if self.short else drawn)
        self.device = args.device or ("ublk" if self.short else draw.choice(["ublk", "nbd"]))
        self.journal, self.on_full = ("16M", "block") if self.short else (draw.choice(["8M", "16M", "64M"]), draw.choice(["block", "behind"]))

    def now(self):
        return time.monotonic() - self.begun

    def say(self, text):
        print(f"{self.now():7.2f} {text}", flush=True)

    def lap(self, name, since):
        self.laps[name] += time.monotonic() - since

    # --- what is done to the machines

    def power_on(self, *which):
        since = time.monotonic()
        for each in which:
            each.power_on()
        for each in which:
            each.booted()
            each.act.run("serve")
        self.lap("booting", since)

    def cut(self, seed, *which):
        told = self.disks.tell("cut", seed, *(disk for each in which for disk in each.served))
        for each in which:
            each.power_off()
        self.say(f"  cut: {told}")

    def sync(self, node, mode):
        """The mode of what is served from there from the next start of its daemon on; whether it was another one."""
        if node.acks == mode:
            return False
        node.acks = mode
        node.act.run(f"sed -i 's/^sync = .*/sync = {'true' if mode == 'durable' else 'false'}/' /etc/volrep/g.toml")
        return True

    def serve(self, node):
        """The database is on the next kind of device, and takes connections."""
        since = time.monotonic()
        node.act.run(f"database {self.device}")
        connected(node.sql, lambda: node.act.run("kill -0 $(</run/database) && echo runs; true")).close()
        self.lap("starting the database", since)

    def promote(self, node):
        other = self.machines[2 - node.number]
        since = time.monotonic()

        def missed():
            status = node.state()
            if status and status["role"] == "primary":
                return True
            return status and all(p["state"] in ("Disconnected", "Retired") for p in status["peers"] if p["name"] == other.name)
        until(f"{node.name} misses the primary", missed)
        if node.state()["role"] != "primary":
            told = node.act.run("volrep promote g --i-fenced-the-old-primary --yes 2>&1")
            self.say(f"  promote: {told.strip().splitlines()[-1]}")
        self.lap("promoting", since)

    def converge(self):
        """Both are up to date, the mode is as it should be, and the images are equal."""
        since = time.monotonic()

        def whole():
            p, s = self.primary.state(), self.shadow.state()
            ok = p and s and p["role"] == "primary" and p["state"] == "UpToDate" and s["role"] == "shadow" and s["state"] == "UpToDate"
            return ok and p["ack_level"] == self.mode and s["applied_lsn"] == p["tail_lsn"]
        until("both are up to date, the image has everything", whole)
        self.primary.act.run("volrep verify g 2>&1")
        self.lap("converging and comparing", since)

    # --- the pair

    def set_up(self):
        # Without what only a debugger needs, which is most of it.
        program = os.path.join(self.folder, "volrep")
        run("strip", "--strip-debug", "-o", program, self.args.volrep)
        make_tools(self.machines[0].tools, program)
        database = os.path.join(self.folder, "one-backing")
        make_database(database)
        with open(os.path.join(self.folder, "two-backing"), "wb") as file:
            file.truncate(os.path.getsize(database))
        for node in self.machines:
            make_disk(os.path.join(self.folder, f"{node.name}-state"), 160)
            for disk in node.served:
                self.disks.tell("new", disk, os.path.join(self.folder, disk), self.args.seed)
        for node in self.machines:
            node.power_on()
        for node in self.machines:
            node.booted()
        one, two = self.machines
        words = f"--journal-size {self.journal} --cache-size 8M"
        sync = "true" if self.mode == "durable" else "false"
        configure = f"sed -i 's/^on_full = .*/on_full = \"{self.on_full}\"/; /^\\[timing\\]/d' /etc/volrep/g.toml; printf '%s' '{TIMING}' >>/etc/volrep/g.toml"
        peer = "printf '\\n[[peer]]\\nname = \"two\"\\naddress = \"10.77.0.2:7654\"\\nsync = {}\\n' >>/etc/volrep/g.toml"
        one.act.run(f"volrep init g --node one --listen 10.77.0.1:7654 {words} --volume data=/dev/backing 2>&1")
        token = one.act.run("volrep token g --peer two 2>/dev/null").strip()
        two.act.run(f"volrep join '{token}' --yes --node two --listen 10.77.0.2:7654 {words} --volume data=/dev/backing 2>&1")
        one.act.run(f"{configure}; {peer.format(sync)}")
        two.act.run(f"{configure}; grep -q '^sync = false' /etc/volrep/g.toml")
        one.acks, two.acks = self.mode, "local"
        self.sync(two, self.mode)
        for node in self.machines:
            node.act.run("sync; serve")
        self.serve(one)
        self.converge()
        self.say(f"the pair: journals of {self.journal}, on_full {self.on_full}, first copy done")

    # --- a cycle

    def cycle(self, number):
        seed = self.args.seed + number
        kind, following, draw = plan(seed)
        if self.short and number < len(SHORT):
            kind, following = SHORT[number][0].split(","), SHORT[number][1]
        if self.args.kind:
            kind, following = self.args.kind.split(","), self.args.mode or following
        self.stage = f"cycle {number}: --seed {seed} --cycles 1 --kind {','.join(kind)} --mode {self.mode} --device {self.device}"
        self.say(self.stage)
        self.counts[self.mode] += 1
        self.counts[self.device] += 1
        for word in kind:
            self.counts[word] += 1
        promotes, took = "promote" in kind, time.monotonic()
        before, p, s, mode = dict(self.last), self.primary, self.shadow, self.mode
        if promotes and self.sync(s, following):
            s.act.run("end TERM && serve")
            until("the shadow is back", lambda: (s.state() or {}).get("state") == "UpToDate")
        self.client.start(number, p.sql, before)
        self.observer.start(p, s)
        self.client.goes_on(12)
        until("volrep says that commits are on the shadow", lambda: sum(self.observer.promised().values()) > sum(before.values()))
        time.sleep(draw.uniform(0, 1.5))
        self.disturb(kind, draw)
        self.observer.stop()
        if p.on:
            # Nothing has happened to the database: it goes on.
            self.restore(kind, p, s)
            self.client.goes_on()
        self.client.stop()
        promised = self.observer.promised()
        if not p.on:
            self.recover(kind, draw)
        since = time.monotonic()
        sent, acked = self.client.account(number)
        server = s if promotes else p
        whole = mode == "durable" or not promotes
        self.last, lost = check(server.sql, sent, acked, before, promised, whole, deep="primary" in kind or "both" in kind)
        self.lap("checking", since)
        self.lost += lost
        self.commits += len(acked)
        if promotes:
            self.rejoin(following)
        self.converge()
        said = sum(promised.values()) - sum(before.values())
        self.say(f"  {len(acked)} acknowledged, {max(said, 0)} of them said to be on the shadow in {self.observer.count} looks, {lost} lost"
                 f"{' as may be' if lost else ''}; {time.monotonic() - took:.1f} s")
        self.observer.count = 0

    def disturb(self, kind, draw):
        """All that goes wrong before anything is mended."""
        p, s = self.primary, self.shadow
        if "link" in kind:
            self.wire.cut()
            if self.mode == "local":
                self.client.goes_on(12)
            time.sleep(outage(draw))
        if "daemon" in kind:
            self.observer.again()
            p.act.run("end KILL")
            # With the power cut right after it, or while the next one recovers.
            time.sleep(draw.uniform(0, 0.3))
            if draw.random() < 0.7 or "primary" not in kind and "both" not in kind:
                self.observer.again()
                p.act.run("serve")
                time.sleep(draw.uniform(0, 1.0))
        if "shadow-daemon" in kind:
            s.act.run("end KILL")
            time.sleep(draw.uniform(0, 1.0))
            if draw.random() < 0.5:
                s.act.run("serve")
                time.sleep(draw.uniform(0, 0.5))
        if "shadow" in kind:
            self.cut(draw.getrandbits(32), s)
            time.sleep(outage(draw))
        cut = {"both": [p, s], "primary": [p]}
        for word in cut:
            if word in kind:
                self.cut(draw.getrandbits(32), *cut[word])

    def restore(self, kind, p, s):
        """The primary has its power: everything else comes back."""
        if "link" in kind:
            self.wire.heal()
        if not s.on:
            self.power_on(s)
        for node in (p, s):
            node.act.run("running || serve")

    def recover(self, kind, draw):
        """After a cut of the primary: a database is served, by it or by the shadow."""
        p, s = self.primary, self.shadow
        server = s if "promote" in kind else p
        if server is p:
            self.wire.heal()
        for attempt in range(2 if "again" in kind else 1):
            off = [node for node in ((s,) if server is s else (p, s)) if not node.on]
            self.power_on(*off)
            s.act.run("running || serve")
            if attempt == 0:
                self.device = "nbd" if self.device == "ublk" else "ublk"
            if attempt == 0 and "again" in kind:
                self.cut_again(server, draw)
        if server is s:
            self.promote(s)
        self.serve(server)

    def cut_again(self, server, draw):
        """In the middle of the recovery."""
        def work():
            try:
                if server is self.shadow:
                    self.promote(server)
                self.serve(server)
            except Gone:
                pass
            except Failed:
                if server.on:
                    raise
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        worker.join(draw.uniform(0, 6.0))
        self.cut(draw.getrandbits(32), server)
        worker.join(timeout=240)

    def rejoin(self, mode):
        """The old primary comes back and follows."""
        since = time.monotonic()
        p, s = self.primary, self.shadow
        self.wire.heal()
        self.power_on(p)
        until(f"{p.name} has learned of the promotion", lambda: (p.state() or {}).get("state") in ("Retired", "Diverged"))
        p.act.run("volrep rejoin g --yes 2>&1")
        self.primary, self.shadow, self.mode = s, p, mode
        self.lap("rejoining", since)

    # --- the end

    def tell(self):
        """What may explain a failure."""
        print(f"FAILED in {self.stage}", flush=True)
        for node in self.machines:
            status = None
            try:
                status = node.act.run("volrep status g 2>&1; tail -n 5 /run/*.log 2>/dev/null; dmesg | tail -n 12", 30) if node.on else "off"
            except Failed as why:
                status = str(why)
            print(f"--- {node.name}: {status}")
            with open(os.path.join(self.folder, f"{node.name}.log"), errors="replace") as file:
                print(f"--- the end of its log:\n{''.join(file.readlines()[-30:])}")
        shutil.rmtree(self.args.keep, ignore_errors=True)
        os.makedirs(self.args.keep)
        for name in ["one.log", "two.log", "commits.log", "one/1/console", "two/1/console"]:
            if os.path.exists(os.path.join(self.folder, name)):
                shutil.copy(os.path.join(self.folder, name), os.path.join(self.args.keep, name.replace("/", "-")))
        print(f"logs: {self.args.keep}", flush=True)

    def clean(self):
        try:
            for node in self.machines:
                node.kill()
            self.disks.end()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


HEAD = """# What power cuts came to

`cargo test --profile checked --test powercut -- --cycles N --seed S --record` adds what it ran: a row for each run. The first
cycle has the seed S, each other one the next; source is the last commit of src (+ for changes that were not in it).

| on | source | cycles | seeds | what | commits | lost as may be | found |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def source(root):
    """The last commit that changed the product, and whether it has changed since."""
    def git(*words):
        return subprocess.run(["git", *words, "--", "src"], cwd=root, capture_output=True, text=True).stdout.strip()
    return git("log", "-1", "--format=%h", "--abbrev=10") + ("+" if git("status", "--porcelain") else "")


def record(lab, args, done, kinds, failed):
    """Adds a row, and the sum of all."""
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.path.join(here, "RESULTS.md")
    old = open(path).read().splitlines() if os.path.exists(path) else []
    rows = [l for l in old if l.startswith("| ") and not l.startswith(("| on |", "| --- |"))]
    seeds = f"{args.seed} to {args.seed + done - 1}" if done else str(args.seed)
    rows.append(f"| {time.strftime('%Y-%m-%d')} | {source(here + '/../..')} | {done} | {seeds} | {kinds} | {lab.commits} | {lab.lost} "
                f"| {f'{failed}, seed {args.seed + done}' if failed else 'nothing'} |")
    cycles = sum(int(row.split(" | ")[2]) for row in rows)
    open(path, "w").write(HEAD + "\n".join(rows) + f"\n\n{cycles} cycles in all.\n")


def interrupted(number, _):
    """The end, once: cleaning up is not interrupted again."""
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main():
    args = arguments()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, interrupted)
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: it ends, and cleans up, with whoever started it
    # Every wait has a limit; this one is for a defect here.
    faulthandler.dump_traceback_later(600 + args.cycles * 600, exit=True)
    lab = Lab(args)
    done, failed = 0, ""
    try:
        lab.set_up()
        for number in range(args.cycles):
            if args.minutes and lab.now() > args.minutes * 60:
                break
            lab.cycle(number)
            done += 1
    except Exception as why:
        lab.say(f"FAILED: {type(why).__name__}: {why}")
        failed = f"{type(why).__name__}: {why}".splitlines()[0].replace("|", "/")
        lab.tell()
        if not isinstance(why, Failed):
            raise
        return 1
    finally:
        lab.clean()
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(lab.counts.items()))
        laps = ", ".join(f"{name} {s:.0f}" for name, s in lab.laps.items())
        lab.say(f"{done} cycles ({kinds}); {lab.commits} commits acknowledged, {lab.lost} lost as may be; seconds: {laps}")
        if args.record:
            record(lab, args, done, kinds, failed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
