"""The two machines, their disks, and the wire between them.

A machine is tools/guest's guest with disks whose power can be cut, a card on the wire, a card by which the host reaches
its database, and two ports that take scripts. The wire is a pair of datagram sockets: what is sent to a name that is not
there is lost, so that moving a name away cuts that direction, and neither side is told.
"""
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "tools", "guest"))
sys.dont_write_bytecode = True
import image as images  # noqa: E402
import machine  # noqa: E402

LIMIT = 240.0  # seconds: the end of every wait, only there to end a hang
PG = "/usr/lib/postgresql/15/bin"
OWNER = 101  # of the database's files in the guest: tools/guest/image.py
MEGABYTES = {"state": 160, "backing": 64}
SETTINGS = """
listen_addresses = '*'
unix_socket_directories = '/tmp'
max_connections = 12
shared_buffers = 4MB
min_wal_size = 2MB
max_wal_size = 4MB
checkpoint_timeout = 30s
max_worker_processes = 1
max_parallel_workers = 0
max_wal_senders = 0
wal_level = minimal
autovacuum = off
jit = off
"""
TABLES = """create extension amcheck;
create table commits (writer int, n bigint, filler text, primary key (writer, n));
create table noise (n bigint primary key, v bigint, filler text);
create index on noise (v);
insert into noise select n, n, repeat('y', 200) from generate_series(1, 2000) n;
"""


class Failed(Exception):
    """What is wrong."""


class Gone(Failed):
    """The machine has no power, or not the answer that was expected from one that has."""


def until(what, condition, limit=LIMIT, pause=0.5):
    """Asking a guest costs it more than waiting does."""
    end = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise Failed(f"in vain for {limit:.0f} s: {what}")
        time.sleep(pause)


def run(*command, **more):
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, **more)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    return done.stdout


def free_port():
    """On loopback; below the range from which the kernel takes ports for connections."""
    for _ in range(1000):
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                pass
    raise Failed("no port is free")


def make_database(target):
    """A file system with a cluster on it, with page checksums, made on the host."""
    top = tempfile.mkdtemp(prefix="pg.", dir=os.path.dirname(target))
    try:
        cluster = os.path.join(top, "fs", "cluster")
        os.makedirs(cluster)
        for path in (os.path.dirname(os.path.dirname(top)), os.path.dirname(top), top, os.path.dirname(cluster)):
            os.chmod(path, 0o711)
        shutil.chown(cluster, "postgres", "postgres")
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        run(*user, f"{PG}/initdb", "-k", "-A", "trust", "--wal-segsize=1", "--no-sync", "-D", cluster, cwd="/")
        with open(os.path.join(cluster, "postgresql.auto.conf"), "a") as file:
            file.write(SETTINGS)
        with open(os.path.join(cluster, "pg_hba.conf"), "a") as file:
            file.write("host all all 10.0.2.0/24 trust\n")
        done = subprocess.run([*user, f"{PG}/postgres", "--single", "-j", "-D", cluster, "postgres"], input=TABLES.replace(";\n", ";\n\n"),
                              capture_output=True, text=True, timeout=LIMIT, cwd="/")
        if done.returncode or "ERROR" in done.stderr:
            raise Failed(f"the tables: {done.stderr}")
        for where, names, files in os.walk(cluster):
            for name in [".", *names, *files]:
                os.lchown(os.path.join(where, name), OWNER, OWNER)
        make_disk(target, MEGABYTES["backing"], "-d", os.path.dirname(cluster))
    finally:
        shutil.rmtree(top, ignore_errors=True)


def make_tools(target, *programs):
    """A disk with these files, of which a guest reads only what it uses."""
    top = tempfile.mkdtemp(prefix="tools.", dir=os.path.dirname(target))
    try:
        for program in programs:
            shutil.copy(program, top)
        size = sum(os.path.getsize(program) for program in programs)
        make_disk(target, (size >> 20) + 16, "-d", top)
    finally:
        shutil.rmtree(top, ignore_errors=True)


def make_disk(target, megabytes, *options):
    with open(target, "wb") as file:
        file.truncate(megabytes << 20)
    run("mkfs.ext4", "-Fq", "-E", "lazy_itable_init=0,nodiscard", "-J", "size=4", *options, target, env={**os.environ, "PATH": images.search_path()})


class Disks:
    """The process that serves the disks, and the word that it is given. It ends when its input does."""

    def __init__(self, program):
        self.process = subprocess.Popen([program, "--disks"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=machine.die_with_parent)

    def tell(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        said = self.process.stdout.readline().strip()
        if not said.startswith("ok"):
            raise Failed(f"the disks: {words}: {said}")
        return said[3:]

    def end(self):
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it was interrupted, too
        self.process.wait(timeout=10)


class Port:
    """One port of a guest: runs scripts there, one after the other."""

    def __init__(self, path):
        self.path, self.lock, self.wire = path, threading.Lock(), None

    def open(self):
        def connect():
            wire = socket.socket(socket.AF_UNIX)
            try:
                wire.connect(self.path)
                return wire
            except OSError:
                wire.close()
                return None
        self.wire = until(f"QEMU's socket {self.path}", connect, 60, 0.02)

    def run(self, script, limit=LIMIT):
        with self.lock:
            end, held = time.monotonic() + limit, b""
            try:
                self.wire.settimeout(limit)
                self.wire.sendall(f"{script}\n@@end\n".encode())
                while not (b"\n@@status " in held and held.endswith(b"\n")):
                    self.wire.settimeout(max(0.01, end - time.monotonic()))
                    part = self.wire.recv(1 << 16)
                    if not part:
                        raise Gone(f"the guest hung up on: {script}")
                    held += part
            except TimeoutError:
                raise Failed(f"in vain for {limit:.0f} s, in the guest: {script}\n{held.decode(errors='replace')[-1500:]}") from None
            except OSError as why:
                raise Gone(f"{why}, in the guest: {script}") from None
        text, _, status = held.decode(errors="replace").rpartition("\n@@status ")
        if int(status):
            raise Gone(f"in the guest: {script}: status {status.strip()}: {text[-1500:]}")
        return text


class Machine(machine.Guest):
    """A guest whose power can be cut. Its folder, its disks and the names of its sockets stay.

    Its clock is the HPET: what a kernel takes for the speed of the TSC is wrong by a factor once the host is so busy
    that the guest is not run while it measures.
    """

    def __init__(self, number, lab, folder, image):
        self.name, self.lab, self.on = ("one", "two")[number - 1], lab, False
        self.address, self.sql = f"10.77.0.{number}", free_port()
        plan = machine.Plan(shell=False, guests=1, timeout=1 << 20, mtu=9000, env=[], script=None, arguments=[], files=[], disks=[],
                            cpus=1, memory="512M", append="clocksource=hpet", wire=None)
        os.makedirs(os.path.join(folder, self.name))
        self.wanted, self.tools = number, os.path.join(folder, "tools")
        super().__init__(1, plan, os.path.join(folder, self.name), image)
        self.number = number
        self.top = folder
        self.log = open(os.path.join(folder, f"{self.name}.log"), "ab")
        self.served = [f"{self.name}-{disk}" for disk in MEGABYTES]
        self.act, self.look = (Port(os.path.join(self.folder, port)) for port in ("act", "look"))

    def payload(self):
        """What tools/guest/init unpacks and runs: the script, and who it is."""
        with tarfile.open(os.path.join(self.folder, "run.tar"), "w", format=tarfile.GNU_FORMAT) as tar:
            with open(os.path.join(HERE, "guest.bash")) as file:
                machine.add(tar, "vm/boot", file.read())
            machine.add(tar, "vm/settings", f"NODE={self.name} NUMBER={self.wanted}\n")

    def command(self, out, status):
        words = machine.Guest.command(self, out, status)
        for disk, each in zip(MEGABYTES, self.served):
            words += ["-drive", f"if=none,id={disk},format=raw,file.driver=nbd,file.server.type=unix,file.server.path={self.top}/{each}.nbd,cache=writeback",
                      "-device", f"virtio-blk-pci,drive={disk},serial={disk}"]
        words += ["-drive", f"if=none,id=tools,format=raw,file={self.tools},readonly=on", "-device", "virtio-blk-pci,drive=tools,serial=tools"]
        for port in (self.act, self.look):
            name = os.path.basename(port.path)
            words += ["-chardev", f"socket,id={name},path={port.path},server=on,wait=off", "-device", f"virtserialport,chardev={name},name={name}"]
        words += ["-netdev", f"dgram,id=wire,local.type=unix,local.path={self.top}/wire{self.number},remote.type=unix,remote.path={self.top}/wire{3 - self.number}",
                  "-device", f"virtio-net-pci,netdev=wire,mac=52:54:00:77:00:0{self.number},host_mtu=9000",
                  "-netdev", f"user,id=outside,restrict=on,hostfwd=tcp:127.0.0.1:{self.sql}-10.0.2.15:5432",
                  "-device", f"virtio-net-pci,netdev=outside,mac=52:54:00:78:00:0{self.number}"]
        return words

    def power_on(self):
        """Begins to boot."""
        for disk in self.served:
            self.lab.disks.tell("plug", disk, f"{self.top}/{disk}.nbd")
        for port in (self.act, self.look):
            if os.path.exists(port.path):
                os.unlink(port.path)
        self.ready = self.status = None
        self.log.write(f"--- {self.lab.now():.2f} power\n".encode())
        self.log.flush()
        for pipe, to in zip(self.start(), (self.hear_output, self.hear_status)):
            threading.Thread(target=to, args=(pipe,), daemon=True).start()
        self.on = True
        self.act.open()
        self.look.open()
        wire = f"{self.top}/wire{self.number}"
        until(f"QEMU's socket {wire}", lambda: os.path.exists(wire), 60, 0.02)
        self.lab.wire.keep()

    def hear_output(self, pipe):
        with os.fdopen(pipe, "rb") as file:
            while part := file.read1(1 << 16):
                self.log.write(part)
                self.log.flush()

    def hear_status(self, pipe):
        with os.fdopen(pipe) as file:
            for line in file:
                self.heard(line.strip())

    def booted(self):
        """Waits until it takes scripts."""
        def there():
            if self.process.poll() is not None:
                raise Failed(f"{self.name} has ended while it booted: {self.why()}")
            return self.ready
        until(f"{self.name} boots", there, pause=0.05)
        self.act.run("true")

    def power_off(self):
        """What is left of it after its disks have lost their power."""
        self.kill()
        self.on = False
        self.error.close()
        for name in [f"{self.top}/wire{self.number}", f"{self.top}/wire{self.number}.cut"]:
            if os.path.exists(name):
                os.unlink(name)

    def state(self):
        """What volrep says there; None if it says nothing."""
        if not self.on:
            return None
        try:
            return json.loads(self.look.run("volrep status g --json"))
        except (Gone, ValueError):
            return None


class Wire:
    """Moves the names of the two sockets away, and back."""

    def __init__(self, folder):
        self.names = [f"{folder}/wire{n}" for n in (1, 2)]
        self.is_cut = False

    def cut(self):
        self.is_cut = True
        self.keep()

    def keep(self):
        """Also for a machine that has just made its socket."""
        for name in self.names:
            if self.is_cut and os.path.exists(name):
                os.rename(name, name + ".cut")

    def heal(self):
        self.is_cut = False
        for name in self.names:
            if os.path.exists(name + ".cut") and not os.path.exists(name):
                os.rename(name + ".cut", name)
