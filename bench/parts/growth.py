"""How volrep grows: with the size of the volume, with the number of shadows, with what its journal holds at a crash.

*Volume*: sparse, 1 GiB to 1 TiB, 8k random writes all over it, then everything at rest. Memory is the most anonymous and shared
memory that a daemon had, the latter being the ring of the write cache, against 64 MiB + the ring + 0.01 % of the volume; the
hash index, a mapped file, is told beside it. Idle is the processor time of both daemons with the link up and nothing to do. *Attach*:
the daemon was ended cleanly; from the start of `volrep serve` until `volrep attach` has answered with the device, with the
shadow's daemon running, and stopped (a primary that has heard of peers asks them first whether one was promoted).

*Shadows*: 1, 2 and 4, all with their files on tmpfs and all on this machine's processors, which is what limits them here.

*Backlog*: the shadow is stopped and 1 GiB of records that don't compress is written, with no checkpoint meanwhile (`checkpoint_after = "1h"`, a
journal of more than twice that): a restart walks the journal from the checkpoint, so what lies before that costs nothing, and the row is left
out if a checkpoint has come. The primary is killed (SIGKILL), and started again: from the start of `volrep serve` until a block was read, and
until one was written and flushed.
"""
import os, statistics, subprocess, time

import load, nodes
from lab import size_of, wait_for
from suite import Skip

TITLE = "Growth: volume, shadows, backlog"
ORDER = 46
SIZES = ("1G", "16G", "128G", "1T")


def run(bench):
    volumes(bench)
    shadows(bench)
    with bench.piece("backlog"):
        backlog(bench)


def volumes(bench):
    attach, idle, memory = [], [], []
    for size in SIZES if not bench.args.quick else (SIZES[0], SIZES[-1]):
        with nodes.Group(bench, f"size{size}", size, journal="256M") as group:
            group.settle()
            meter = group.meter()
            result = load.fio(group.uri, f"--rw=randwrite --bs=8k --iodepth=32 --norandommap --size={size}", bench.args.seconds)
            group.settle()
            spent = meter.stop()
            bench.keep(f"growth-{size}", {"spent": spent, "fio": result.job})
            memory.append((size_of(size) >> 30, held(bench, size, spent, group, result)))
            if size in (SIZES[0], SIZES[-1]):
                idle.append((size_of(size) >> 30, at_rest(bench, size, group)))
            attach.append((size_of(size) >> 30, attached(bench, size, group)))
    bench.plot("volume", "Attach of a cleanly closed volume", "line", {"with its shadow": attach}, "GiB", "ms", logx=True)
    bench.plot("volume", "Most memory of a daemon", "line", {"anonymous and shared": memory}, "GiB", "MiB", logx=True)
    bench.plot("volume", "Idle, both daemons", "line", {"of one processor": idle}, "GiB", "%", logx=True)


def held(bench, size, spent, group, result):
    ring = group.primary.status()["cache_size"]
    bound = (64 << 20) + ring + size_of(size) // 10_000
    most = max(a + s for a, s in zip(spent["anon"], spent["shared"]))
    index = max(mapped(pid) for pid in group.pids())
    note = ", ".join(f"{node}: anonymous {a / 2 ** 20:.1f} MiB, shared {s / 2 ** 20:.1f} MiB" for node, a, s in zip(("primary", "shadow"), spent["anon"], spent["shared"]))
    bench.figure("volume, memory", f"{size}: most of a daemon", most / 2 ** 20, "MiB", ("64 MiB + ring + 0.01 %", bound / 2 ** 20), ("<=", 1.0),
                 result.command, f"{note}; mapped files at the end {index / 2 ** 20:.1f} MiB; {result.iops:.0f} writes/s")
    return most / 2 ** 20


def mapped(pid):
    """Bytes of mapped files that are in memory: program and hash index."""
    with open(f"/proc/{pid}/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssFile:"))


def at_rest(bench, size, group):
    """Percent of one processor."""
    seconds = 3 if bench.args.quick else 20
    wait_for("the checkpoints", lambda: all(n.status()["checkpoint_lsn"] >= n.status()["tail_lsn"] for n in [group.primary, *group.shadows]), 60)
    before = [load.cpu(pid) for pid in group.pids()]
    time.sleep(seconds)
    spent = [(load.cpu(pid) - b) / seconds * 100 for pid, b in zip(group.pids(), before)]
    for node, share in zip(("primary", "shadow"), spent):
        bench.figure("volume, idle", f"{size}: {node}", share, "% of one processor", None, ("<=", 0.5), None, f"over {seconds} s, by the kernel's clock of {load.TICK} Hz")
    return sum(spent)


def attached(bench, size, group):
    """Milliseconds from the start of the daemon to the answered attach, the median of several."""
    with_shadow = [once(group) for _ in range(bench.args.rounds + 2)]
    for shadow in group.shadows:
        shadow.end()
    alone = [once(group) for _ in range(bench.args.rounds + 2)]
    for shadow in group.shadows:
        shadow.serve()
    for name, times in ("its shadow running", with_shadow), ("its shadow stopped", alone):
        bench.figure("volume, attach", f"{size}: {name}", statistics.median(t for t, _ in times), "ms", None, ("<=", 200),
                     "volrep serve g & until volrep attach g --device nbd-socket; do :; done",
                     "rounds: " + ", ".join(f"{t:.0f}" for t, _ in times) + f"; the daemon answered after {statistics.median(s for _, s in times):.0f} ms")
    return statistics.median(t for t, _ in with_shadow)


def once(group):
    """(milliseconds to the answered attach, to the daemon's socket)"""
    primary = group.primary
    primary.volrep("detach", "g")
    primary.end()
    socket = f"{primary.home}/c/run/g/control.sock"
    begun = time.monotonic()
    primary.start()
    while not os.path.exists(socket):
        time.sleep(0.0005)
    listens = time.monotonic()
    while not primary.volrep("attach", "g", "--device", "nbd-socket", check=False):
        if time.monotonic() > begun + 60 or primary.process.poll() is not None:
            raise RuntimeError(f"no device after a clean start: {primary.said()}")
        time.sleep(0.002)
    return (time.monotonic() - begun) * 1000, (listens - begun) * 1000


def shadows(bench):
    jobs = {"8k randwrite QD32": "--rw=randwrite --bs=8k --iodepth=32", "16 writers, 8k + fsync each": "--rw=randwrite --bs=8k --iodepth=1 --fsync=1 --numjobs=16"}
    rows = {}
    for count in (1, 2, 4):
        with nodes.Group(bench, f"shadows{count}", shadows=count, journal="512M") as group:
            load.fio(group.uri, "--rw=write --bs=1M --iodepth=4", None, size="1G")  # allocated
            for name, options in jobs.items():
                group.settle()
                meter = group.meter()
                result = load.fio(group.uri, options, bench.args.seconds, size="1G")
                group.settle()
                rows[name, count] = result, meter.stop()
                bench.keep(f"shadows-{count}", {"job": name, "spent": rows[name, count][1], "fio": result.job})
    for (name, count), (result, spent) in rows.items():
        base = ("1 shadow", rows[name, 1][0].iops) if count > 1 else None
        bench.figure("shadows", f"{count}: {name}", result.iops, "writes/s", base, None, result.command)
        gib = result.written / 2 ** 30
        bench.figure("shadows, cost", f"{count}: {name}, processor", sum(spent["cpu"]) / gib, "s per GiB", None, None, None,
                     f"the primary {spent['cpu'][0] / gib:.1f}, each shadow {sum(spent['cpu'][1:]) / gib / count:.1f}")
    bench.plot("shadows", "Writes against the number of shadows", "line",
               {name: [(count, rows[name, count][0].iops) for count in (1, 2, 4)] for name in jobs}, "shadows", "writes/s")


def backlog(bench):
    held = "128M" if bench.args.quick else "1G"
    times = []
    for number in range(1 if bench.args.quick else bench.args.rounds):
        with nodes.Group(bench, f"backlog{number}", "2G", journal=f"{(size_of(held) >> 20) * 2 + 512}M",
                         settings=[("#checkpoint_after", 'checkpoint_after = "1h"')]) as group:
            times.append(crash(bench, group, held))
    read, written, used = (statistics.median(column) for column in zip(*times))
    note = f"{used / 2 ** 20:.0f} MiB of records after the checkpoint; rounds: " + ", ".join(f"{r:.2f}, {w:.2f}" for r, w, _ in times)
    bench.figure("backlog", f"{held} of journal, kill -9: first block read", read, "s", None, ("<=", 3.0), None, note)
    bench.figure("backlog", f"{held} of journal, kill -9: first block written and flushed", written, "s", None, ("<=", 3.0), None, note)


def crash(bench, group, held):
    """(seconds to a block read, to one written and flushed, bytes of records after the checkpoint at the crash)"""
    primary = group.primary
    before = primary.status()
    for shadow in group.shadows:
        shadow.end()
    load.fio(group.uri, f"--rw=randwrite --bs=64k --iodepth=16 --buffer_compress_percentage=0 --io_size={held} --end_fsync=1", None, size="2G")
    after = primary.status()
    used = after["record_bytes"] - before["record_bytes"]
    if after["checkpoint_lsn"] > before["tail_lsn"] or used < size_of(held):
        raise Skip(f"a checkpoint has come (LSN {after['checkpoint_lsn']} of {after['tail_lsn']}), so a restart has only {used >> 20} MiB of records to go through")
    primary.kill()
    begun = time.monotonic()
    primary.start()
    socket = f"{primary.home}/c/run/g/control.sock"
    while not os.path.exists(socket) or not (uri := primary.volrep("attach", "g", "--device", "nbd-socket", check=False)):
        if time.monotonic() > begun + 120 or primary.process.poll() is not None:
            raise RuntimeError(f"no device after a crash: {primary.said()}")
        time.sleep(0.005)
    io = lambda *words: subprocess.run(["qemu-io", "-f", "raw", *[w for word in words for w in ("-c", word)], uri], check=True, stdout=subprocess.DEVNULL)
    io("read 1G 64k")
    read = time.monotonic() - begun
    io("write -P 5 512M 4k", "flush")
    return read, time.monotonic() - begun, used
