"""What is measured, each on the same two disks of each guest: /dev/vda holds the data, /dev/vdb what a
subject keeps beside them (DRBD's metadata, volrep's journal).

Every subject has its device from `begin` to `end`, is idle after `settle`, and leaves nothing behind.
"""
import json
import mmap
import os
import re
import socket
import subprocess
import time

DATA, ASIDE = "/dev/vda", "/dev/vdb"
PEER = "10.77.0.2"


class Failed(Exception):
    pass


def say(text):
    print(f"{open('/proc/uptime').read().split()[0]} {text}", flush=True)


def run(*command, limit=60, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, **options)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
    return done.stdout


def peer(script, limit=60):
    """Runs a bash script in the second guest: what tools/guest/serve listens for."""
    with socket.create_connection((PEER, 77), timeout=limit) as connection:
        connection.sendall(f"{script}\n@@end\n".encode())
        said = b""
        while not re.search(rb"(^|\n)@@status \d+\n$", said):
            part = connection.recv(65536)
            if not part:
                raise Failed(f"the second guest hung up on: {script}\n{said.decode(errors='replace')[-1000:]}")
            said += part
    text, _, status = said.decode().rpartition("@@status ")
    if int(status):
        raise Failed(f"in the second guest: {script}: status {status.strip()}\n{text[-1000:]}")
    return text


def until(what, condition, limit=60.0):
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise Failed(f"not within {limit:.0f} s: {what}")
        time.sleep(0.02)


def all_of(*steps):
    """Takes every step, also after one that failed; then raises the first failure."""
    failures = []
    for step in steps:
        try:
            step()
        except Exception as why:
            failures.append(why)
    if failures:
        raise failures[0]


def blank(megabytes):
    """Zeroes on all disks of both guests, written, so that nobody pays for the allocation in the host's file."""
    zeroes = f"for disk in {DATA} {ASIDE}; do dd if=/dev/zero of=$disk bs=1M count={megabytes} oflag=direct status=none; done"
    other = socket.create_connection((PEER, 77), timeout=120)
    other.sendall(f"{zeroes}\n@@end\n".encode())
    run("bash", "-c", zeroes, limit=120)
    while b"@@status 0" not in (part := other.recv(65536)):
        if not part:
            raise Failed("the second guest could not write zeroes to its disks")
    other.close()


class Subject:
    """The disk itself, with nothing in between."""
    name = "disk"
    device = DATA

    def __init__(self, plan):
        self.plan = plan

    def begin(self):
        pass

    def warm_up(self):
        """One block in each 4 MiB: DRBD's activity log has every extent then, as on a volume that is in use."""
        block = mmap.mmap(-1, 4096)
        disk = os.open(self.device, os.O_RDWR | os.O_DIRECT)
        for at in range(0, self.plan["megabytes"] << 20, 4 << 20):
            os.pwrite(disk, block, at)
        os.fsync(disk)
        os.close(disk)

    def settle(self):
        """Waits until nothing of the last row is under way, here or in the second guest."""

    def note(self):
        """What else is worth keeping about the last row."""
        return {}

    def tell(self):
        """Says what may explain a failure."""

    def end(self):
        pass


class Passthrough(Subject):
    """A ublk device on the disk that does nothing of its own."""
    name, server = "ublk passthrough", None

    def begin(self):
        self.server = subprocess.Popen(["passthrough", DATA], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.device = self.server.stdout.readline().strip()
        if not self.device:
            raise Failed("passthrough has made no device")

    def end(self):
        if not self.server:
            return
        self.server.stdin.close()
        try:
            status = self.server.wait(30)
        except subprocess.TimeoutExpired:
            self.server.kill()
            status = self.server.wait()
        if status:
            raise Failed(f"passthrough ended with status {status}")


class Volrep(Subject):
    """A primary here and a shadow there; `durable` has it in the sync set."""
    place, group, durable = "/srv/volrep", "g", False
    daemon = there = None

    def verb(self, *words, **options):
        return run("volrep", "--config", f"{self.place}/c", *words, **options)

    def begin(self):
        format_it = f"mkfs.ext4 -Fq -b 4096 -E nodiscard,lazy_itable_init=0 {ASIDE} && mkdir -p {self.place} && mount {ASIDE} {self.place}"
        run("bash", "-c", format_it)
        peer(format_it)
        sync = ["--sync", "guest2"] if self.durable else []
        journal = ["--journal-size", self.plan["journal"]]
        self.verb("init", self.group, "--node", "guest1", "--listen", "10.77.0.1:7654", "--volume", f"data={DATA}", *journal, *sync)
        token = self.verb("token", self.group, "--peer", "guest2").strip()
        peer(f"volrep --config {self.place}/c join '{token}' --node guest2 --listen none --volume data={DATA} "
             f"--journal-size {self.plan['journal']}")
        self.daemon = subprocess.Popen(["volrep", "--config", f"{self.place}/c", "serve", self.group],
                                       stdout=open("/run/volrep.log", "w"), stderr=subprocess.STDOUT)
        self.there = peer(f"volrep --config {self.place}/c serve {self.group} >/run/volrep.log 2>&1 & echo $!").strip()
        until("volrep serves", lambda: self.status().get("state") not in (None, "Stopped"))
        self.device = self.verb("attach", self.group, "--device", "ublk").strip()
        until("the shadow follows", lambda: self.behind() == 0)

    def status(self):
        done = subprocess.run(["volrep", "--config", f"{self.place}/c", "status", self.group, "--json"],
                              capture_output=True, text=True, timeout=30)
        document = json.loads(done.stdout) if done.returncode == 0 and done.stdout.strip() else {}
        return document.get("groups", [document])[0]

    def behind(self):
        """Records that are not applied on the shadow; None without one."""
        status = self.status()
        peers = [p for p in status["peers"] if p["state"] != "Disconnected"]
        return status["tail_lsn"] - peers[0]["applied_lsn"] if peers else None

    def settle(self):
        until("the shadow has applied everything", lambda: self.behind() == 0, 180)

    def tell(self):
        print("--- the primary's log:", open("/run/volrep.log").read()[-3000:], "--- the shadow's log:", sep="\n")
        print(peer("tail -c 3000 /run/volrep.log"))

    def end(self):
        def stop():
            self.daemon.terminate()
            self.daemon.wait(60)

        unmount = f"mountpoint -q {self.place} && umount {self.place}; true"
        steps = [lambda: self.verb("detach", self.group), stop] if self.daemon else []
        if self.there:
            steps.append(lambda: peer(f"kill {self.there}; while [ -e /proc/{self.there} ]; do sleep 0.05; done"))
        all_of(*steps, lambda: run("bash", "-c", unmount), lambda: peer(unmount))


class VolrepAsync(Volrep):
    name = "volrep async"


class VolrepDurable(Volrep):
    name, durable = "volrep durable", True


class Drbd(Subject):
    """DRBD 8.4 on the same disks, its metadata on the second one."""
    device = "/dev/drbd0"

    def begin(self):
        conf = f"""
global {{ usage-count no; }}
resource r0 {{
  device {self.device}; disk {DATA}; meta-disk {ASIDE};
  disk {{ {self.plan['drbd_disk']} }}
  net {{ protocol {self.protocol}; {self.plan['drbd_net']} }}
  on guest1 {{ address 10.77.0.1:7789; }}
  on guest2 {{ address 10.77.0.2:7789; }}
}}
"""
        up = (f"modprobe drbd && cat >/etc/drbd.conf <<'CONF'\n{conf}CONF\n"
              "drbdadm -- --force create-md r0 >/run/drbd.log 2>&1 && drbdadm up r0 2>&1")
        run("bash", "-c", up)
        peer(up)
        until("DRBD is connected", lambda: "cs:Connected" in self.state())
        # Both disks are zeroes: there is nothing to copy.
        run("drbdadm", "--", "--clear-bitmap", "new-current-uuid", "r0/0")
        run("drbdadm", "primary", "r0")
        until("DRBD is in order", lambda: "Primary/Secondary ds:UpToDate/UpToDate" in self.state())

    @staticmethod
    def state():
        return open("/proc/drbd").read()

    def settle(self):
        idle = re.compile(r" lo:0 pe:0 ua:0 ap:0 .* oos:0")
        until("DRBD is idle", lambda: idle.search(self.state()) and idle.search(peer("cat /proc/drbd")))

    def tell(self):
        print(self.state(), "--- the second guest:", peer("cat /proc/drbd; dmesg | tail -n 20"), sep="\n")

    def end(self):
        all_of(lambda: run("drbdadm", "down", "r0"), lambda: peer("drbdadm down r0"))


class DrbdA(Drbd):
    name, protocol = "DRBD A", "A"


class DrbdC(Drbd):
    name, protocol = "DRBD C", "C"


def make(name, plan):
    kinds = [Subject, Passthrough, VolrepAsync, VolrepDurable, DrbdA, DrbdC]
    return next(kind for kind in kinds if kind.name == name)(plan)
