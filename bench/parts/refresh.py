"""`volrep refresh` of a PostgreSQL volume of which a share of the pages was changed behind the shadow's back, beside
rsync (--inplace --no-whole-file) and beside copying everything (dd, nbdcopy; both with a flush at the end). Both
nodes, and both of rsync's processes, share this machine's processors and its one disk; a copy over a network that is
slower than this loopback would fall back by as much as it sends more. bench/refresh does it, and tells more."""
import json, os

from suite import Skip

TITLE = "Refresh, beside rsync and full copies"
ORDER = 60
# Refresh at least so many times as fast as rsync.
RSYNC = {"disk": 4, "memory": 12}
MIB = 1 << 20


def measured(bench):
    """What bench/refresh told."""
    out = f"{bench.args.dir}/refresh.json"
    size, shares = ("64M", "1") if bench.args.quick else ("2G", "0,0.1,1,10")
    command = [os.path.join(bench.root, "bench/refresh"), "--size", size, "--shares", shares, "--dir", bench.args.dir, "--volrep", bench.args.volrep,
               "--out", out, *(["--data", "/usr/bin"] if bench.args.quick else [])]
    if status := bench.script(command):
        raise RuntimeError(f"{' '.join(command)}: status {status}")
    with open(out) as f:
        return size, json.load(f), " ".join(command)


def run(bench):
    if os.geteuid() != 0:
        raise Skip("dropping the page cache needs root")
    size, document, command = measured(bench)
    bench.keep("refresh", document)
    volume = bench.lab.size_of(size)
    for source in ("disk", "memory"):
        rows = [row for row in document["rows"] if row["source"] == source]
        group, bars = f"Refresh of {size}, both sides from {source}", {}
        copies = next(row["copy"] for row in rows if "copy" in row)
        for row in rows:
            name = f"{row['share']:g} % {'clustered' if row['clustered'] else 'scattered' if row['share'] else 'differ'}"
            one(bench, group, name, row, copies, volume, command)
            for label, value in [("refresh", row["volrep"]["seconds"]), ("rsync", row["rsync"]["seconds"]), *copies.items()]:
                bars.setdefault(label, []).append((name, value))
        bench.plot(group, "Seconds", "bar", bars, "pages that differ", "s", logy=True)
        wire = {"refresh": [(n, row["volrep"]["wire"] / MIB) for (n, _), row in zip(bars["refresh"], rows)],
                "rsync": [(n, row["rsync"]["wire"] / MIB) for (n, _), row in zip(bars["refresh"], rows)],
                "full copy": [(n, volume / MIB) for n, _ in bars["refresh"]]}
        bench.plot(group, "On the wire", "bar", wire, "pages that differ", "MiB", logy=True)


def one(bench, group, name, row, copies, volume, command):
    """The figures of one share."""
    ours, rsync = row["volrep"], row["rsync"]
    speed = lambda seconds: volume / seconds / 1e6
    bench.figure(group, f"{name}: speed", speed(ours["seconds"]), "MB/s", ("rsync", speed(rsync["seconds"])), (">=", RSYNC[row["source"]]), command,
                 f"refresh {ours['seconds']:.2f} s, rsync {rsync['seconds']:.2f} s")
    for tool, seconds in copies.items():
        bench.figure(group, f"{name}: speed", speed(ours["seconds"]), "MB/s", (f"{tool} of everything", speed(seconds)), note=f"{tool} {seconds:.2f} s")
    # Both files lie on one disk; from memory the two sides are read by two processors.
    reads = row["read"] * (2 if row["source"] == "disk" else 1)
    bench.figure(group, f"{name}: time", ours["seconds"], "s", ("reading both sides" if row["source"] == "disk" else "reading one side", reads),
                 ("<=", 1.2) if row["source"] == "disk" else None)
    bench.figure(group, f"{name}: wire", ours["wire"] / MIB, "MiB", ("rsync", rsync["wire"] / MIB))
    if "leaves" in row:
        bound = (row["leaves"] * 1.1 + volume / 1000) / MIB
        bench.figure(group, f"{name}: wire", ours["wire"] / MIB, "MiB", ("1.1 x the leaves under zstd + 0.1 % of the volume", bound), ("<=", 1.0))
    bench.figure(group, f"{name}: processor time", ours["cpu"], "s", ("rsync", rsync["cpu"]))
    bench.figure(group, f"{name}: memory", ours["memory"] / MIB, "MiB", aim=("<=", 64), note="anonymous, the larger of the two nodes, at most")
