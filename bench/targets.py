"""What fio is run on, beside volrep: other NBD servers, a bare file, a loop device. Each has `target` for fio, `pids` that
serve it, and `settle`, after which one row's leftovers are not the next row's."""
import os, shutil, subprocess

import lab
from suite import Skip


def made(bench, name, size):
    """A file of that size, in a directory of its own."""
    os.makedirs(f"{bench.args.dir}/{name}")
    path = f"{bench.args.dir}/{name}/vol"
    with open(path, "wb") as f:
        f.truncate(lab.size_of(size))
    return path


class File:
    """A bare file: no server; what serves it is the kernel."""

    pids = ()

    def __init__(self, bench, name, size):
        self.path = self.target = made(bench, name, size)

    def settle(self):
        """What the page cache still holds of it goes to the disk."""
        fd = os.open(self.path, os.O_RDWR)
        os.fsync(fd)
        os.close(fd)

    def end(self):
        pass


class Loop(File):
    """A loop device with direct I/O on such a file."""

    def __init__(self, bench, name, size):
        super().__init__(bench, name, size)
        done = subprocess.run(["losetup", "--find", "--show", "--direct-io=on", self.path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise Skip(f"no loop device: {done.stderr.strip()}")
        self.target = done.stdout.strip()

    def end(self):
        subprocess.run(["losetup", "--detach", self.target], check=True)


class Served(File):
    """Somebody else's NBD server on a file; `{file}`, `{sock}` and `{size}` in its command are replaced."""

    def __init__(self, bench, name, size, command):
        super().__init__(bench, name, size)
        if not shutil.which(command[0]):
            raise Skip(f"{command[0]} is not installed")
        sock = f"{bench.args.dir}/{name}/sock"
        self.children = bench.children
        self.child = bench.children.start(*[w.format(file=self.path, sock=sock, size=size) for w in command])
        lab.wait_for(name, lambda: os.path.exists(sock))
        self.target, self.pids = f"nbd+unix:///?socket={sock}", (self.child.pid,)

    def end(self):
        self.children.end(self.child)


class Pair:
    """volrep: a primary and its shadow."""

    def __init__(self, bench, name, size, **options):
        # The journal is written when it is made: a smoke run is not to wait for that.
        self.pair = bench.pair(name, size=size, journal="128M" if bench.args.quick else None, **options)
        self.target, self.pids = self.pair.uri, tuple(d.pid for d in self.pair.daemons)

    def settle(self):
        """The shadow has applied everything, and the primary's backing has it, too."""
        self.pair.settle()
        lab.wait_for("write-back", lambda: not self.pair.status(self.pair.a)["cache_used"], 120)

    def checkpoint(self):
        """Both backings have everything, and both superblocks say so."""
        self.settle()
        done = lambda side: (s := self.pair.status(side))["checkpoint_lsn"] >= s["applied_lsn"]
        lab.wait_for("checkpoints", lambda: done(self.pair.a) and done(self.pair.b), 60)

    def end(self):
        self.pair.end()


def makers(bench, size):
    """Everything that can be measured, by its name on the page; none is made before it is asked for."""
    served = lambda name, *command: lambda: Served(bench, name, size, command)
    return {
        "volrep": lambda: Pair(bench, "volrep", size),
        "volrep durable": lambda: Pair(bench, "durable", size, durable=True),
        "volrep, one disk": lambda: Pair(bench, "volrep-disk", size, on_disk=True),
        "volrep durable, one disk": lambda: Pair(bench, "durable-disk", size, durable=True, on_disk=True),
        "nbdkit file": served("nbdkit", "nbdkit", "-f", "-U", "{sock}", "file", "{file}"),
        "qemu-nbd": served("qemu-nbd", "qemu-nbd", "-t", "-e", "64", "-f", "raw", "--cache=writeback", "-k", "{sock}", "{file}"),
        "qemu-nbd direct": served("qemu-direct", "qemu-nbd", "-t", "-e", "64", "-f", "raw", "--cache=none", "--aio=native", "-k", "{sock}", "{file}"),
        "nbdkit memory": served("memory", "nbdkit", "-f", "-U", "{sock}", "memory", "{size}"),
        "bare file": lambda: File(bench, "bare", size),
        "bare file, page cache": lambda: File(bench, "bare-cached", size),
        "loop device": lambda: Loop(bench, "loop", size),
    }
