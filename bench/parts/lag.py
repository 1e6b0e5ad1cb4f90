"""How late the shadow's image is, at 30, 70 and 100 % of the rate of flushed writes that was the maximum just before.

8k random writes with an fsync after each (fio, NBD), from one writer and from sixteen. Told by two clocks:
- volrep's own `lag.applied` on the shadow (`status --json`): from the seal of each record on the primary to its place in the image,
  all records of the row (the shadow's daemon is started anew before each, so that it counts this row alone);
- a probe from outside (bench/probe.py): from the answer to a FLUSH until the flushed sector is seen in the shadow's file, about 100 times
  a second beside the load. The curves are the probe's.
The shadow's files lie on tmpfs; both nodes, fio and the probe share the machine's processors.
"""
import load, nodes, postgres, probe

TITLE = "Replication lag of flushed writes"
ORDER = 42
SHARES = (0.3, 0.7, 1.0)
JOB = "--rw=randwrite --bs=8k --iodepth=1 --fsync=1"


def row(bench, group, writers, rate, seconds):
    """One level: fio's result, the shadow's own lag, the probe's samples."""
    shadow = group.shadows[0]
    group.settle()
    shadow.end()
    shadow.serve()
    group.follow()
    options = f"{JOB} --numjobs={writers}" + (f" --rate_iops={max(1, round(rate / writers))}" if rate else "")
    with probe.Probe(group.uri, f"{shadow.home}/vol") as seen:
        told = load.fio(group.uri, options, seconds, size="960M")
    lag = shadow.status()["lag"]
    bench.keep(f"lag-{writers}", {"rate": rate, "fio": told.job, "lag": lag, "probe": seen.seen})
    return told, lag, seen.seen


def run(bench):
    seconds = bench.args.seconds
    for writers in (1, 16):
        with nodes.Group(bench, f"lag{writers}") as group:
            load.fio(group.uri, "--rw=write --bs=1M --iodepth=4", None, size="1G")  # allocated
            group.settle()
            level(bench, group, writers, seconds)


def level(bench, group, writers, seconds):
    name = f"lag, {writers} writer{'s' * (writers > 1)}"
    top = max(load.fio(group.uri, f"{JOB} --numjobs={writers}", seconds, size="960M").iops for _ in range(2))
    bench.figure(name, "maximal rate", top, "flushed writes/s")
    curves = {}
    for share in SHARES:
        told, lag, seen = row(bench, group, writers, top * share if share < 1 else None, seconds)
        label = f"{share * 100:.0f} %"
        aims = {"p50": ("<=", 0.5), "p99": ("<=", 3.0)} if share == 0.7 else {}
        for q in "p50", "p99", "max":
            bench.figure(name, f"{label}: applied, {q}", lag["applied"][q] * 1000, "ms", None, aims.get(q), told.command,
                         f"{told.iops:.0f} flushed writes/s; {lag['count']} records; received {q} {lag['received'][q] * 1000:.3g} ms, durable {lag['durable'][q] * 1000:.3g} ms")
        after = sorted(flushed * 1000 for _, flushed in seen)
        for q, quantile in (("p50", 0.5), ("p99", 0.99)):
            bench.figure(name, f"{label}: from the FLUSH's answer, {q} (probe)", postgres.quantile(after, quantile), "ms", None, aims.get(q), None, f"{len(after)} probes")
        curves[f"{label}, {told.iops:.0f}/s"] = postgres.curve(after)
    bench.plot(name, f"From a FLUSH's answer to the shadow's image, {writers} writer{'s' * (writers > 1)}", "cdf", curves, "ms", "share of flushes", logx=True)
