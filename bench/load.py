"""fio on a target, and what a row costs the processes that serve it: processor time, disk, wire, memory."""
import json, os, re, subprocess, threading, time

PERCENTILES = "1:5:10:20:30:40:50:60:70:80:90:95:98:99:99.5:99.9:99.99"
TICK = os.sysconf("SC_CLK_TCK")


class Result:
    """One run of fio: `job` is its own JSON, the rest what the figures are made of."""

    def __init__(self, job, command):
        self.job, self.command = job, command
        self.iops = job["read"]["iops"] + job["write"]["iops"]
        self.bytes = job["read"]["io_bytes"] + job["write"]["io_bytes"]
        self.written = job["write"]["io_bytes"]
        self.rate = job["read"]["bw_bytes"] + job["write"]["bw_bytes"]
        self.seconds = max(job["read"]["runtime"], job["write"]["runtime"]) / 1000
        side = "write" if job["write"]["io_bytes"] else "read"
        self.latency = self.percentiles(job[side]["clat_ns"])
        self.sync = self.percentiles(job.get("sync", {}).get("lat_ns", {}))

    @staticmethod
    def percentiles(told):
        """Microseconds by percentile; empty when nothing was measured."""
        return {float(k): v / 1000 for k, v in told.get("percentile", {}).items()} if told.get("N", 1) else {}


def fio(target, options, seconds=None, size=None, more=()):
    """Runs fio: `target` is an NBD URI or a file or device (then with io_uring and O_DIRECT). A Result."""
    where = ["--ioengine=nbd", f"--uri={target}"] if target.startswith("nbd") else ["--ioengine=io_uring", f"--filename={target}", "--direct=1"]
    timed = [f"--runtime={seconds}", "--time_based"] if seconds else []
    command = ["fio", "--name=row", *where, *timed, *([f"--size={size}"] if size else []), "--randrepeat=0", "--refill_buffers",
               "--buffer_compress_percentage=50", "--group_reporting", f"--percentile_list={PERCENTILES}", "--output-format=json",
               *options.split(), *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            out, err = ended(child, seconds * 4 + 60 if seconds else 300)
        except BaseException:
            child.kill()
            raise
    if child.returncode or "{" not in out:
        raise RuntimeError(f"{' '.join(command)}: status {child.returncode}: {(err or out)[-600:]}")
    document = json.loads(out[out.index("{"):])
    return Result(document["jobs"][0], " ".join(command))


def ended(child, limit):
    """Its output and errors; RuntimeError with what can be seen of it, if it hangs."""
    for grace in (limit, 10):  # all of this may have been suspended for a while, and be on its way again
        try:
            return child.communicate(timeout=grace)
        except subprocess.TimeoutExpired:
            pass
    raise RuntimeError(f"{' '.join(child.args)}: hangs\n{threads_and_sockets()}")


def threads_and_sockets():
    """Where every process stands, and what the sockets of NBD hold: a hang is somebody's defect."""
    said = lambda *words: subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    lines = [line for line in said("ss", "-xnp").splitlines() if "fio" in line or "nbd" in line]
    return said("ps", "-eLo", "pid,tid,stat,wchan:32,time,comm") + "\n".join(lines)


def cpu(pid):
    """Seconds of processor time so far."""
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def disk_written(pid):
    """Bytes that it has caused to be written to disks: not those to tmpfs."""
    with open(f"/proc/{pid}/io") as f:
        return int(re.search(r"^write_bytes: (\d+)", f.read(), re.M).group(1))


def memory(pid):
    """Bytes of anonymous memory now, and of shared (the ring of the write cache); nothing of a process that has ended."""
    try:
        with open(f"/proc/{pid}/status") as f:
            text = f.read()
    except OSError:
        text = ""
    part = lambda name: sum(map(int, re.findall(rf"{name}:\s+(\d+)", text))) * 1024
    return part("RssAnon"), part("RssShmem")


def wire(pid):
    """Bytes that its TCP connections have carried, both ways, without retransmissions; a connection that ended is not in it."""
    out = subprocess.run(["ss", "-tinpH", "state", "established"], stdout=subprocess.PIPE, text=True).stdout
    total, ours = 0, False
    for line in out.splitlines():
        if not line[:1].isspace() and "users:" in line:
            ours = f"pid={pid}," in line
        elif ours:
            total += sum(int(n) for n in re.findall(r"\bbytes_(?:acked|received):(\d+)", line))
    return total


class Meter:
    """What some processes spend between its making and `stop`; `link`: the one whose connections are the wire."""

    def __init__(self, pids, link=None):
        self.pids, self.link, self.most = list(pids), link, [(0, 0)] * len(pids)
        self.before, self.begun = self.now(), time.monotonic()
        self.ended = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()

    def now(self):
        return {"cpu": [cpu(pid) for pid in self.pids], "disk": [disk_written(pid) for pid in self.pids], "wire": [wire(self.link)] if self.link else []}

    def watch(self):
        """The most memory, looked at ten times a second."""
        while True:
            for i, pid in enumerate(self.pids):
                self.most[i] = tuple(map(max, self.most[i], memory(pid)))
            if self.ended.wait(0.1):
                return

    def stop(self):
        """`cpu` (s) and `disk` (bytes) of each process, `wire` (bytes, or nothing), `anon` and `shared` at most, `seconds`."""
        self.ended.set()
        self.watcher.join()
        spent = {key: [b - a for a, b in zip(self.before[key], values)] for key, values in self.now().items()}
        return dict(spent, seconds=time.monotonic() - self.begun, anon=[a for a, _ in self.most], shared=[s for _, s in self.most])
