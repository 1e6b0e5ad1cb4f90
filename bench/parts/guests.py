"""volrep beside DRBD 8.4, in one pair of emulated machines with Debian's kernel 6.12: fio on the bare virtio disk, on
ublk that hands everything on, on volrep asynchronous and DRBD protocol A, on volrep durable and DRBD protocol C.
bench/guests does it; bench/README.md tells DRBD's settings, what is the same for all, and what is not. Software
emulation: hashing and compression cost many times what they cost on a real processor, DRBD does neither, so these
ratios are a lower bound."""
import json, os, shutil

from suite import Skip

TITLE = "Beside DRBD, in two guests"
ORDER = 70
LONG = True
PACKAGES = ["qemu-system-x86", "busybox-static", "cpio", "kmod", "xz-utils", "binutils"]
PAIRS = [("volrep async", "DRBD A"), ("volrep durable", "DRBD C")]


def aim(row, subject):
    """Where an fsync decides, 1.5 times A and not behind C; elsewhere 0.8; 0.4 for 1 MiB."""
    if "fdatasync" in row:
        return 1.5 if subject == "volrep async" else 1.0
    return 0.4 if row.startswith("1M") else 0.8


def measured(bench):
    if not shutil.which("qemu-system-x86_64"):
        raise Skip("qemu-system-x86 is not installed")
    out = f"{bench.args.dir}/guests.json"
    passthrough = os.path.join(os.path.dirname(bench.args.volrep), "examples/passthrough")
    command = [os.path.join(bench.root, "bench/guests"), "--seconds", str(max(2, round(bench.args.seconds))), "--rounds", str(min(2, bench.args.rounds)),
               "--volrep", bench.args.volrep, "--out", out, *(["--passthrough", passthrough] if os.path.exists(passthrough) else []),
               *(["--rows", "4k randwrite QD32", "--megabytes", "64"] if bench.args.quick else [])]
    status = bench.script(command)
    if not os.path.exists(out):
        raise RuntimeError(f"{' '.join(command)}: status {status}")
    with bench.piece("bench/guests"):
        if status:  # its limit of time, or a subject that failed: what it measured is told all the same
            raise Skip(f"ended with status {status}; the rows that it had are here")
    with open(out) as f:
        return json.load(f)["results"], " ".join(command)


def run(bench):
    results, command = measured(bench)
    bench.keep("guests", results)
    values = {}
    for r in results:
        values.setdefault(r["row"], {}).setdefault(r["subject"], []).append(r["iops"])
    ratios = {}
    for row, subjects in values.items():
        value = {name: bench.median(runs) for name, runs in subjects.items()}
        for ours, theirs in PAIRS:
            if ours in value and theirs in value:
                bench.figure(row, ours, value[ours], "writes/s", (theirs, value[theirs]), (">=", aim(row, ours)), command)
        for name in value:
            if name != "disk" and "disk" in value:
                ratio = bench.figure(row, name, value[name], "writes/s", ("the guest's bare disk", value["disk"]))
                ratios.setdefault(name, []).append((row, ratio))
    bench.plot("All rows", "Ratio to the guest's bare disk", "bar", ratios, "", "ratio")
