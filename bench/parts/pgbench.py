"""PostgreSQL on ext4, with pgbench's own transactions (TPC-B-like, synchronous_commit on, page checksums on).

Subjects: a plain loop device on a file (direct I/O, same disk); a loop device on a FUSE file that hands every request on to such a
file (`bench/passthrough.rs`): volrep's way to a device on a machine without ublk and NBD, with nothing replicated; volrep asynchronous; volrep `durable` (the shadow in the sync
set). volrep's device is the best that this machine has (`attach --device auto`: ublk, NBD, or FUSE and a loop device). The
shadow's files lie on tmpfs, since a real shadow has a disk of its own; the subjects "same disk" have them beside the primary's.
All clusters run at once and only one is used at a time, in rounds; before each row a CHECKPOINT, so that each row
writes full pages again. *Written* is what the device took (the kernel's count), *wire* what the TCP connection carried, both
directions, until the shadow had everything, with the CHECKPOINT that ends the row.

*Catch-up*: the shadow's daemon is stopped, pgbench writes, the shadow's daemon is started: the time from its start until it has
applied everything that was sealed when pgbench ended, against the time that pgbench took to write it.
"""
import contextlib, os, statistics, time

import load, machine, nodes, postgres
from suite import Skip

TITLE = "PostgreSQL: pgbench on ext4"
ORDER = 40
PACKAGES = ("postgresql", "e2fsprogs", "mount")
GROUP = "pgbench"
FUSE = "FUSE and loop device, not replicated"


def processors(group):
    """Seconds that all processors have been idle, and worked for anything; that each of volrep's daemons took of it."""
    with open("/proc/stat") as f:
        ticks = [int(n) / load.TICK for n in f.readline().split()[1:9]]
    idle = ticks[3] + ticks[4]
    return [idle, sum(ticks) - idle, *(load.cpu(pid) for pid in (group.pids() if group else []))]


class Subject:
    """A cluster on its device; `group` is volrep's, or None."""

    def __init__(self, name, cluster, group=None):
        self.name, self.cluster, self.group, self.rows = name, cluster, group, {}

    def row(self, clients, seconds):
        """One row: pgbench between two checkpoints, with what it cost."""
        self.cluster.sql("checkpoint")
        if self.group:
            self.group.settle()
        taken, written = self.cluster.taken(), self.group and self.group.primary.status()["written_bytes"]
        meter = load.Meter(self.group.pids() if self.group else [], self.group and self.group.primary.process.pid)
        before = processors(self.group)
        tps, latencies = self.cluster.pgbench(clients, seconds)
        busy = [b - a for a, b in zip(before, processors(self.group))]
        self.cluster.sql("checkpoint")
        if self.group:
            self.group.settle()
        spent = meter.stop()
        row = {"tps": tps, "latencies": latencies, "taken": self.cluster.taken() - taken, "busy": busy, **{key: sum(spent[key]) for key in ("cpu", "disk", "wire")}}
        if self.group:
            row["written"] = self.group.primary.status()["written_bytes"] - written
        self.rows.setdefault(clients, []).append(row)

    def median(self, clients, key):
        return statistics.median(row[key] for row in self.rows[clients])

    def pooled(self, clients):
        return sorted(latency for row in self.rows[clients] for latency in row["latencies"])


def subjects(bench, stack, scale):
    """All of them, running; those with the shadow on the same disk only in a whole run."""
    size, made = "1G" if bench.args.quick else "3G", []
    loop = postgres.Loop(f"{bench.args.dir}/plain", size)
    stack.callback(loop.close)
    made.append(Subject("plain loop device", stack.enter_context(postgres.Cluster(loop.device, scale))))
    fuse = postgres.Fuse(machine.build(bench.root, "example", "passthrough"), f"{bench.args.dir}/fuse", size)
    stack.callback(fuse.close)
    made.append(Subject(FUSE, stack.enter_context(postgres.Cluster(fuse.device, scale))))
    kinds = [("volrep async", 0, False), ("volrep durable", 1, False)]
    kinds += [] if bench.args.quick else [("volrep async, same disk", 0, True), ("volrep durable, same disk", 1, True)]
    for name, sync, on_disk in kinds:
        group = stack.enter_context(nodes.Group(bench, name.replace(" ", "-").replace(",", ""), size, sync=sync, on_disk=on_disk,
                                                device="auto", journal="512M" if bench.args.quick else "2G"))
        made.append(Subject(name, stack.enter_context(postgres.Cluster(group.uri, scale)), group))
        group.settle()
    bench.say(f"volrep's device: {os.path.realpath(made[-1].group.uri)}")
    return made


def run(bench):
    reason = postgres.why_not()
    if reason:
        raise Skip(reason)
    scale, clients = (2, [4]) if bench.args.quick else (30, [1, 8])
    seconds = bench.args.seconds * (2 if bench.args.quick else 3)
    with contextlib.ExitStack() as stack:
        made = subjects(bench, stack, scale)
        for number in range(bench.args.rounds):
            for count in clients:
                # Each round begins with another one. The same-disk ones, which have no aim, in the first round only.
                turn = [s for s in made if number == 0 or "same disk" not in s.name]
                for subject in turn[number % len(turn):] + turn[:number % len(turn)]:
                    subject.row(count, seconds if count > 1 else max(2, seconds / 2))
        report(bench, made, clients, seconds, scale)
        catch_up(bench, next(s for s in made if s.group), clients[-1], max(4, seconds))
    bench.keep("pgbench", {s.name: {c: [{k: v for k, v in row.items() if k != "latencies"} for row in rows] for c, rows in s.rows.items()}
                           for s in made})


def report(bench, made, clients, seconds, scale):
    plain, most = made[0], clients[-1]
    aims = {"volrep async": (">=", 0.9), "volrep durable": (">=", 0.7)}
    for count in clients:
        command = f"pgbench -n -c {count} -j {min(count, os.cpu_count())} -T {seconds if count > 1 else max(2, seconds / 2):g} (scale {scale})"
        for s in made:
            against = ("plain loop device", plain.median(count, "tps")) if s is not plain else None
            aim = aims.get(s.name) if count == most else None
            rounds = ", ".join(f"{row['tps']:.0f}" for row in s.rows[count])
            bench.figure(f"{GROUP}, {count} client{'s' * (count > 1)}", f"{s.name}: transactions", s.median(count, "tps"), "/s", against, aim, command, f"rounds: {rounds}")
            pooled, base = s.pooled(count), plain.pooled(count)
            for q, label in (0.5, "p50"), (0.99, "p99"), (0.999, "p99.9"):
                against = ("plain loop device", postgres.quantile(base, q)) if s is not plain else None
                bench.figure(f"{GROUP}, {count} client{'s' * (count > 1)}, latency", f"{s.name}: {label}", postgres.quantile(pooled, q), "ms", against, None, command)
    for s in made:
        shares(bench, s, most)
    for s in (s for s in made if s.group):
        costs(bench, s, most)
    bench.plot(GROUP, f"Transactions with {most} clients", "bar",
               {s.name: [("median", s.median(most, "tps"))] for s in made}, "", "transactions/s")
    bench.plot(GROUP, f"Latency of a transaction, {most} clients", "cdf", {s.name: postgres.curve(s.pooled(most)) for s in made}, "ms",
               "share of transactions", logx=True)


def shares(bench, subject, clients):
    """Where the processors' time went during pgbench: who has none left is bound by it."""
    idle, worked, *daemons = map(sum, zip(*(row["busy"] for row in subject.rows[clients])))
    percent = lambda part: part / (idle + worked) * 100
    note = "".join(f"{node} {percent(part):.1f} %, " for node, part in zip(("primary", "shadow"), daemons))
    note += f"database, pgbench and the kernel's own threads {percent(worked - sum(daemons)):.1f} %"
    bench.figure(f"{GROUP}, processors", f"{subject.name}: idle", percent(idle), "%", None, None, None, note)


def costs(bench, subject, clients):
    """What replication took for what was written."""
    rows = subject.rows[clients]
    total = lambda key: sum(row[key] for row in rows)
    note = f"{total('taken') >> 20} MiB written, {total('wire') >> 20} MiB on the wire; volrep itself counted {total('written') >> 20} MiB"
    aim = ("<=", 0.5) if "same disk" not in subject.name else None
    bench.figure(f"{GROUP}, cost", f"{subject.name}: wire", total("wire") / 2 ** 20, "MiB", ("written", total("taken") / 2 ** 20), aim, None, note)
    bench.figure(f"{GROUP}, cost", f"{subject.name}: processor time of both nodes", total("cpu") / (total("taken") / 2 ** 30), "s per GiB written")
    bench.figure(f"{GROUP}, cost", f"{subject.name}: both nodes' writes to this disk", total("disk") / 2 ** 20, "MiB", ("written", total("taken") / 2 ** 20))


def catch_up(bench, subject, clients, seconds):
    """An outage of the shadow under load, then how soon it has everything."""
    group = subject.group
    shadow = group.shadows[0]
    subject.cluster.sql("checkpoint")
    group.settle()
    before = group.primary.status()
    shadow.end()
    begun = time.monotonic()
    tps, _ = subject.cluster.pgbench(clients, seconds)
    wrote = time.monotonic() - begun
    after = group.primary.status()
    begun = time.monotonic()
    shadow.start()
    watch = nodes.Watch(lambda: shadow.status().get("applied_lsn", 0), 0.02)
    with watch:
        nodes.wait_for("catch-up", lambda: watch.samples and watch.samples[-1][1] >= after["tail_lsn"], 240)
        took = time.monotonic() - begun
    backlog = after["record_bytes"] - before["record_bytes"]
    first = next((at for at, lsn in watch.samples if lsn > before["tail_lsn"]), None)
    bench.figure(f"{GROUP}, catch-up", "backlog caught up with", backlog / took / 2 ** 20, "MiB/s of records",
                 ("pgbench wrote it", backlog / wrote / 2 ** 20), (">=", 3.0), f"pgbench -n -c {clients} -T {seconds:g}, the shadow stopped; then `volrep serve`",
                 f"{backlog >> 20} MiB of records ({(after['written_bytes'] - before['written_bytes']) >> 20} MiB written) in {wrote:.1f} s at {tps:.0f} transactions/s; "
                 f"applied {took:.2f} s after the start of the shadow's daemon, of which {first or took:.2f} s until the first record")
