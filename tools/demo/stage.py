"""What a demonstration stands on: processes, nodes, a database, the screen, and the way back.

Owns: every process, mount, loop device and file that is made. Invariant: `Stage.clear` takes all of
it away, whatever happened before, and ends only processes that were started here.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

TOOLS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Trouble(Exception):
    """Something did not happen that had to."""


class Screen:
    """One line per fact, under phases with their times."""

    def __init__(self):
        self.color = sys.stdout.isatty() and os.environ.get("NO_COLOR") is None
        self.start = self.phase_start = time.monotonic()
        self.failures = []

    def paint(self, code, text):
        return f"\033[{code}m{text}\033[0m" if self.color else text

    def say(self, text=""):
        print(text, flush=True)

    def phase(self, title):
        self.say(f"\n{self.paint('2', f'{time.monotonic() - self.start:5.1f} s')}  {self.paint('1', title)}")

    def fact(self, text):
        self.say(f"         {self.paint('2', '·')} {text}")

    def check(self, truth, text, otherwise=None):
        """A fact that must be true."""
        if not truth:
            text = otherwise or f"not so: {text}"
            self.failures.append(text)
        mark = self.paint("32", "✓") if truth else self.paint("31;1", "✗")
        self.say(f"         {mark} {text}")
        return truth


def span(seconds):
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.1f} s"


def count(n, what):
    """One record, 2 records."""
    return f"{n:,}".replace(",", " ") + f" {what}{'' if n == 1 else 's'}"


def wait(what, condition, seconds=30.0, step=0.02):
    """The first true value of `condition`, within a bound."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise Trouble(f"after {seconds:g} s still waiting for {what}")
        time.sleep(step)


def identity(user):
    """How a process becomes `user`'s."""
    return dict(user=user, group=user, extra_groups=[]) if user else {}


class Stage:
    """A directory, and all that lives because of it."""

    def __init__(self, directory, volrep):
        self.made = not os.path.exists(directory)
        os.makedirs(directory, exist_ok=True)
        os.chmod(directory, 0o711)  # The database's user passes through it.
        self.dir, self.volrep = os.path.realpath(directory), volrep
        self.shm = f"/dev/shm/volrep-quickstart-{os.getpid()}"
        self.processes = []

    def path(self, *names):
        return os.path.join(self.dir, *names)

    def run(self, *command, user=None, check=True, timeout=60, **options):
        """Runs a command to its end; its output."""
        options.update(identity(user))
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=timeout, cwd="/", **options)
        except subprocess.TimeoutExpired as e:
            raise Trouble(f"`{' '.join(command)}` did not end within {timeout:g} s") from e
        if check and done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-6:]
            raise Trouble(f"`{' '.join(command)}` failed ({done.returncode}): " + "\n  ".join(said))
        return done.stdout.strip()

    def start(self, name, *command, user=None, env=None):
        """Starts a process whose output goes to NAME.log."""
        log = open(self.path(f"{name}.log"), "ab")
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env={**os.environ, **(env or {})}, start_new_session=True, **identity(user))
        log.close()
        process.name = name
        self.processes.append(process)
        return process

    def tail(self, name, lines=8):
        try:
            with open(self.path(f"{name}.log"), errors="replace") as f:
                return [line.rstrip() for line in f.readlines()[-lines:]]
        except OSError:
            return []

    def mounts(self):
        with open("/proc/self/mounts") as f:
            places = [line.split()[1].encode().decode("unicode_escape") for line in f]
        return [p for p in reversed(places) if p.startswith(self.dir + "/")]

    def end(self, process, signal_number=signal.SIGTERM, seconds=10):
        """Ends one of our processes; kills its session when it does not listen."""
        if process.poll() is None:
            process.send_signal(signal_number)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(seconds)
        if process in self.processes:
            self.processes.remove(process)

    def clear(self):
        """Takes everything away, newest first; what can't be taken is returned."""
        left = []

        def attempt(what, act):
            try:
                act()
            except Exception as e:  # The rest still has to go.
                left.append(f"{what}: {e}")

        fs = lambda: [m for m in self.mounts() if not m.endswith("/fuse")]
        daemons = [p for p in self.processes if p.name in ("east", "west")]
        for process in [p for p in reversed(self.processes) if p not in daemons]:
            quit = signal.SIGQUIT if process.name == "postgres" else signal.SIGTERM
            attempt(process.name, lambda p=process, q=quit: self.end(p, q))
        for place in fs():
            attempt(f"umount {place}", lambda p=place: self.unmount(p))
        for process in daemons:
            attempt(process.name, lambda p=process: self.end(p, seconds=20))
        # Before the mounts below them: afterwards the kernel no longer says where their files were.
        listed = self.run("losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE", check=False)
        for line in listed.splitlines():
            if self.dir + "/" in line:
                attempt(line, lambda d=line.split()[0]: self.run("losetup", "-d", d))
        for place in self.mounts():
            attempt(f"umount {place}", lambda p=place: self.run("umount", "-l", p))
        shutil.rmtree(self.shm, ignore_errors=True)
        if self.mounts():
            left.append(f"mounted: {' '.join(self.mounts())}")  # Never delete through a mount.
        elif self.made:
            attempt(self.dir, lambda: shutil.rmtree(self.dir))
        else:
            for name in os.listdir(self.dir):
                path = self.path(name)
                attempt(path, lambda p=path: shutil.rmtree(p) if os.path.isdir(p) and not os.path.islink(p) else os.unlink(p))
        return left

    def unmount(self, place):
        """Whoever still closes files after its end is waited for, for a while."""
        wait(f"umount {place}", lambda: subprocess.run(["umount", place], stderr=subprocess.DEVNULL).returncode == 0, 10, 0.05)


class Node:
    """A node of the group `demo`."""

    def __init__(self, stage, name):
        self.stage, self.name, self.process = stage, name, None
        self.env = {"VOLREP_SHM_DIR": os.path.join(stage.shm, name), "VOLREP_LOG": os.environ.get("VOLREP_LOG", "info")}

    def volrep(self, *arguments, timeout=60, check=True):
        return self.stage.run(self.stage.volrep, *arguments, "--config", self.stage.path(self.name), timeout=timeout, check=check, env={**os.environ, **self.env})

    def serve(self):
        self.process = self.stage.start(self.name, self.stage.volrep, "serve", "demo", "--config", self.stage.path(self.name), env=self.env)
        wait(f"{self.name} to serve", self.answers)

    def answers(self):
        if self.process.poll() is not None:
            raise Trouble(f"{self.name} ended with {self.process.returncode}")
        state = self.status()["state"]
        return state not in ("Stopped", "Recovering")

    def status(self):
        return json.loads(self.volrep("status", "demo", "--json", timeout=20))

    def kill(self):
        """As the kernel would: no goodbye."""
        self.process.kill()
        self.process.wait(20)
        self.stage.processes.remove(self.process)


class Watch(threading.Thread):
    """Looks at both nodes again and again."""

    def __init__(self, primary, shadow, period):
        super().__init__(daemon=True)
        self.primary, self.shadow, self.period = primary, shadow, period
        self.over = threading.Event()
        self.samples, self.trouble = [], None
        self.fresh = threading.Condition()

    def run(self):
        try:
            while not self.over.is_set():
                at = time.monotonic()
                p, s = self.primary.status(), self.shadow.status()
                with self.fresh:
                    self.samples.append((at, p, s))
                    self.fresh.notify_all()
                self.over.wait(max(0.0, at + self.period - time.monotonic()))
        except Exception as e:
            self.trouble = e

    def stop(self):
        self.over.set()
        self.join(60)
        if self.trouble:
            raise self.trouble
        return self.samples


class Database:
    """PostgreSQL, its data on a mounted volume and nowhere else."""

    def __init__(self, stage, binaries, user):
        self.stage, self.binaries, self.user = stage, binaries, user
        self.sockets = stage.path("socket")
        os.makedirs(self.sockets)
        shutil.chown(self.sockets, user)
        self.dsn = f"host={self.sockets} user={user} dbname=postgres"
        self.process = None

    def run(self, program, *arguments, **options):
        return self.stage.run(os.path.join(self.binaries, program), *arguments, user=self.user, **options)

    def sql(self, text):
        return self.run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", self.dsn, "-c", text)

    def create(self, mount):
        data = os.path.join(mount, "pg")
        os.makedirs(data)
        shutil.chown(data, self.user)
        self.run("initdb", "-k", "-D", data, "-A", "trust", "--no-instructions", "-E", "UTF8", "--locale", "C")
        with open(os.path.join(data, "postgresql.auto.conf"), "a") as f:
            f.write(f"listen_addresses = ''\nunix_socket_directories = '{self.sockets}'\nfsync = on\nsynchronous_commit = on\nfull_page_writes = on\n")
            # Nobody else makes this durable, and the daemon will be killed.
            f.flush()
            os.fsync(f.fileno())

    def start(self, mount):
        """Starts it: the seconds until it answers, and whether it had to recover."""
        begin = time.monotonic()
        log = self.stage.path("postgres.log")
        before = os.path.getsize(log) if os.path.exists(log) else 0
        self.process = self.stage.start("postgres", os.path.join(self.binaries, "postgres"), "-D", os.path.join(mount, "pg"), user=self.user)

        def answers():
            if self.process.poll() is not None:
                raise Trouble(f"PostgreSQL ended with {self.process.returncode}")
            return subprocess.run([os.path.join(self.binaries, "pg_isready"), "-q", "-h", self.sockets, "-U", self.user]).returncode == 0

        wait("PostgreSQL to answer", answers, 60)
        took = time.monotonic() - begin
        with open(log, errors="replace") as f:
            f.seek(before)
            return took, "automatic recovery in progress" in f.read()

    def stop(self, how=signal.SIGINT):
        """SIGINT: a clean stop. SIGQUIT: now, to recover at the next start."""
        self.process.send_signal(how)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired as e:
            raise Trouble("PostgreSQL did not stop within 30 s") from e
        self.stage.processes.remove(self.process)
