#!/usr/bin/env python3
"""What only ublk has, on a kernel that has it: its limits, devices that outlive their daemon however that
ends, strangers' devices, faults. Runs as root inside a guest, with `volrep` in the path:

    ublk_alone.py [SCENARIO[:ROUNDS]...]     without any, all of them with few rounds

A line begins with `ok:`, `figure:` or `FAILED`; the exit status says whether any failed.
"""
import json
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

MIB = 1 << 20


def run(*command, check=True, limit=120, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=limit, **options)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def until(condition, what, limit=60.0):
    """Waits for something that has no descriptor to wait on."""
    deadline = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit:.0f} s: {what}")
        time.sleep(0.01)


class Node:
    """A node of a group, its files in a directory of its own."""
    all = []

    def __init__(self, program, name, group="epic", env=None):
        self.program, self.name, self.group = program, name, group
        self.dir = os.path.join(os.getcwd(), name)
        self.env = {**os.environ, "RUST_LOG": "info", **(env or {})}
        self.daemon = None
        self.starts = 0
        Node.all.append(self)

    def verb(self, *words, check=True, **options):
        return run(self.program, "--config", self.dir, *words, check=check, env=self.env, **options)

    def volrep(self, *words, check=True, **options):
        return self.verb(words[0], self.group, *words[1:], check=check, **options)

    def backing(self, volume="data"):
        return os.path.join(os.getcwd(), f"{self.name}-{volume}.img")

    def init(self, *words, volumes=(("data", "256M"),), listen="none", journal="64M"):
        for volume, size in volumes:
            words += ("--volume", f"{volume}={self.backing(volume)}:{size}")
        self.volrep("init", "--node", self.name, "--listen", listen, "--journal-size", journal, *words)
        return self

    def log(self):
        with open(f"{self.dir}-{self.starts}.log", errors="replace") as file:
            return file.read()

    def start(self, program=None):
        self.starts += 1
        with open(f"{self.dir}-{self.starts}.log", "w") as log:
            self.daemon = subprocess.Popen([program or self.program, "--config", self.dir, "serve", self.group],
                                           stdout=log, stderr=log, env=self.env)
        return self

    def ready(self):
        def look():
            assert self.daemon.poll() is None, f"the daemon has ended:\n{self.log()}"
            return " ready" in self.log()
        until(look, "the daemon is ready")
        return self

    def kill(self):
        self.daemon.kill()
        self.daemon.wait()

    def stop(self):
        self.daemon.terminate()
        status = self.daemon.wait(60)
        assert status == 0, f"the daemon ended with status {status}:\n{self.log()}"

    def attach(self):
        """The block devices by volume: what the link points to."""
        reply = json.loads(self.volrep("attach", "--device", "ublk", "--json").stdout)
        assert reply["kind"] == "ublk", reply
        return {v["volume"]: os.path.realpath(v["device"]) for v in reply["volumes"]}

    def detach(self, check=True):
        return self.volrep("detach", check=check)

    @classmethod
    def end(cls, failed):
        """No daemon is left; after a failure, one for each node is, or whoever waits for a device waits
        for ever, and nobody gets to read why."""
        for node in cls.all:
            if failed and node.starts and node.daemon.poll() is not None:
                node.start()
            elif not failed and node.starts and node.daemon.poll() is None:
                node.kill()
        cls.all = []


def attribute(device, name):
    with open(f"/sys/block/{os.path.basename(device)}/{name}") as file:
        return file.read().strip()


def ublk_disks():
    return sorted(name for name in os.listdir("/sys/block") if name.startswith("ublkb"))


def same(a, b, length):
    """Whether two files or devices are equal, read past the page cache of the devices."""
    done = run("cmp", "-n", length, a, b, check=False)
    return done.returncode == 0


def drop_caches():
    run("sync")
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")


def fio(device, seconds, *more, depth=32, size="128M"):
    """Random writes of several sizes, each read back and compared, with fsyncs among them."""
    return subprocess.Popen(
        ["fio", "--name=verified", f"--filename={device}", "--rw=randwrite", "--bsrange=4k-64k", "--direct=1",
         "--ioengine=libaio", f"--iodepth={depth}", f"--size={size}", "--verify=crc32c", "--verify_backlog=128",
         "--verify_fatal=1", "--fsync=48", "--time_based", f"--runtime={seconds}", "--output-format=json", *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fio_result(job, limit=600):
    out, err = job.communicate(timeout=limit)
    # 128: it was told to stop, and has checked what it had written.
    assert job.returncode in (0, 128), f"fio: status {job.returncode}\n{out[-3000:]}\n{err[-3000:]}"
    job = json.loads(out[out.index("{"):])["jobs"][0]
    assert job["error"] == 0, f"fio: error {job['error']}"
    return job


class Prober(threading.Thread):
    """Writes one block after another, each durable, and remembers how long each took and when it began.
    Before it overwrites a block it reads it: it must be what was acknowledged."""

    def __init__(self, device, offset):
        super().__init__(daemon=True)
        self.fd = os.open(device, os.O_RDWR | os.O_DIRECT)
        self.offset, self.slots, self.halt, self.error = offset, 64, threading.Event(), None
        self.took, self.newest, self.read = [], {}, mmap.mmap(-1, 4096)

    def run(self):
        buffer, n = mmap.mmap(-1, 4096), 0
        try:
            while not self.halt.is_set():
                n += 1
                self.check(n % self.slots)
                buffer[:] = n.to_bytes(8, "little") * 512
                begun = time.monotonic()
                assert os.pwrite(self.fd, buffer, self.offset + n % self.slots * 4096) == 4096
                os.fdatasync(self.fd)
                self.took.append((begun, time.monotonic() - begun))
                self.newest[n % self.slots] = n
        except Exception as error:  # told to whoever checks
            self.error = error

    def finish(self):
        self.halt.set()
        self.join(60)
        assert not self.is_alive(), "a write does not come back"
        assert self.error is None, f"a write failed: {self.error}"
        for slot in self.newest:
            self.check(slot)
        os.close(self.fd)

    def check(self, slot):
        """Reads what was written last."""
        if slot not in self.newest:
            return
        assert os.preadv(self.fd, [self.read], self.offset + slot * 4096) == 4096
        want = self.newest[slot].to_bytes(8, "little") * 512
        assert self.read[:] == want, f"slot {slot} has {self.read[:8].hex()}, not write {self.newest[slot]}"

    def longest(self, begin=0.0, end=float("inf")):
        return max((took for begun, took in self.took if begin <= begun + took and begun <= end), default=0.0)


def limits(program):
    """The kernel knows what the node keeps; two volumes are two devices; both go with detach."""
    node = Node(program, "limits").init(volumes=(("data", "256M"), ("wal", "64M")))
    node.start().ready()
    devices = node.attach()
    assert set(devices) == {"data", "wal"} and len(set(devices.values())) == 2, devices
    assert os.path.realpath(f"{node.dir}/dev/epic/data") == devices["data"]
    for volume, size in (("data", 256 * MIB), ("wal", 64 * MIB)):
        device = devices[volume]
        # Had it read a partition table while it started the disk, a daemon killed meanwhile would be stuck.
        assert attribute(device, "stat").split()[0] == "0", "the kernel has read from a new device"
        for name, value in (
            ("queue/write_cache", "write back"), ("queue/fua", "1"), ("queue/rotational", "0"),
            ("queue/logical_block_size", "512"), ("queue/physical_block_size", "4096"),
            ("queue/minimum_io_size", "4096"), ("queue/optimal_io_size", "4096"),
            ("queue/discard_granularity", "4096"), ("queue/discard_max_bytes", str(1 << 30)),
            ("queue/write_zeroes_max_bytes", str(1 << 30)), ("queue/max_hw_sectors_kb", "1024"),
            ("queue/nr_requests", "127"), ("queue/io_timeout", "1000"), ("size", str(size // 512)), ("ro", "0"),
        ):
            assert attribute(device, name) == value, f"{device} {name}: {attribute(device, name)}, not {value}"
        row = run("lsblk", "-bdnro", "PHY-SEC,LOG-SEC,MIN-IO,OPT-IO,DISC-GRAN,ROTA,SIZE", device).stdout.split()
        assert row == ["4096", "512", "4096", "4096", "4096", "0", str(size)], row
    discards(devices["data"])
    node.stop()
    assert len(ublk_disks()) == 2, "a clean stop keeps the devices"
    node.start().ready()
    assert node.attach() == devices
    done = node.detach()
    assert not ublk_disks() and not os.path.lexists(f"{node.dir}/dev/epic"), (done, ublk_disks())
    assert node.attach() and node.detach() and not ublk_disks()


def discards(device):
    """Both give zeroes, exactly where they were asked for, down to a sector."""
    block = os.urandom(MIB)
    fd = os.open(device, os.O_RDWR)
    os.pwrite(fd, block, 0)
    os.fsync(fd)
    os.close(fd)
    run("blkdiscard", "--offset", 64 << 10, "--length", 64 << 10, device)
    run("blkdiscard", "--zeroout", "--offset", 512, "--length", 1024, device)
    drop_caches()
    with open(device, "rb") as file:
        got = file.read(MIB)
    want = bytearray(block)
    want[64 << 10:128 << 10] = bytes(64 << 10)
    want[512:1536] = bytes(1024)
    assert got == want, "a discard or a zeroing hit the wrong bytes, or none"


def pair(program, name, *words, env=None):
    """A primary and its shadow, both started."""
    node = Node(program, name, env=env).init(*words, listen="127.0.0.1:17654")
    shadow = Node(program, f"{name}-shadow")
    token = node.volrep("token", "--peer", shadow.name).stdout
    shadow.verb("join", "-", "--node", shadow.name, "--listen", "none", "--journal-size", "64M",
                "--volume", f"data={shadow.backing()}", input=token)
    shadow.start()
    return node.start().ready(), shadow


def killed(program, rounds, env=None, name="killed"):
    """kill -9 under verified load, over and over: no error, no wrong byte, the same device; and the shadow
    has what the backing has."""
    node, shadow = pair(program, name, env=env)
    jobs, prober = [], None
    try:
        device = node.attach()["data"]
        born = attribute(device, "diskseq")
        prober = Prober(device, 192 * MIB)
        prober.start()
        rng, pauses, begun = random.Random(rounds), [], time.monotonic()
        job = fio(device, 100000)
        jobs.append(job)
        time.sleep(1)
        for n in range(rounds):
            at = time.monotonic()
            node.kill()
            node.start()
            if rng.random() < 0.2:
                # Before it has taken over, or in the middle of that.
                time.sleep(rng.random() * 0.6)
                node.kill()
                node.start()
            node.ready()
            back = time.monotonic()
            assert attribute(device, "diskseq") == born, "it is another device"
            assert f"{device} is taken over" in node.log(), node.log()
            until(lambda: prober.took and prober.took[-1][0] > back or prober.error, "a write after the take-over")
            pauses.append(prober.longest(at, back))
            assert job.poll() is None, f"fio has ended in round {n}: {job.communicate()}"
            assert prober.error is None, f"a write failed in round {n}: {prober.error}"
            time.sleep(rng.random())
        job.send_signal(signal.SIGINT)
        result = fio_result(job)
        prober.finish()
        assert shadow.daemon.poll() is None
        node.detach()
        equal(node, shadow)
        pauses.sort()
        print(f"figure: ublk: {rounds} rounds of kill -9 in {time.monotonic() - begun:.0f} s, {result['write']['io_bytes'] >> 20} MiB verified, "
              f"{len(prober.took)} durable writes checked; longest write per round: "
              f"median {pauses[len(pauses) // 2]:.2f} s, longest {pauses[-1]:.2f} s")
    finally:
        for job in jobs:
            if job.poll() is None:
                job.kill()


def equal(node, shadow):
    """The shadow's image becomes the backing's."""
    def look():
        here, there = (json.loads(n.volrep("status", "--json").stdout) for n in (node, shadow))
        return here["applied_lsn"] == here["tail_lsn"] == there["applied_lsn"]
    until(look, "the shadow has applied everything", 120)
    shadow.stop()
    node.stop()
    assert same(node.backing(), shadow.backing(), os.path.getsize(node.backing())), "the shadow differs from the backing"


def kills(program, rounds=5):
    killed(program, rounds)


def kills_with_buffers(program, rounds=3):
    """The same without user copy."""
    killed(program, rounds, env={"VOLREP_UBLK_TRANSFER": "buffers"}, name="buffers")


def every_tag(program):
    """A daemon that dies with as many requests in its hands as the device can have is followed at once.
    They are durable writes that a lost member of the sync set keeps from being answered."""
    node, shadow = pair(program, "tags", "--sync", "tags-shadow")
    device = node.attach()["data"]
    until(lambda: "entered the sync set" in node.log(), "the shadow is in the sync set")
    shadow.kill()
    # An fsync would wait for the writes before it, and nothing would come after it.
    job = fio(device, 6, "--sync=dsync", "--fsync=0", depth=250)
    longest = 0.0
    for _ in range(3):
        until(lambda: attribute(device, "inflight").split()[1] == "127", "every tag but one has a request")
        time.sleep(0.5)  # on their way from the kernel to the node
        at = time.monotonic()
        node.kill()
        node.start().ready()
        longest = max(longest, time.monotonic() - at)
        assert job.poll() is None, f"fio has ended: {job.communicate()}"
    shadow.start()
    fio_result(job)
    node.detach()
    print(f"figure: ublk: killed with 127 requests in its hands: served again after {longest:.2f} s at most")
    assert longest < 15, "the kernel has waited for its timer of 30 s"


def stopped_while_detaching(program):
    """A detach that waits for a lost member of the sync set keeps no daemon from being stopped: the device stays."""
    node, shadow = pair(program, "stopped", "--sync", "stopped-shadow")
    device = node.attach()["data"]
    until(lambda: "entered the sync set" in node.log(), "the shadow is in the sync set")
    shadow.kill()
    run("dd", "if=/dev/urandom", f"of={device}", "bs=4k", "count=1", "oflag=direct", "status=none")
    detach = subprocess.Popen([program, "--config", node.dir, "detach", node.group], env=node.env,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def claimed():
        return run("find", f"/proc/{node.daemon.pid}/fd", "-lname", device, check=False).stdout
    until(claimed, "the daemon has its own device open")
    time.sleep(1)  # what does not wait has ended by then
    assert detach.poll() is None, f"it did not wait: {detach.communicate()}"
    node.stop()
    told = detach.communicate(timeout=60)[0]
    assert detach.returncode == 11 and "leaves the devices to the next one" in told, (detach.returncode, told)
    node.start().ready()
    assert os.path.exists(device), "the device is gone"
    shadow.start()
    node.detach()


def partitions(program):
    """They are there when somebody asks for them, over a restart, and a mounted one keeps its device."""
    node = Node(program, "partitions").init()
    node.start().ready()
    device = node.attach()["data"]
    name = os.path.basename(device)
    with open(device, "r+b") as file:
        # One entry: Linux, from sector 2048, 131072 sectors; and the signature.
        file.seek(446)
        file.write(bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little") + (131072).to_bytes(4, "little"))
        file.seek(510)
        file.write(b"\x55\xaa")
    node.detach()
    node.attach()
    assert not os.path.exists(f"/sys/block/{name}/{name}p1"), "the kernel looks for partitions by itself"
    run("partx", "--add", device)
    until(lambda: os.path.exists(f"/dev/{name}p1"), "the partition's node")
    run("mkfs.ext4", "-Fq", f"/dev/{name}p1")
    os.makedirs("mnt", exist_ok=True)
    run("mount", f"/dev/{name}p1", "mnt")
    node.kill()
    node.start().ready()
    with open("mnt/file", "w") as file:
        file.write("written")
        os.fsync(file.fileno())
    refused = node.detach(check=False)
    assert refused.returncode == 11 and "/mnt" in refused.stderr, refused
    run("umount", "mnt")
    node.detach()


def attach_killed(program, rounds=8):
    """A daemon that is killed while it makes or deletes devices leaves nothing in the way."""
    node = Node(program, "attaching").init(volumes=(("data", "64M"), ("wal", "64M")), journal="32M")
    rng = random.Random(7)
    node.start().ready()
    for n in range(rounds):
        verb = "attach" if n % 3 < 2 else "detach"
        words = ["attach", node.group, "--device", "ublk"] if verb == "attach" else ["detach", node.group]
        asked = subprocess.Popen([program, "--config", node.dir, *words], stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL, env=node.env)
        time.sleep(rng.random() * 0.25)
        node.kill()
        asked.wait(30)
        node.start().ready()
        devices = node.attach()
        assert sorted(os.path.basename(d) for d in devices.values()) == ublk_disks(), (devices, ublk_disks())
        assert len(os.listdir("/sys/class/ublk-char")) == 2
        with open(devices["wal"], "r+b", buffering=0) as file:
            file.write(os.urandom(4096))
            os.fsync(file.fileno())
        if rng.random() < 0.5:
            node.detach()
            assert not ublk_disks() and not os.listdir("/sys/class/ublk-char")
    node.detach()


def strangers(program):
    """Devices of another group, with and without a daemon, are left alone."""
    one, two = (Node(program, name, group=name).init() for name in ("one", "two"))
    for node in (one, two):
        node.start().ready()
    first, second = one.attach()["data"], two.attach()["data"]
    two.kill()
    born = attribute(second, "diskseq")
    one.detach()
    again = one.attach()["data"]
    one.kill()
    one.start().ready()
    assert one.attach()["data"] == again and again != second and first != second
    one.detach()
    assert ublk_disks() == [os.path.basename(second)] and attribute(second, "diskseq") == born
    two.start().ready()
    assert two.attach()["data"] == second
    two.detach()


def failing(program):
    """A backing that fails: errors, told as such, until detach."""
    node = Node(program, "failing")
    size = 64 * MIB
    with open("failing.disk", "wb") as file:
        file.truncate(size)
    run("modprobe", "--all", "loop", "dm_mod")
    loop = run("losetup", "--find", "--show", "failing.disk").stdout.strip()
    sectors = size // 512
    run("dmsetup", "create", "failing", "--noudevsync", "--table", f"0 {sectors} linear {loop} 0")
    run("dmsetup", "mknodes", "failing")
    try:
        node.volrep("init", "--node", "failing", "--listen", "none", "--journal-size", "32M", "--volume",
                    "data=/dev/mapper/failing")
        node.start().ready()
        device = node.attach()["data"]
        with open(device, "r+b", buffering=0) as file:
            file.write(bytes(4096))
            os.fsync(file.fileno())
            run("dmsetup", "suspend", "failing")
            run("dmsetup", "load", "failing", "--table", f"0 {sectors} error")
            run("dmsetup", "resume", "failing")
            file.write(b"x" * 4096)
            failed = None
            deadline = time.monotonic() + 30
            while failed is None and time.monotonic() < deadline:
                try:
                    file.write(b"y" * 4096)
                    os.fsync(file.fileno())
                    time.sleep(0.1)
                except OSError as error:
                    failed = error.errno
        assert failed == 5, f"errno {failed}"
        assert node.daemon.poll() is None and ublk_disks() == [os.path.basename(device)], "it stays until detach"
        done = node.detach(check=False)
        assert not ublk_disks(), done
    finally:
        run("dmsetup", "remove", "--force", "failing", check=False)
        run("losetup", "--detach", loop, check=False)


SCENARIOS = [limits, partitions, strangers, attach_killed, failing, every_tag, stopped_while_detaching, kills, kills_with_buffers]


def main():
    program = shutil.which("volrep")
    wanted = [word.partition(":") for word in sys.argv[1:]] or [(s.__name__, "", "") for s in SCENARIOS]
    known = {s.__name__: s for s in SCENARIOS}
    os.chdir(tempfile.mkdtemp())
    if disk := os.environ.get("SCRATCH"):
        run("mkfs.ext4", "-Fq", "-E", "lazy_itable_init=0", disk)
        run("mount", disk, ".")
        os.chdir(os.getcwd())
    status = 0
    for name, _, rounds in wanted:
        scenario = known[name]
        begun = time.monotonic()
        os.makedirs(scenario.__name__, exist_ok=True)
        home = os.getcwd()
        os.chdir(scenario.__name__)
        try:
            scenario(program, *([int(rounds)] if rounds else []))
            left = ublk_disks()
            assert not left, f"left behind: {left}"
            Node.end(failed=False)
            print(f"ok: {scenario.__name__} ({time.monotonic() - begun:.1f} s)", flush=True)
        except Exception:
            status = 1
            print(f"FAILED {scenario.__name__} {time.monotonic() - begun:.1f} s\n{traceback.format_exc()}", flush=True)
            for name in sorted(n for n in os.listdir(".") if n.endswith(".log"))[-3:]:
                with open(name, errors="replace") as file:
                    print(f"--- {name}\n{file.read()[-3000:]}", flush=True)
            print(run("sh", "-c", "dmesg | tail -20", check=False).stdout, flush=True)
            Node.end(failed=True)
            break
        os.chdir(home)
        shutil.rmtree(scenario.__name__)
    # Not the kernel's threads, but its complaints: a hung task, a warning of the driver.
    kernel = run("sh", "-c", "dmesg | grep -E 'WARNING:|BUG:|INFO: task|Oops' || true").stdout
    if kernel:
        status = 1
        print(f"FAILED the kernel complains:\n{kernel}")
    sys.exit(status)


main()
