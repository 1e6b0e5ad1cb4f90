"""What the benchmarks share: processes that end with the run, and a primary with its shadow."""
import atexit, json, os, re, shutil, signal, socket, subprocess, sys, time


def size_of(text):
    """Bytes of `8G`, `64k`, `1M`."""
    n, unit = re.fullmatch(r"(\d+)([kKMGT]?)", text).groups()
    return int(n) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[unit.upper()]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Children:
    """Processes of this run; all are ended with it."""

    def __init__(self):
        self.list = []
        atexit.register(self.stop)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    def start(self, *args, env=None, log=None):
        out = open(log, "wb") if log else subprocess.DEVNULL
        child = subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env)
        self.list.append(child)
        return child

    def end(self, child):
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        self.list.remove(child)

    def stop(self):
        for child in list(self.list):
            self.end(child)


def wait_for(what, condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"{what}: not within {seconds} s")
        time.sleep(0.02)


class Volrep:
    """A primary and its shadow; `durable` puts the shadow into the sync set, which holds its image back by `delay`."""

    def __init__(self, args, children, name, durable=False, delay=None, journal=None):
        self.bin, self.children, self.name = args.volrep, children, name
        self.a, self.b = f"{args.dir}/{name}/a", f"{args.shadow_dir}/{name}/b"
        os.makedirs(self.a), os.makedirs(self.b)
        self.env = dict(os.environ, VOLREP_SHM_DIR=f"/dev/shm/{os.path.basename(args.dir)}", VOLREP_LOG="warn")
        atexit.register(shutil.rmtree, self.env["VOLREP_SHM_DIR"], True)
        port = free_port()
        sync = ["--sync", "db2"] if durable else []
        size = ["--journal-size", journal] if journal else []
        self.run("init", "g", "--config", f"{self.a}/c", "--volume", f"data={self.a}/vol:{args.size}", "--node", "db1",
                 "--listen", f"127.0.0.1:{port}", *sync, *size)
        token = self.run("token", "g", "--config", f"{self.a}/c").strip()
        self.run("join", token, "--config", f"{self.b}/c", "--volume", f"data={self.b}/vol", "--node", "db2",
                 "--listen", f"127.0.0.1:{free_port()}", *size)
        if delay:
            path = f"{self.b}/c/g.toml"
            text = open(path).read()
            open(path, "w").write(text.replace('apply_delay = "0s"', f'apply_delay = "{delay}"'))
        self.serve()
        self.uri = self.run("attach", "g", "--config", f"{self.a}/c", "--device", "nbd-socket").strip()
        wait_for("shadow", lambda: self.status(self.b)["state"] == "UpToDate")

    def serve(self):
        """Starts both daemons."""
        start = lambda side: self.children.start(self.bin, "serve", "g", "--config", f"{side}/c", env=self.env,
                                                 log=f"{side}/log")
        self.daemons = [start(side) for side in (self.a, self.b)]
        wait_for("control socket", lambda: self.status(self.a) and self.status(self.b))

    def end(self):
        """Ends both, cleanly."""
        for daemon in self.daemons:
            self.children.end(daemon)

    def run(self, *args):
        return subprocess.run([self.bin, *args], env=self.env, check=True, stdout=subprocess.PIPE, text=True).stdout

    def status(self, side):
        done = subprocess.run([self.bin, "status", "g", "--json", "--config", f"{side}/c"], env=self.env,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        doc = json.loads(done.stdout) if done.returncode == 0 and done.stdout.strip() else {}
        doc = doc.get("groups", [doc])[0] if doc else {}
        return doc if doc.get("state") not in (None, "Stopped") else {}

    def settle(self):
        """Waits until the shadow has applied everything, so that one row's backlog is not the next one's."""
        wait_for("catch-up", lambda: self.status(self.b)["applied_lsn"] == self.status(self.a)["tail_lsn"], 120)
