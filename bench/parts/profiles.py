"""Four loads as databases make them (bench/profiles/*.fio), on volrep with a live shadow on tmpfs, and on the bare file through the same client.

The bare file is served by qemu-nbd with O_DIRECT and native AIO, so that fio's NBD client and one copy through a socket are on both sides of the
comparison. `volrep bench` runs the same files. The subjects take turns; both volumes were written once before. One burst of the write daemon of
`iris-like` fits a run of less than 80 s (`--long`: 170 s, three of them).
"""
import json, os, statistics, subprocess

import load, nodes, targets

TITLE = "Profiles: pg-oltp, iris-like, bulk, mixed"
ORDER = 38
PROFILES = ("pg-oltp", "iris-like", "bulk", "mixed")
SIZE = "2G"


def profile(name, uri, seconds):
    """{name of the job in the file: its Result}"""
    path = os.path.join(nodes.ROOT, "bench/profiles", f"{name}.fio")
    command = ["fio", "--ioengine=nbd", f"--uri={uri}", f"--size={SIZE}", f"--runtime={seconds:g}", f"--percentile_list={load.PERCENTILES}",
               "--output-format=json", path]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=seconds * 2 + 120)
    if done.returncode or "{" not in done.stdout:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {(done.stderr or done.stdout)[-600:]}")
    document = json.loads(done.stdout[done.stdout.index("{"):])
    told = " ".join(command).replace(path, f"bench/profiles/{name}.fio")
    return {job["jobname"]: load.Result(job, told) for job in document["jobs"]}


def run(bench):
    seconds = bench.args.seconds * 2
    rows = {}
    with nodes.Group(bench, "profiles", SIZE) as group:
        bare = targets.makers(bench, SIZE)["qemu-nbd direct"]()
        subjects = {"volrep": group.uri, "bare file": bare.target}
        for uri in subjects.values():
            load.fio(uri, "--rw=write --bs=1M --iodepth=4", None, size=SIZE)  # allocated
        for name in PROFILES:
            length = 170 if name == "iris-like" and bench.args.long else max(4, seconds)
            for number in range(bench.args.rounds):
                for subject in list(subjects) if number % 2 == 0 else list(subjects)[::-1]:
                    group.settle()
                    for job, result in profile(name, subjects[subject], length).items():
                        rows.setdefault((name, job), {}).setdefault(subject, []).append(result)
                        bench.keep(f"profile-{name}", {"subject": subject, "fio": result.job})
        group.settle()
        bare.end()
    for (name, job), runs in rows.items():
        told(bench, name, job, runs)


def told(bench, name, job, runs):
    """Rates as ratios to the bare file's, and what a flush or a request took."""
    bars = {}
    for side in "read", "write":
        iops = {subject: statistics.median(r.job[side]["iops"] for r in results) for subject, results in runs.items()}
        if not iops["bare file"]:
            continue
        command = runs["volrep"][0].command
        bench.figure(name, f"{job}: {side}s", iops["volrep"], "/s", ("bare file", iops["bare file"]), None, command)
        latency = lambda r: r.sync if side == "write" and r.sync else r.percentiles(r.job[side]["clat_ns"])
        what = "fsync" if side == "write" and runs["volrep"][0].sync else side
        for q in 50, 99, 99.9:
            times = {subject: statistics.median(latency(r)[q] for r in results) / 1000 for subject, results in runs.items()}
            bench.figure(f"{name}, latency", f"{job}: {what}, p{q:g}", times["volrep"], "ms", ("bare file", times["bare file"]), None, command)
        for subject in runs:
            bars.setdefault(subject, []).append((side, iops[subject]))
    bench.plot(name, f"{name}: {job}", "bar", bars, "", "/s")
