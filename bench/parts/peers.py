"""fio through volrep's NBD front end, replicating to a live shadow, beside other NBD servers, a loop device and the
bare file. "volrep" is asynchronous (ack level local), "volrep durable" has its shadow in the sync set. Both nodes,
fio and the peers share this machine's processors. The shadow's files lie on tmpfs, because a real shadow has a disk
of its own; "one disk" is the same with the shadow's journal and backing beside the primary's.

"bare file" is io_uring with O_DIRECT, without NBD; "page cache" is pwrite and fdatasync. "qemu-nbd direct" is
O_DIRECT through the same NBD client. "nbdkit memory" has no disk: it is what the client, the protocol and a copy
allow: a commit is two round trips there, a WRITE and a FLUSH. An aim that speaks of the bare file or disk is told
against it and, because NBD alone may take more than the aim leaves, against the same thing through the same client.
Buffers are half compressible. Every file was written once before. One subject at a time; before the next one begins,
the shadow has applied everything, volrep's cache is empty, and what a peer left in the page cache is on the disk."""
import re

import load
import targets
from suite import Skip

TITLE = "Beside NBD servers, loop and the bare file"
ORDER = 20

MAIN = ["volrep", "volrep durable", "nbdkit file", "qemu-nbd", "qemu-nbd direct", "bare file"]
FSYNC = MAIN + ["volrep, one disk", "volrep durable, one disk", "bare file, page cache", "loop device", "nbdkit memory"]
BEST = "bare file, the faster way"
BURST, BURSTS = "32M", 5


class Row:
    """A load: fio's options ({sync} is an fsync after each write), who runs it, what volrep is held against with which aim."""

    def __init__(self, name, options, subjects, aims, unit="IOPS", burst=False, ramp=0, quick=False):
        self.name, self.options, self.subjects, self.aims, self.unit = name, options, subjects, aims, unit
        self.burst, self.ramp, self.quick = burst, ramp, quick

    def value(self, result):
        return result.iops if self.unit == "IOPS" else result.rate / 1e6

    def latency(self, result):
        """What its user waits for: of a row with fsyncs, the fsync."""
        return result.sync if "{sync}" in self.options and result.sync else result.latency


ROWS = [
    Row("4k randwrite QD1", "--rw=randwrite --bs=4k --iodepth=1", MAIN + ["nbdkit memory", "loop device"], [("nbdkit file", None)]),
    Row("4k randwrite QD32, a burst that fits the cache", f"--rw=randwrite --bs=4k --iodepth=32 --io_size={BURST}",
        ["volrep", "volrep durable", "volrep, one disk", "nbdkit file", "qemu-nbd", "nbdkit memory"], [("nbdkit file", 0.8)], burst=True, quick=True),
    Row("4k randwrite QD32, sustained", "--rw=randwrite --bs=4k --iodepth=32", MAIN + ["volrep, one disk", "nbdkit memory", "loop device"],
        [("bare file", 0.8), ("qemu-nbd direct", 0.8), ("nbdkit file", None)], ramp=2, quick=True),
    Row("8k randwrite + fsync, 1 writer", "--rw=randwrite --bs=8k --iodepth=1 {sync}", FSYNC, [(BEST, 1.0), ("nbdkit file", 1.0)], quick=True),
    Row("8k randwrite + fsync, 16 writers", "--rw=randwrite --bs=8k --iodepth=1 --numjobs=16 {sync}", FSYNC, [(BEST, 1.5), ("nbdkit file", 1.5)]),
    Row("70/30 4k read/write QD16", "--rw=randrw --rwmixread=70 --bs=4k --iodepth=16", MAIN, [("qemu-nbd direct", None)]),
    Row("4k randread QD1", "--rw=randread --bs=4k --iodepth=1", MAIN + ["nbdkit memory"], [("bare file", 0.9), ("qemu-nbd direct", 0.9)]),
    Row("4k randread QD32", "--rw=randread --bs=4k --iodepth=32", MAIN + ["nbdkit memory"], [("bare file", 0.9), ("qemu-nbd direct", 0.9)]),
    Row("1M sequential write QD4", "--rw=write --bs=1M --iodepth=4", MAIN + ["volrep, one disk", "nbdkit memory", "loop device"],
        [("bare file", 0.5), ("qemu-nbd direct", 0.5)], unit="MB/s", ramp=1),
    Row("1M sequential read QD4", "--rw=read --bs=1M --iodepth=4", MAIN + ["nbdkit memory", "loop device"],
        [("bare file", 0.9), ("qemu-nbd direct", 0.9)], unit="MB/s", quick=True),
]
# What a load costs: the loads, and who carries them.
COSTS = [("8k randwrite + fsync, 1 writer", "--rw=randwrite --bs=8k --iodepth=1 {sync}"), ("4k randwrite QD32", "--rw=randwrite --bs=4k --iodepth=32"),
         ("1M sequential write QD4", "--rw=write --bs=1M --iodepth=4")]
COST = "What a byte costs"
CARRIERS = ["volrep", "volrep durable", "volrep, one disk", "nbdkit file", "qemu-nbd direct"]


class Subjects:
    """The subjects, made when first asked for; those that can't be are told once."""

    def __init__(self, bench, size):
        self.bench, self.size, self.makers = bench, size, targets.makers(bench, size)
        self.made, self.lost = {}, set()

    def get(self, name):
        if name not in self.made and name not in self.lost:
            try:
                self.made[name] = self.makers[name]()
            except Skip as why:
                self.lost.add(name)
                self.bench.say(f"skipped: {name}: {why}")
            else:
                self.fio(name, "--rw=write --bs=1M --iodepth=4")  # every file is written once
                self.made[name].settle()
        return self.made.get(name)

    def fio(self, name, options, seconds=None):
        subject = self.made[name]
        nbd = subject.target.startswith("nbd")
        more = ["--direct=0", "--ioengine=psync"] if name == "bare file, page cache" else []
        return load.fio(subject.target, options.replace("{sync}", "--fsync=1" if nbd else "--fdatasync=1"), seconds, self.size, more)

    def end(self):
        for subject in self.made.values():
            subject.end()


def measure(bench, subjects, row, results):
    """All rounds of a row into {subject: [Result]}."""
    for _ in range(bench.args.rounds):
        for name in row.subjects:
            subject = subjects.get(name)
            if not subject:
                continue
            ramp = f" --ramp_time={row.ramp}" if row.ramp and not bench.args.quick else ""
            for _ in range((1 if bench.args.quick else BURSTS) if row.burst else 1):
                result = subjects.fio(name, row.options + ramp, None if row.burst else bench.args.seconds)
                subject.settle()
                bench.keep(f"{row.name}: {name}", result.job)
                results.setdefault(name, []).append(result)


def told(percentiles, of):
    return f"{of} p50 {percentiles[50]:,.0f}, p99 {percentiles[99]:,.0f}, p99.9 {percentiles[99.9]:,.0f} µs"


def tell(bench, row, results):
    """A row's figures and plots; each subject's ratio to the bare file."""
    value = {name: bench.median([row.value(r) for r in runs]) for name, runs in results.items()}
    tail = {name: {p: bench.median([row.latency(r)[p] for r in runs]) for p in (50, 99, 99.9)} for name, runs in results.items()}
    bare = [name for name in ("bare file", "bare file, page cache") if name in value]
    if len(bare) == 2:
        value[BEST] = max(value[name] for name in bare)
    base = BEST if BEST in value else "bare file" if bare else "nbdkit memory"
    waited = "fsync" if "{sync}" in row.options else "completion"
    for i, (against, bound) in enumerate(row.aims):
        if "volrep" not in value or against not in value:
            continue
        bench.figure(row.name, "volrep", value["volrep"], row.unit, (against, value[against]), (">=", bound) if bound else None, results["volrep"][0].command)
        if i == len(row.aims) - 1 and against in tail:
            for p in (50, 99, 99.9):
                bench.figure(row.name, f"volrep, {waited} p{p:g}", tail["volrep"][p], "µs", (against, tail[against][p]))
    for name, runs in results.items():
        if name == "volrep" and base in [against for against, _ in row.aims]:
            continue  # told above
        against = (base, value[base]) if name != base and base in value else None
        bench.figure(row.name, name, value[name], row.unit, against, command=runs[0].command, note=told(tail[name], waited))
    bench.plot(row.name, row.name, "bar", {row.unit: [(name, value[name]) for name in results]}, "", row.unit)
    curve = lambda run: [(us, p / 100) for p, us in sorted(row.latency(run).items())]
    bench.plot(row.name, "Latency of an fsync" if "{sync}" in row.options else "Latency of a request", "cdf",
               {name: curve(runs[-1]) for name, runs in results.items()}, "µs", "share", logx=True)
    return {name: value[name] / value[base] for name in results} if base in value else {}


def cost(bench, subjects):
    """Processor time, wire, bytes on disks and memory for what a user wrote, until it is in both backings."""
    group, bars = COST, {"processor": {}, "wire": {}, "disk": {}}
    for load_name, options in COSTS:
        spent = {}
        for name in CARRIERS:
            subject = subjects.get(name)
            if not subject:
                continue
            ours = name.startswith("volrep")
            meter = load.Meter(subject.pids, subject.pids[0] if ours else None)
            result = subjects.fio(name, options, bench.args.seconds)
            subject.checkpoint() if ours else subject.settle()
            spent[name] = dict(meter.stop(), written=result.written, command=result.command)
            bench.keep(f"cost of {load_name}: {name}", dict(spent[name], job=result.job))
        per_gib = {name: sum(s["cpu"]) / s["written"] * (1 << 30) for name, s in spent.items()}
        for name, s in spent.items():
            peer = ("nbdkit file", per_gib["nbdkit file"]) if name != "nbdkit file" and "nbdkit file" in per_gib else None
            note = f"primary {s['cpu'][0]:.2f} s, shadow {s['cpu'][1]:.2f} s" if len(s["cpu"]) == 2 else "the server; not what the kernel does for it later"
            bench.figure(group, f"{load_name}: {name}, processor time", per_gib[name], "s/GiB", peer, command=s["command"], note=note)
            bars["processor"].setdefault(load_name, []).append((name, per_gib[name]))
            if s["wire"]:
                ratio = s["wire"][0] / s["written"]
                bench.figure(group, f"{load_name}: {name}, wire", ratio, "bytes for each written", note="TLS included, both ways")
                bars["wire"].setdefault(load_name, []).append((name, ratio))
            for node, disk in zip(("primary", "shadow"), s["disk"]):
                # What a server wrote to the page cache is accounted by whole folios, and says nothing of the disk.
                if name != "nbdkit file" and (node == "primary" or "one disk" in name):
                    ratio = disk / s["written"]
                    bench.figure(group, f"{load_name}: {name}, disk{f' of the {node}' if len(s['disk']) == 2 else ''}", ratio, "bytes for each written")
                    bars["disk"].setdefault(load_name, []).append((f"{name} {node}" if len(s["disk"]) == 2 else name, ratio))
            for node, anon, shared in zip(("primary", "shadow") if len(s["anon"]) == 2 else ("server",), s["anon"], s["shared"]):
                bench.figure(group, f"{load_name}: {name}, memory of the {node}", anon / (1 << 20), "MiB",
                             note=f"anonymous, at most; shared beside it {shared / (1 << 20):.0f} MiB" + (" (the ring)" if len(s["anon"]) == 2 else ""))
    bench.plot(group, "Processor time of all server processes", "bar", bars["processor"], "", "s/GiB")
    bench.plot(group, "Bytes on the wire for each written", "bar", bars["wire"], "", "bytes")
    bench.plot(group, "Bytes written to disks for each written by the user", "bar", bars["disk"], "", "bytes")


def run(bench):
    subjects = Subjects(bench, "128M" if bench.args.quick else "1G")
    ratios = {}
    try:
        for row in ROWS:
            if (row.quick or not bench.args.quick) and re.search(bench.args.rows, row.name):
                results = {}
                try:
                    measure(bench, subjects, row, results)
                finally:  # an interrupted row is told with the rounds that there are
                    for name, ratio in tell(bench, row, results).items() if results else ():
                        if name in MAIN[:5]:
                            ratios.setdefault(name, []).append((row.name, ratio))
        if ratios:
            bench.plot("All rows", "Ratio to the bare file (of the burst: to nbdkit memory)", "bar", ratios, "", "ratio")
        if re.search(bench.args.rows, COST):
            cost(bench, subjects)
    finally:
        subjects.end()
