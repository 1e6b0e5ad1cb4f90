"""What is no node of the cluster: the client on the virtual IP, the remote shadow, and what the scenarios are made of."""

import json
import os
import subprocess
import threading
import time

import psycopg2

VIP = "10.77.0.100"
NODES = {"a": "10.77.0.1", "b": "10.77.0.2"}
OUTSIDE = "10.77.0.3"
HANG = 180.0  # seconds; the deadline of every wait: only there to end one
BEGUN = time.monotonic()


def run(*args, limit=HANG, **more):
    """A command that must succeed; its stdout."""
    done = subprocess.run(args, capture_output=True, text=True, timeout=limit, **more)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(args)}: {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def until(what, condition, limit=HANG):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise RuntimeError(f"in vain for {limit:.0f} s: {what}")


def say(text):
    # The logs of the nodes have the wall clock's time.
    print(f"{time.monotonic() - BEGUN:7.2f} {time.strftime('%T', time.gmtime())} {text}", flush=True)


class Client(threading.Thread):
    """Commits one row after the other at the virtual IP; keeps the acknowledged ones and when."""

    def __init__(self):
        super().__init__(daemon=True)
        self.pause = 0.005  # seconds between commits
        self.acked, self.times, self.next = [], [], 0

    def connect(self):
        c = psycopg2.connect(host=VIP, user="postgres", dbname="postgres", connect_timeout=2, options="-c statement_timeout=4000",
                             tcp_user_timeout=1500, keepalives_idle=1, keepalives_interval=1, keepalives_count=2)
        c.autocommit = True
        return c

    def run(self):
        connection = None
        while True:
            try:
                if connection is None:
                    connection = self.connect()
                    cursor = connection.cursor()
                self.next += 1
                cursor.execute("insert into log values (%s)", (self.next,))
                self.acked.append(self.next)
                self.times.append(time.monotonic())
            except psycopg2.Error:
                if connection is not None:
                    connection.close()
                connection = None
                time.sleep(0.05)
            time.sleep(self.pause)

    def rows(self):
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute("select n from log")
        found = {n for (n,) in cursor.fetchall()}
        connection.close()
        return found

    def outage(self, since):
        """Longest time without an acknowledgement from just before `since` on."""
        times = list(self.times)
        first = max((i for i, t in enumerate(times) if t <= since), default=0)
        return max((b - a for a, b in zip(times[first:], times[first + 1:])), default=0.0)


class Far:
    """A remote shadow outside of the cluster and of the sync set: it follows whoever is the primary, and is promoted by hand."""

    def __init__(self, volrep, dir):
        self.volrep, self.dir = volrep, dir
        os.makedirs(dir)
        self.proc = self.events = None
        # Its devices are none of the machine's.
        self.env = {**os.environ, "VOLREP_SHM_DIR": dir, "VOLREP_DEV_DIR": os.path.join(dir, "dev")}

    def run(self, *args):
        return run(self.volrep, "--config", os.path.join(self.dir, "etc"), *args, env=self.env)

    def join(self, token, volume):
        self.run("join", token, "--node", "c", "--listen", f"{OUTSIDE}:7654", "--journal-size", "128M", "--cache-size", "16M",
                 "--volume", f"{volume}={self.dir}/data.img")
        with open(os.path.join(self.dir, "etc", "epic.toml"), "a") as out:
            out.write(f'\n[[peer]]\nname = "b"\naddress = "{NODES["b"]}:7654"\n')
        log = open(os.path.join(self.dir, "log"), "ab")
        self.proc = subprocess.Popen([self.volrep, "--config", os.path.join(self.dir, "etc"), "serve", "epic"], stdin=subprocess.DEVNULL,
                                     stdout=log, stderr=log, env=self.env)

    def status(self):
        return json.loads(self.run("status", "epic", "--json"))

    def resyncs(self):
        told = json.loads(self.run("history", "epic", "--json"))["events"]
        return [e for e in told if e["event"] in ("resync", "resync_stopped", "diverged", "rejoining")]

    def follows(self, writer, scenario):
        """Everything that the writer has now arrives, by its journal alone."""
        tail = writer.status()["tail_lsn"]
        until(f"{scenario}: the far shadow follows", lambda: self.status()["applied_lsn"] >= tail)
        events = self.resyncs()
        if self.events is None:
            self.events = events
        assert events == self.events, f"{scenario}: the far shadow was resynced: {events[len(self.events):]}"

    def take_over(self):
        """An administrator promotes it: both nodes are gone, and fenced as far as he knows. The rows that its database has."""
        until("the far shadow misses its primary", lambda: not self.status()["primary"]["connected"])
        self.run("promote", "epic", "--yes", "--i-fenced-the-old-primary")
        # It took over the sync set, too, and FLUSH would wait for those that are gone.
        for member in self.status()["sync_set"]:
            self.run("outdate", "epic", "--member", member, "--i-fenced-the-member", "--yes")
        self.run("attach", "epic", "--device", "fuse")
        place, sockets = os.path.join(self.dir, "pg"), os.path.join(self.dir, "sockets")
        os.mkdir(place)
        run("install", "-d", "-o", "postgres", sockets)
        run("mount", os.path.join(self.dir, "dev", "epic"), place)
        pg_ctl = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "/usr/lib/postgresql/15/bin/pg_ctl",
                  "-D", os.path.join(place, "cluster"), "-w"]
        options = f"-c listen_addresses= -c unix_socket_directories={sockets}"
        run(*pg_ctl, "-l", os.path.join(sockets, "log"), "-o", options, "start", cwd="/")
        connection = psycopg2.connect(host=sockets, user="postgres", dbname="postgres")
        cursor = connection.cursor()
        cursor.execute("select n from log")
        found = {n for (n,) in cursor.fetchall()}
        connection.close()
        run(*pg_ctl, "-m", "fast", "stop", cwd="/")
        run("umount", place)
        self.run("detach", "epic")
        return found
