"""A primary with any number of shadows, near or far, on any kind of device; and a watch over what its processes hold.

`lab.Volrep` is the pair that most comparisons need. Here each node is an object that can be ended, killed and started again,
the link may lead through the project's delay proxy (tools/linkcut), and everything is gone after `with Group(...)`.
"""
import json, os, re, shutil, signal, subprocess, tempfile, threading, time

import load
from lab import free_port, wait_for

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Node:
    """One node of the group `g`: its directory, and its daemon while there is one."""

    def __init__(self, bench, home, ring):
        self.bench, self.home, self.process, self.starts = bench, home, None, 0
        self.env = dict(os.environ, VOLREP_SHM_DIR=ring, VOLREP_LOG="warn")
        os.makedirs(home)

    def volrep(self, verb, *arguments, check=True):
        command = [self.bench.args.volrep, verb, *arguments, "--config", f"{self.home}/c"]
        done = subprocess.run(command, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stderr.strip()[-600:]}")
        return done.stdout.strip() if done.returncode == 0 else ""

    def status(self):
        """What the daemon says of itself; {} while it says nothing."""
        told = self.volrep("status", "g", "--json", check=False)
        told = json.loads(told) if told else {}
        return told if told.get("state") not in (None, "Stopped") else {}

    def start(self):
        self.starts += 1
        self.process = self.bench.children.start(self.bench.args.volrep, "serve", "g", "--config", f"{self.home}/c", env=self.env,
                                                 log=f"{self.home}/log-{self.starts}")

    def serve(self):
        self.start()
        wait_for("control socket", self.status)

    def said(self):
        """The end of its log."""
        with open(f"{self.home}/log-{self.starts}", errors="replace") as f:
            return f.read()[-400:].strip() or "its log is empty"

    def end(self):
        """Cleanly."""
        self.bench.children.end(self.process)
        self.process = None

    def kill(self):
        """As the kernel would: no goodbye."""
        self.process.kill()
        self.process.wait()
        self.bench.children.list.remove(self.process)
        self.process = None

    def configure(self, pattern, line):
        """Replaces the line of the configuration that matches."""
        path = f"{self.home}/c/g.toml"
        with open(path) as f:
            text, changed = re.subn(rf"(?m)^{pattern}.*$", line, f.read(), count=1)
        if not changed:
            raise RuntimeError(f"{path} has no line {pattern}")
        with open(path, "w") as f:
            f.write(text)

    def attach(self, device):
        return self.volrep("attach", "g", "--device", device)


class Proxy:
    """tools/linkcut before an address."""

    def __init__(self, bench, to, rtt=0):
        # A socket's name must be short.
        self.dir = tempfile.mkdtemp(prefix="volrep-link-")
        self.control, self.tool, self.bench = f"{self.dir}/s", os.path.join(ROOT, "tools/linkcut"), bench
        self.process = bench.children.start(self.tool, "--listen", "127.0.0.1:0", "--to", to, "--control", self.control, "--rtt", str(rtt),
                                            log=f"{self.dir}/out")
        wait_for("the proxy", lambda: self.said().endswith("\n"))
        self.address = self.said().strip()

    def said(self):
        with open(f"{self.dir}/out") as f:
            return f.read()

    def tell(self, *words):
        return subprocess.run([self.tool, "--control", self.control, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True).stdout

    def close(self):
        self.bench.children.end(self.process)
        shutil.rmtree(self.dir, True)


class Group:
    """A primary `db1` and shadows `db2`, `db3`, ...; `sync`: how many of them a FLUSH waits for."""

    def __init__(self, bench, name, size="1G", shadows=1, sync=0, device="nbd-socket", on_disk=False, journal=None, rtt=None, settings=()):
        self.bench, self.name, self.device, self.proxy, self.shadows, self.uri = bench, name, device, None, [], None
        self.places = [f"{bench.args.dir}/{name}", f"{bench.args.dir if on_disk else bench.args.shadow_dir}/{name}-shadows"]
        # Below the directory that the suite takes away after each part, whatever became of it.
        self.ring = f"/dev/shm/{os.path.basename(bench.args.dir)}/{name}"
        os.makedirs(self.ring, mode=0o700)
        self.primary = Node(bench, f"{self.places[0]}/a", self.ring)
        port, more = free_port(), ["--journal-size", journal] if journal else []
        # As on real machines each side knows where the other listens.
        listens = [f"127.0.0.1:{free_port()}" for _ in range(shadows)]
        sync = [w for i in range(sync) for w in ("--sync", f"db{i + 2}={listens[i]}")]
        self.primary.volrep("init", "g", "--volume", f"data={self.places[0]}/a/vol:{size}", "--node", "db1", "--listen", f"127.0.0.1:{port}",
                            *sync, *more)
        for pattern, line in settings:
            self.primary.configure(pattern, line)
        if rtt is not None:
            self.proxy = Proxy(bench, f"127.0.0.1:{port}", rtt)
        for i, address in enumerate(listens):
            self.join(i, address, more)

    def join(self, i, address, more):
        shadow = Node(self.bench, f"{self.places[1]}/b{i}", self.ring)
        token = self.primary.volrep("token", "g", "--peer", f"db{i + 2}")
        through = ["--from", self.proxy.address] if self.proxy else []
        shadow.volrep("join", token, "--volume", f"data={shadow.home}/vol", "--node", f"db{i + 2}", "--listen", address, *through, *more)
        self.shadows.append(shadow)
        path = f"{self.primary.home}/c/g.toml"
        with open(path) as f:
            known = f'name = "db{i + 2}"' in f.read()
        if not known:
            with open(path, "a") as f:
                f.write(f'\n[[peer]]\nname = "db{i + 2}"\naddress = "{address}"\n')

    def __enter__(self):
        try:
            self.primary.serve()
            for shadow in self.shadows:
                shadow.serve()
            if self.device:
                self.uri = self.primary.attach(self.device)
            self.follow()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self.proxy:
            self.proxy.tell("restore")
        for node in [self.primary, *self.shadows]:
            if node.process and node.process.poll() is None:
                node.process.send_signal(signal.SIGCONT)
                if node is self.primary:
                    node.volrep("detach", "g", check=False)
                node.end()
        if self.proxy:
            self.proxy.close()
        for place in [*self.places, self.ring]:
            shutil.rmtree(place, True)

    def follow(self):
        """Waits until every shadow follows."""
        for shadow in self.shadows:
            end = time.monotonic() + 60
            while (told := shadow.status()).get("state") != "UpToDate":
                if time.monotonic() > end:
                    raise RuntimeError(f"a shadow does not follow: {told.get('state')}, {told.get('reason')}; {shadow.said()}; its primary: {self.primary.said()}")
                time.sleep(0.02)

    def settle(self, seconds=240):
        """Waits until the shadows have applied everything, so that one row's backlog is not the next one's."""
        tail = self.primary.status()["tail_lsn"]
        for shadow in self.shadows:
            wait_for("catch-up", lambda: shadow.status().get("applied_lsn", 0) >= tail, seconds)

    def pids(self):
        return [node.process.pid for node in [self.primary, *self.shadows] if node.process]

    def meter(self):
        return load.Meter(self.pids(), self.primary.process.pid)


class Watch(threading.Thread):
    """Looks at something again and again: `samples` are (seconds, what `look` returned)."""

    def __init__(self, look, period=0.1):
        super().__init__(daemon=True)
        self.look, self.period, self.samples, self.over, self.trouble = look, period, [], threading.Event(), None
        self.begun = time.monotonic()

    def run(self):
        try:
            while not self.over.is_set():
                at = time.monotonic() - self.begun
                self.samples.append((at, self.look()))
                self.over.wait(self.period)
        except Exception as trouble:
            self.trouble = trouble

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()
        if self.trouble and not _[0]:
            raise self.trouble


def anonymous(pids):
    """Bytes of anonymous memory of each."""
    return [load.memory(pid)[0] for pid in pids]
