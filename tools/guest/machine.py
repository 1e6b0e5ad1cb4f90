"""One run of one or two guests: QEMU's command lines, the files of the run, the clock, the end.

However a run ends, no QEMU outlives it: each is a child that the kernel kills with its parent, and
every wait here has a limit. A guest has no way out: no network but the wire between two guests.
"""
import ctypes
import io
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

from image import Trouble

HERE = os.path.dirname(os.path.abspath(__file__))
BOOT_LIMIT = 120  # seconds to the guest's shell; a loaded machine's worst, not its usual 5
GRACE = 30  # seconds that a guest has, after its script, to hand out results and switch off


class Plan:
    """What the command line asked for."""

    def __init__(self, **words):
        self.__dict__.update(words)


def accelerator():
    """Software emulation unless asked: /dev/kvm exists on machines where a guest hangs on it.

    6.12 guests die of QEMU 7.2's emulation of cmpxchg16b (a kernel BUG in kmem_cache_alloc): without it.
    Nor with "fast" string operations, which it carries out byte by byte: they make the kernel's copies
    eight times slower.
    """
    if os.environ.get("VOLREP_VM_ACCEL") == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", "tcg,thread=multi", "-cpu", "max,-cx16,-erms"]


def size_of(text):
    found = re.fullmatch(r"(\d+)([KMGT])", text)
    return int(found[1]) << {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]] if found else None


def direct_works(folder):
    path = os.path.join(folder, "direct")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600))
        return True
    except OSError:
        return False
    finally:
        if os.path.exists(path):
            os.unlink(path)


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def lay_wire(mtu):
    """Moves this process into a network of its own, with a bridge and a tap for each guest in it. They
    go when the last process in it does."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):  # CLONE_NEWNET
        raise Trouble("--wire tap needs root: " + os.strerror(ctypes.get_errno()))
    commands = ["link add bridge mtu {mtu} type bridge", "link set bridge up"]
    for number in [1, 2]:
        tap = f"wire{number}"
        commands += [f"tuntap add {tap} mode tap vnet_hdr", f"link set {tap} mtu {{mtu}} master bridge up"]
    for words in commands:
        done = subprocess.run(["ip", *words.format(mtu=mtu).split()], capture_output=True, text=True)
        if done.returncode:
            raise Trouble(f"--wire tap: ip {words}: {done.stderr.strip()}")


class Guest:
    """A QEMU process and the host's ends of its ports."""

    def __init__(self, number, plan, folder, image):
        self.number, self.plan, self.folder, self.image = number, plan, os.path.join(folder, str(number)), image
        self.wire = os.path.join(folder, "wire")
        self.ready = self.status = self.process = None
        self.deaf = False  # its status port is closed: QEMU has ended
        os.makedirs(self.folder)
        self.console = os.path.join(self.folder, "console")
        self.results = os.path.join(self.folder, "results")
        self.payload()

    def payload(self):
        """A tar file, read by the guest straight from a disk: scripts, settings, what --file named."""
        plan = self.plan
        mode = "shell" if plan.shell else "run" if self.number == 1 else "peer"
        settings = {"VM_MODE": mode, "VM_GUEST": self.number, "VM_GUESTS": plan.guests, "VM_LIMIT": plan.timeout,
                    "VM_MTU": plan.mtu, **dict(word.split("=", 1) for word in plan.env)}
        text = "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in settings.items())
        path = os.path.join(self.folder, "run.tar")
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for name in ["boot", "serve", "lib.sh"]:
                tar.add(os.path.join(HERE, name), f"vm/{name}", filter=owned)
            add(tar, "vm/settings", text)
            if plan.script:
                tar.add(plan.script, "vm/script", filter=owned)
                words = " ".join(shlex.quote(word) for word in plan.arguments)
                with open(plan.script, "rb") as file:
                    start = "bash " if file.read(2) != b"#!" else ""
                add(tar, "vm/command", f"chmod +x /vm/script; exec {start}/vm/script {words}\n")
            for host, guest in plan.files:
                tar.add(host, guest.lstrip("/"), filter=owned)
        # QEMU reads whole sectors.
        with open(path, "ab") as file:
            file.truncate((os.path.getsize(path) + 4095) // 4096 * 4096)

    def command(self, out, status):
        plan, folder = self.plan, self.folder
        # no_timer_check: on a busy host the emulated timer is late, and a guest that counts its ticks gives up.
        # maxcpus: a kernel that starts rewrites its own code, over a breakpoint, which QEMU's emulation may still run on
        # another processor when it is long gone ("int3" in the guest's last words). tools/guest/boot adds the others.
        # lpj: what an added processor would else spend two seconds on counting; a loop for a clock of 4 GHz, so that no
        # delay of the kernel's is too short.
        append = ("console=ttyS0 loglevel=4 panic=-1 oops=panic mitigations=off nokaslr random.trust_cpu=on "
                  "tsc=reliable no_timer_check maxcpus=1 lpj=16000000")
        words = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35",
                 *accelerator(), "-smp", str(plan.cpus), "-m", plan.memory,
                 "-kernel", f"{self.image}/vmlinuz", "-initrd", f"{self.image}/initrd", "-append", append + " " + plan.append,
                 "-chardev", f"file,id=console,path={self.console}", "-serial", "chardev:console",
                 "-device", "virtio-serial-pci", "-device", "virtio-rng-pci",
                 "-chardev", f"file,id=status,path=/dev/fd/{status}", "-device", "virtserialport,chardev=status,name=status",
                 "-chardev", f"file,id=results,path={self.results}", "-device", "virtserialport,chardev=results,name=results"]
        if plan.shell:
            words += ["-chardev", "stdio,id=hvc,mux=on,signal=off", "-device", "virtconsole,chardev=hvc"]
        else:
            words += ["-chardev", f"file,id=out,path=/dev/fd/{out}", "-device", "virtserialport,chardev=out,name=out"]
        cache = "none,aio=native" if direct_works(folder) else "writeback"
        for number, (path, _) in enumerate(self.disks()):
            words += ["-drive", f"if=none,id=d{number},format=raw,file={path},cache={cache},discard=unmap",
                      "-device", f"virtio-blk-pci,drive=d{number},serial=disk{number + 1}"]
        for name, path in [("root", f"{self.image}/root.ext4"), ("run", f"{folder}/run.tar")]:
            words += ["-drive", f"if=none,id={name},format=raw,file={path},readonly=on",
                      "-device", f"virtio-blk-pci,drive={name},serial={name}"]
        if plan.guests == 2:
            words += self.network()
        return words

    def network(self):
        """A stream socket between the two processes: no TCP of the host in between, no privilege. Or a
        tap, which hands over whole segments without checksums, as a network card does."""
        card = f"virtio-net-pci,netdev=wire,mac=52:54:00:77:00:0{self.number},host_mtu={self.plan.mtu}"
        if self.plan.wire == "tap":
            return ["-netdev", f"tap,id=wire,ifname=wire{self.number},script=no,downscript=no", "-device", card]
        role = "server=on" if self.number == 1 else "server=off"
        return ["-netdev", f"stream,id=wire,{role},addr.type=unix,addr.path={self.wire}",
                "-device", card]

    def disks(self):
        """(path, made here) of each: a file of this run for a size, or the file that was named."""
        for number, word in enumerate(self.plan.disks):
            made = size_of(word) is not None
            yield (os.path.join(self.folder, f"disk{number + 1}") if made else os.path.abspath(word)), made

    def start(self):
        for (path, made), word in zip(self.disks(), self.plan.disks):
            if made:
                with open(path, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, size_of(word))
        out_read, out = os.pipe()
        status_read, status = os.pipe()
        self.error = open(os.path.join(self.folder, "qemu"), "w+")
        self.process = subprocess.Popen(self.command(out, status), pass_fds=[out, status], stderr=self.error,
                                        stdin=None if self.plan.shell else subprocess.DEVNULL,
                                        stdout=None if self.plan.shell else subprocess.DEVNULL,
                                        preexec_fn=die_with_parent)
        os.close(out)
        os.close(status)
        return out_read, status_read

    def heard(self, line):
        if line == "ready":
            self.ready = time.monotonic()
        elif line.startswith("exit "):
            self.status = int(line[5:])

    def why(self):
        """The last words of a guest that ended without a status."""
        self.error.seek(0)
        words = self.error.read().strip()
        if os.path.exists(self.console):
            with open(self.console, errors="replace") as file:
                words += "\n" + "".join(file.readlines()[-25:]).strip()
        return words.strip() or "it said nothing"

    def kill(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def owned(member):
    """As the guest's root owns it, whoever runs this."""
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def add(tar, name, text):
    member = tarfile.TarInfo(name)
    data = text.encode()
    member.size, member.mode, member.mtime = len(data), 0o755, int(time.time())
    tar.addfile(member, io.BytesIO(data))


class Run:
    """The guests of one run, from their start until nothing of them is left."""

    def __init__(self, plan, image, say):
        self.plan, self.say = plan, say
        self.folder = tempfile.mkdtemp(prefix="vm.", dir=plan.scratch)
        self.begun = time.monotonic()
        if plan.guests == 2 and plan.wire == "tap":
            lay_wire(plan.mtu)
        self.pipes = selectors.DefaultSelector()
        try:
            self.guests = [Guest(number + 1, plan, self.folder, image) for number in range(plan.guests)]
        except BaseException:
            self.clean()
            raise

    def clean(self):
        for guest in getattr(self, "guests", []):
            guest.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def go(self):
        """The script's exit status."""
        try:
            self.start()
            self.listen()
            return self.verdict()
        finally:
            self.clean()

    def start(self):
        for guest in self.guests:
            out, status = guest.start()
            self.pipes.register(out, selectors.EVENT_READ, (guest, "out", bytearray()))
            self.pipes.register(status, selectors.EVENT_READ, (guest, "status", bytearray()))
            if self.plan.guests == 2 and guest.number == 1 and self.plan.wire == "socket":
                self.wait_for_wire(guest)

    def wait_for_wire(self, guest):
        end = time.monotonic() + 10
        while not os.path.exists(guest.wire) and guest.process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)

    def deadline(self):
        """Until when the guests may run: to be ready, then for the script and its end."""
        if not all(guest.ready for guest in self.guests):
            return self.begun + BOOT_LIMIT, f"no shell after {BOOT_LIMIT} s"
        if self.plan.shell:
            return float("inf"), ""
        return self.guests[0].ready + self.plan.timeout + GRACE, f"still running {GRACE} s after the limit of {self.plan.timeout} s"

    def listen(self):
        told = False
        while self.pipes.get_map():
            end, why = self.deadline()
            rest = end - time.monotonic()
            if rest <= 0:
                raise Trouble(f"the guest was killed: {why}. Its last words:\n{self.last_words()}")
            for key, _ in self.pipes.select(min(rest, 5)):
                self.read(key)
            if any(guest.status is None and guest.deaf for guest in self.guests):
                break  # it crashed; the other one would wait for it in vain
            if not told and all(guest.ready for guest in self.guests):
                told = True
                self.say(f"shell after {max(guest.ready for guest in self.guests) - self.begun:.1f} s")
        for guest in self.guests:
            if guest.status is None:
                self.drain()
                return
        for guest in self.guests:
            guest.process.wait(timeout=GRACE)

    def drain(self):
        """What the guests said before one of them crashed."""
        for key in [key for key in list(self.pipes.get_map().values()) if key.data[1] == "out"]:
            os.set_blocking(key.fd, False)
            try:
                while key.fd in self.pipes.get_map():
                    self.read(key)
            except BlockingIOError:
                pass

    def read(self, key):
        guest, kind, held = key.data
        data = os.read(key.fd, 1 << 16)
        if not data:
            self.pipes.unregister(key.fd)
            os.close(key.fd)
            guest.deaf |= kind == "status"
        elif kind == "out":
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            held += data
            while b"\n" in held:
                line, _, rest = bytes(held).partition(b"\n")
                held[:] = rest
                guest.heard(line.decode(errors="replace").strip())

    def last_words(self):
        return "\n".join(f"guest {guest.number}: {guest.why()}" for guest in self.guests if guest.status is None)

    def verdict(self):
        if self.plan.out:
            self.collect()
        if any(guest.status is None for guest in self.guests):
            raise Trouble(f"a guest ended before its script did. Its last words:\n{self.last_words()}")
        return self.guests[0].status

    def collect(self):
        for guest in self.guests:
            target = self.plan.out if guest.number == 1 else os.path.join(self.plan.out, "peer")
            os.makedirs(target, exist_ok=True)
            shutil.copy(guest.console, os.path.join(target, "console.log"))
            if os.path.getsize(guest.results):
                subprocess.run(["tar", "--extract", "--file", guest.results, "--directory", target,
                                "--no-same-owner"], check=False)
