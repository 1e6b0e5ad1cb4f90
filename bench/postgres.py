"""PostgreSQL on ext4 on a device, and pgbench against it: throughput, latency, what the device took."""
import glob, os, pwd, re, shutil, signal, subprocess, tempfile, time

from lab import wait_for

USER = "postgres"
SETTINGS = """
listen_addresses = ''
max_wal_size = 512MB
checkpoint_timeout = 30min
autovacuum_naptime = 10min
"""


def binaries():
    """Where the newest server with pgbench lies; None if there is none."""
    found = [d for d in glob.glob("/usr/lib/postgresql/*/bin") if all(os.path.exists(f"{d}/{p}") for p in ("initdb", "postgres", "pgbench"))]
    return max(found, key=lambda d: int(d.split("/")[-2]), default=None)


def why_not():
    """Why there can be no PostgreSQL on a block device here, or None."""
    if os.geteuid() != 0:
        return "a file system on a block device needs root"
    if not os.path.exists("/dev/loop-control"):
        return "no /dev/loop-control here"
    if not binaries():
        return "no PostgreSQL server below /usr/lib/postgresql"
    try:
        pwd.getpwnam(USER)
    except KeyError:
        return f"no user {USER}"
    return None


def run(*command, **options):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout.strip()


class Loop:
    """A loop device on a sparse file, the file's page cache left out: what a database without replication would have."""

    def __init__(self, path, size):
        run("truncate", "-s", size, path)
        self.device = run("losetup", "--find", "--show", "--direct-io=on", path)

    def close(self):
        run("losetup", "-d", self.device)


class Fuse:
    """The same file on volrep's own way to a device without ublk and NBD (FUSE and a loop device), and nothing else: `bench/passthrough.rs`."""

    def __init__(self, program, path, size):
        run("truncate", "-s", size, path)
        os.makedirs(f"{path}.fuse")
        self.child = subprocess.Popen([program, path, f"{path}.fuse"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.device = self.child.stdout.readline().strip()
        if not self.device:
            raise RuntimeError(f"{program} has made no device: status {self.child.wait()}")

    def close(self):
        self.child.stdin.close()
        self.child.wait(30)


class Cluster:
    """A cluster on a new ext4 on `device`, with pgbench's tables; gone after `with`."""

    def __init__(self, device, scale):
        self.device, self.bin, self.scale, self.process = os.path.realpath(device), binaries(), scale, None
        self.dir = tempfile.mkdtemp(prefix="volrep-pg-")
        os.chmod(self.dir, 0o755)
        self.mount, self.work = f"{self.dir}/m", f"{self.dir}/w"
        os.makedirs(self.mount), os.makedirs(self.work)

    def __enter__(self):
        # Nothing of mkfs's is left for later: a lazy initialisation would write during the first rounds.
        run("mkfs.ext4", "-q", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", self.device)
        run("mount", self.device, self.mount)
        data = f"{self.mount}/pg"
        os.makedirs(data)
        for path in data, self.work:
            shutil.chown(path, USER, USER)
        self.do("initdb", "-k", "-D", data, "-A", "trust", "--no-instructions", "-E", "UTF8", "--locale", "C")
        with open(f"{data}/postgresql.auto.conf", "a") as f:
            f.write(f"{SETTINGS}unix_socket_directories = '{self.work}'\n")
        log = open(f"{self.work}/log", "ab")
        self.process = subprocess.Popen([f"{self.bin}/postgres", "-D", data], stdin=subprocess.DEVNULL, stdout=log, stderr=log, user=USER, group=USER,
                                        extra_groups=[], cwd=self.work)
        wait_for("PostgreSQL", lambda: subprocess.run([f"{self.bin}/pg_isready", "-q", "-h", self.work]).returncode == 0, 60)
        self.do("pgbench", "-i", "-q", "-s", str(self.scale), "-h", self.work, "postgres")
        self.sql("checkpoint")
        return self

    def __exit__(self, *_):
        if self.process:
            self.process.send_signal(signal.SIGINT if not _[0] else signal.SIGQUIT)
            self.process.wait(60)
        if os.path.ismount(self.mount):
            wait_for("umount", lambda: subprocess.run(["umount", self.mount], stderr=subprocess.DEVNULL).returncode == 0)
        shutil.rmtree(self.dir, True)

    def do(self, program, *arguments):
        return run(f"{self.bin}/{program}", *arguments, user=USER, group=USER, extra_groups=[], cwd=self.work)

    def sql(self, text):
        return self.do("psql", "-XAtq", "-h", self.work, "-d", "postgres", "-c", text)

    def taken(self):
        """Bytes that the device has taken in writes, as the kernel counts them."""
        with open(f"/sys/block/{os.path.basename(self.device)}/stat") as f:
            return int(f.read().split()[6]) * 512

    def pgbench(self, clients, seconds):
        """Transactions a second, and each one's latency in milliseconds, sorted."""
        for old in glob.glob(f"{self.work}/t.*"):
            os.unlink(old)
        out = self.do("pgbench", "-n", "-h", self.work, "-c", str(clients), "-j", str(min(clients, os.cpu_count())), "-T", str(max(1, round(seconds))), "-l",
                      "--log-prefix", f"{self.work}/t", "postgres")
        latencies = []
        for log in glob.glob(f"{self.work}/t.*"):
            with open(log) as f:
                latencies += [int(line.split()[2]) / 1000 for line in f]
        return float(re.search(r"tps = ([\d.]+)", out)[1]), sorted(latencies)


def quantile(ordered, q):
    """Of a sorted list."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def curve(ordered, points=200):
    """A sorted list as (value, share of those not above it), for a plot."""
    n = len(ordered)
    steps = sorted({min(n - 1, int((1 - 10 ** (-4 * i / points)) * n)) for i in range(points)} | {n - 1})
    return [(ordered[i], (i + 1) / n) for i in steps]
