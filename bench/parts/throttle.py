"""What a writer feels when something behind it is slower than it.

*A writer faster than the journal*: 64k and 1M random writes, as fast as they are taken, for some seconds; the longest completion of a
write, and how the rate went (every 100 ms). Beside it the same file served by qemu-nbd with O_DIRECT: what the disk itself does.

*A shadow slower than the primary*, asynchronous: the shadow's daemon stopped (SIGSTOP), and stopped for four fifths of the time
("slow"), against one that keeps up. Its records wait in the primary's journal, not in memory.

*A full journal* under `on_full = block`: the shadow stays stopped until the journal is full and the writer is held back, then goes on.
"""
import os, signal, statistics, threading, time

import load, nodes, targets


TITLE = "Back-pressure: faster writers, slower shadows, a full journal"
ORDER = 48


def run(bench):
    saturated(bench)
    slow_shadow(bench)
    full_journal(bench)


def saturated(bench):
    seconds = 2 if bench.args.quick else max(20, bench.args.seconds * 4)
    size = "2G"
    for block, depth in ("64k", 16), ("1M", 4):
        name, series = f"saturated, {block} QD{depth}", {}
        options = f"--rw=randwrite --bs={block} --iodepth={depth} --log_avg_msec=100"
        with nodes.Group(bench, f"full{block}", size, journal="1G") as group:
            load.fio(group.uri, "--rw=write --bs=1M --iodepth=4", None, size=size)  # allocated
            group.settle()
            look = lambda: (group.primary.status(), nodes.anonymous(group.pids()))
            with nodes.Watch(look, 0.25) as watch:
                result, series["volrep"] = rated(bench, group.uri, options, seconds, size)
            statuses, held = zip(*(sample for _, sample in watch.samples))
            fullest = max(s["cache_used"] / s["cache_size"] for s in statuses)
            group.settle()
        # The reference writes the same; its file is allocated alike.
        other = targets.makers(bench, size)["qemu-nbd direct"]()
        load.fio(other.target, "--rw=write --bs=1M --iodepth=4", None, size=size)
        reference, series["qemu-nbd direct"] = rated(bench, other.target, options, seconds, size)
        other.end(), os.unlink(other.path), os.rmdir(os.path.dirname(other.path))
        for label, r in ("volrep", result), ("qemu-nbd direct", reference):
            longest, told = r.job["write"]["lat_ns"]["max"] / 1e6, r.latency
            aim = ("<=", 100) if label == "volrep" else None
            bench.figure(name, f"{label}: longest completion", longest, "ms", None, aim, r.command,
                         f"p50 {told[50] / 1000:.3g}, p99 {told[99] / 1000:.3g}, p99.99 {told[99.99] / 1000:.3g} ms over {seconds:g} s at {r.rate / 1e6:.0f} MB/s")
            least = min(rate for at, rate in series[label] if 0.5 < at < seconds - 0.5)
            bench.figure(name, f"{label}: slowest 100 ms", least, "MB/s", ("mean", r.rate / 1e6))
        for node, most in zip(("primary", "shadow"), map(max, zip(*held))):
            bench.figure(name, f"most anonymous memory of the {node}", most / 2 ** 20, "MiB", None, ("<=", 64), None, f"the write cache was filled to {fullest * 100:.0f} %")
        bench.plot(name, f"Rate of {block} random writes, as fast as they are taken", "line", series, "s", "MB/s")


def rated(bench, target, options, seconds, size):
    """fio's result, and [(second, MB/s)] from its own log."""
    log = f"{bench.args.dir}/rate"
    result = load.fio(target, options, seconds, size=size, more=[f"--write_bw_log={log}"])
    with open(f"{log}_bw.1.log") as f:
        points = [(int(fields[0]) / 1000, int(fields[1]) * 1024 / 1e6) for fields in (line.split(",") for line in f)]
    os.unlink(f"{log}_bw.1.log")
    bench.keep("throttle-saturated", result.job)
    return result, points


class Slowed(threading.Thread):
    """Lets a process run for a part of the time only."""

    def __init__(self, pid, share, period=0.1):
        super().__init__(daemon=True)
        self.pid, self.share, self.period, self.over = pid, share, period, threading.Event()

    def run(self):
        while not self.over.is_set():
            os.kill(self.pid, signal.SIGSTOP)
            self.over.wait(self.period * (1 - self.share))
            os.kill(self.pid, signal.SIGCONT)
            self.over.wait(self.period * self.share)

    def __enter__(self):
        self.start()

    def __exit__(self, *_):
        self.over.set()
        self.join()
        os.kill(self.pid, signal.SIGCONT)


def slow_shadow(bench):
    jobs = {"16 writers, 4k + fsync each": "--rw=randwrite --bs=4k --iodepth=1 --fsync=1 --numjobs=16", "8k randwrite QD32": "--rw=randwrite --bs=8k --iodepth=32"}
    shares, rows, most = {"keeps up": 1, "slow": 0.2, "stopped": 0.0}, {}, 0
    with nodes.Group(bench, "slow", journal="2G") as group:
        load.fio(group.uri, "--rw=write --bs=1M --iodepth=4", None, size="1G")  # allocated
        for number in range(bench.args.rounds):
            for name, options in jobs.items():
                for kind in list(shares) if number % 2 == 0 else list(shares)[::-1]:
                    group.settle()
                    meter = group.meter()
                    with Slowed(group.shadows[0].process.pid, shares[kind]) if shares[kind] < 1 else open(os.devnull):
                        result = load.fio(group.uri, options, bench.args.seconds, size="1G")
                    group.settle()
                    spent = meter.stop()
                    rows.setdefault((name, kind), []).append(result)
                    most = max(most, spent["anon"][0])
                    bench.keep("throttle-slow", {"job": name, "shadow": kind, "spent": spent, "fio": result.job})
    for (name, kind), results in rows.items():
        iops = lambda which: statistics.median(r.iops for r in rows[name, which])
        against, aim = (None, None) if kind == "keeps up" else (("a shadow that keeps up", iops("keeps up")), (">=", 0.95))
        bench.figure("slow shadow", f"{name}, {kind}", iops(kind), "writes/s", against, aim, results[0].command,
                     "rounds: " + ", ".join(f"{r.iops:.0f}" for r in results))
    # One figure: memory that was freed is kept, so a row would tell of those before it.
    bench.figure("slow shadow", "most anonymous memory of the primary in any row", most / 2 ** 20, "MiB", None, ("<=", 64))


def full_journal(bench):
    """Held back when it is full, not before, and not longer."""
    size, seconds = "256M" if bench.args.quick else "512M", bench.args.seconds * 4
    with nodes.Group(bench, "block", journal=size) as group:
        primary, shadow = group.primary, group.shadows[0].process.pid
        load.fio(group.uri, "--rw=write --bs=1M --iodepth=4", None, size="1G")  # allocated
        group.settle()
        look = lambda: (primary.status(), load.memory(primary.process.pid)[0])
        going = threading.Timer(seconds / 2, os.kill, (shadow, signal.SIGCONT))
        with nodes.Watch(look, 0.1) as watch:
            os.kill(shadow, signal.SIGSTOP)
            going.start()
            result, rates = rated(bench, group.uri, "--rw=randwrite --bs=8k --iodepth=32 --buffer_compress_percentage=0 --log_avg_msec=100", seconds, "1G")
            group.settle()
        going.join()
    used = [(at, s["journal_used"] / s["journal_size"]) for at, (s, _) in watch.samples]
    full, fullest = next((at for at, share in used if share > 0.9), None), max(share for _, share in used)
    again = next((at for at, rate in rates if at > seconds / 2 and rate > 1), None)
    before = [rate for at, rate in rates if 0.3 < at < (full or seconds / 2)]
    note = f"the journal of {size} was nine tenths full after {full if full is not None else float('nan'):.1f} s, {fullest * 100:.0f} % at most; {statistics.mean(before or [0]):.0f} MB/s until then"
    bench.figure("full journal", "the writer goes on after the shadow does", (again or seconds) - seconds / 2, "s", None, None, result.command, note)
    bench.figure("full journal", "most anonymous memory of the primary", max(anon for _, (_, anon) in watch.samples) / 2 ** 20, "MiB", None, ("<=", 64))
    bench.plot("full journal", f"8k random writes; the shadow stopped until {seconds / 2:g} s", "line",
               {"writes, MB/s": rates, "journal in use, %": [(at, share * 100) for at, share in used if at <= seconds]}, "s", "MB/s, %")
