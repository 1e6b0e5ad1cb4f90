"""Throughput over a distance: links with round trips of 0, 1, 20 and 100 ms.

The shadow joins through the project's own delay proxy (tools/linkcut), also for 0 ms, so that its cost is the same in every row; what the
proxy itself carries is measured with iperf3 through it, and its processor time is told. The round trips are taken up and down again, one
after the other, so that a machine that drifts does not favour one. A row begins when the shadow has applied everything. An asynchronous
writer should not notice the distance, as long as the link carries what it writes: at most `link.window` (16 MiB) of records is on its way in each round
trip, 160 MiB/s at 100 ms; what is more waits in the journal. One whose FLUSH waits for the shadow (`durable`) waits one round trip for each group of commits.
"""
import json, statistics, subprocess, time

import load, nodes
from lab import free_port, wait_for

TITLE = "Round trip of the link"
ORDER = 44
PACKAGES = ("iperf3",)
TRIPS = (0, 1, 20, 100)
JOBS = {"16 writers, 4k + fsync each": "--rw=randwrite --bs=4k --iodepth=1 --fsync=1 --numjobs=16",
        "8k randwrite QD32": "--rw=randwrite --bs=8k --iodepth=32",
        "1 writer, 4k + fsync": "--rw=randwrite --bs=4k --iodepth=1 --fsync=1"}


def carries(bench, rtt, seconds):
    """Bytes a second through the proxy, and its processor's share of a second."""
    port = free_port()
    server = bench.children.start("iperf3", "-s", "-1", "-B", "127.0.0.1", "-p", str(port))
    listens = lambda: f":{port} " in subprocess.run(["ss", "-tlnH"], stdout=subprocess.PIPE, text=True).stdout
    wait_for("iperf3", listens)
    proxy = nodes.Proxy(bench, f"127.0.0.1:{port}", rtt)
    before = load.cpu(proxy.process.pid)
    told = json.loads(subprocess.run(["iperf3", "-c", "127.0.0.1", "-p", proxy.address.rsplit(":", 1)[1], "-t", f"{seconds:g}", "-J"], check=True,
                                     stdout=subprocess.PIPE, text=True).stdout)
    spent = load.cpu(proxy.process.pid) - before
    proxy.close()
    server.wait(20)
    bench.children.list.remove(server)
    return told["end"]["sum_received"]["bits_per_second"] / 8, spent / seconds


def run(bench):
    for rtt in TRIPS[0], TRIPS[-1]:
        rate, share = carries(bench, rtt, max(2, bench.args.seconds / 2))
        bench.figure("the proxy", f"{rtt} ms: carries", rate / 2 ** 20, "MiB/s", note=f"iperf3, one connection; {share * 100:.0f} % of a processor")
    for level, sync in ("async", 0), ("durable", 1):
        with nodes.Group(bench, level, sync=sync, rtt=0) as group:
            load.fio(group.uri, "--rw=write --bs=1M --iodepth=4", None, size="1G")  # allocated
            rows = measured(bench, group, level)
            told(bench, level, rows)


def trip(group, rtt):
    """The shortest of some heartbeats' round trips, seconds: what the link is, whatever the proxy was asked for."""
    end, seen = time.monotonic() + 2.5, []
    while time.monotonic() < end:
        seen.append(group.primary.status()["peers"][0]["round_trip_seconds"])
        time.sleep(0.25)
    # The first ones may be of before the change.
    return min(s for s in seen if s is not None and s >= rtt / 1000)


def measured(bench, group, level):
    """{(job, round trip): [(result of fio, bytes a second on the wire, the proxy's share of a processor, the measured round trip)]}"""
    rows, seconds = {}, bench.args.seconds
    jobs = {name: options for name, options in JOBS.items() if level == "durable" or "1 writer" not in name}
    for number in range(bench.args.rounds):
        for rtt in TRIPS if number % 2 == 0 else TRIPS[::-1]:
            group.settle()
            group.proxy.tell("rtt", rtt)
            told = trip(group, rtt)
            for name, options in jobs.items():
                group.settle()
                meter, proxy = group.meter(), load.cpu(group.proxy.process.pid)
                result = load.fio(group.uri, options, seconds, size="1G")
                spent = meter.stop()
                proxy = (load.cpu(group.proxy.process.pid) - proxy) / spent["seconds"]
                rows.setdefault((name, rtt), []).append((result, spent["wire"][0] / spent["seconds"], proxy, told))
                bench.keep(f"rtt-{level}", {"job": name, "rtt": rtt, "spent": spent, "fio": result.job})
    return rows


def told(bench, level, rows):
    series = {}
    for (name, rtt), runs in rows.items():
        iops = lambda trip: statistics.median(result.iops for result, *_ in rows[name, trip])
        aim = (">=", 0.95) if level == "async" and rtt == TRIPS[-1] else None
        result, wire, proxy, trip = runs[0]
        syncs = [r.sync[99] / 1000 for r, *_ in runs if r.sync]
        note = f"the link's round trip by the idle daemons' heartbeat {trip * 1000:.3g} ms; {wire / 2 ** 20:.0f} MiB/s on the wire, the proxy at {proxy * 100:.0f} % of a processor; rounds: {', '.join(f'{r.iops:.0f}' for r, *_ in runs)}"
        note += f"; fsync p50 {statistics.median(r.sync[50] for r, *_ in runs) / 1000:.3g} ms, p99 {statistics.median(syncs):.3g} ms" if syncs else ""
        bench.figure(f"{level}, {name}", f"{rtt} ms", iops(rtt), "writes/s", ("0 ms", iops(0)) if rtt else None, aim, result.command, note)
        series.setdefault(name, []).append((rtt, iops(rtt)))
    bench.plot(level, f"Writes against the link's round trip, {level}", "line", {name: sorted(points) for name, points in series.items()}, "round trip, ms",
               "writes/s", logy=True)
