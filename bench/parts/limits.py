"""What the machine can do at all: the disk below the files, memory, compression, hashing, loopback TCP. The other
parts' figures can't pass these.

The disk: fio, io_uring, O_DIRECT, on one file that was written before. zstd and BLAKE3 take data like fio's in the
other parts, which compress to half, in memory, on one core. memcpy is one of 64 MiB, so it is memory's speed and not
a cache's."""
import json, os, re, shutil, subprocess, time

import load
from suite import Skip

TITLE = "Limits of the machine"
ORDER = 10

DISK = [
    ("4k randwrite QD1", "--rw=randwrite --bs=4k --iodepth=1", "IOPS"),
    ("4k randwrite QD32", "--rw=randwrite --bs=4k --iodepth=32", "IOPS"),
    ("4k randwrite QD1 + fdatasync", "--rw=randwrite --bs=4k --iodepth=1 --fdatasync=1", "IOPS"),
    ("64k append, O_DSYNC: a group commit", "--rw=write --bs=64k --iodepth=1 --sync=dsync", "IOPS"),
    ("4k randread QD1", "--rw=randread --bs=4k --iodepth=1", "IOPS"),
    ("4k randread QD32", "--rw=randread --bs=4k --iodepth=32", "IOPS"),
    ("1M sequential write QD4", "--rw=write --bs=1M --iodepth=4", "MB/s"),
    ("1M sequential read QD4", "--rw=read --bs=1M --iodepth=4", "MB/s"),
]


def disk(bench, size):
    path = f"{bench.args.dir}/file"
    load.fio(path, "--rw=write --bs=1M --iodepth=4", size=size)
    group, bars = "Disk", {"IOPS": [], "MB/s": []}
    for name, options, unit in DISK:
        runs = [load.fio(path, options, bench.args.seconds, size) for _ in range(bench.args.rounds)]
        for run in runs:
            bench.keep(name, run.job)
        value = bench.median([run.iops if unit == "IOPS" else run.rate / 1e6 for run in runs])
        tail = {p: bench.median([run.latency[p] for run in runs]) for p in (50, 99, 99.9)}
        bench.figure(group, name, value, unit, command=runs[0].command, note=f"completion p50 {tail[50]:,.0f}, p99 {tail[99]:,.0f}, p99.9 {tail[99.9]:,.0f} µs")
        bars[unit].append((name, value))
    bench.plot(group, "Requests a second, O_DIRECT", "bar", {"disk": bars["IOPS"]}, "", "IOPS")
    runs = [load.fio(path, "--direct=0 --ioengine=psync --rw=write --bs=1M --overwrite=1", size=size) for _ in range(bench.args.rounds)]
    cached = bench.median([run.rate / 1e6 for run in runs])
    bench.figure(group, "1M sequential write into the page cache", cached, "MB/s", command=runs[0].command)
    bars["MB/s"].append(("1M sequential write into the page cache", cached))
    bench.plot(group, "Throughput", "bar", {"disk": bars["MB/s"]}, "", "MB/s")
    os.remove(path)


def best(rounds, run):
    """Of something that only other work can make slower."""
    return max(run() for _ in range(rounds))


def memcpy(bench):
    source, target = memoryview(bytearray(os.urandom(1 << 20) * 64)), memoryview(bytearray(64 << 20))

    def run():
        begun, copies = time.perf_counter(), 0
        while time.perf_counter() - begun < 0.5:
            target[:] = source
            copies += 1
        return copies * len(source) / (time.perf_counter() - begun) / 1e6
    bench.figure("Memory and processor, one core", "memcpy", best(bench.args.rounds, run), "MB/s", note="64 MiB at a time, read and written once each")


def compress_and_hash(bench, megabytes):
    group, path = "Memory and processor, one core", f"{bench.args.shadow_dir}/data"
    load.fio(path, "--direct=0 --ioengine=psync --rw=write --bs=64k", size=f"{megabytes}M")
    if not shutil.which("zstd"):
        raise Skip("zstd is not installed")
    for unit in ("64", "1024"):
        command = ["zstd", "-b1", "-i1", f"-B{unit}K", path]
        out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout.replace("\r", "\n")
        # Level, size before and after, ratio, speed of both ways; the last line is the result.
        size, packed, speed, back = re.findall(r"(\d+) -> +(\d+) \(.*?\), +([\d.]+) MB/s *, +([\d.]+) MB/s", out)[-1]
        note = f"level 1, independent blocks of {unit} KiB; {int(size) / int(packed):.2f} to 1"
        bench.figure(group, f"zstd of {unit} KiB", float(speed), "MB/s", command=" ".join(command), note=note)
        bench.figure(group, f"zstd of {unit} KiB, unpacked", float(back), "MB/s")
    if not shutil.which("b3sum"):
        raise Skip("b3sum is not installed: no figure for BLAKE3")
    command = ["b3sum", "--num-threads", "1", path]

    def run():
        begun = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        return megabytes * 1.048576 / (time.perf_counter() - begun)
    bench.figure(group, "BLAKE3", best(max(3, bench.args.rounds), run), "MB/s", command=" ".join(command), note="b3sum of a file in memory, its start included")


def tcp(bench):
    if not shutil.which("iperf3"):
        raise Skip("iperf3 is not installed")
    port = str(bench.lab.free_port())
    server = bench.children.start("iperf3", "-s", "-1", "-B", "127.0.0.1", "-p", port)
    listening = lambda: subprocess.run(["ss", "-tlnH", f"sport = :{port}"], stdout=subprocess.PIPE).stdout
    bench.lab.wait_for("iperf3", listening)
    command = ["iperf3", "-c", "127.0.0.1", "-p", port, "-t", str(max(1, int(bench.args.seconds))), "-J"]
    end = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)["end"]
    bench.children.end(server)
    bench.figure("Loopback", "TCP, one stream", end["sum_received"]["bits_per_second"] / 8e6, "MB/s", command=" ".join(command),
                 note=f"processors busy: sender {end['cpu_utilization_percent']['host_total']:.0f} %, receiver {end['cpu_utilization_percent']['remote_total']:.0f} %")


def run(bench):
    with bench.piece("disk"):
        disk(bench, "256M" if bench.args.quick else "2G")
    memcpy(bench)
    with bench.piece("compression and hash"):
        compress_and_hash(bench, 64 if bench.args.quick else 512)
    with bench.piece("loopback"):
        tcp(bench)
