"""The client outside of the guests, what it was told, and what volrep has said meanwhile.

Owns: the log of commits, a file in which each acknowledged one is fsynced. Invariant: a number is sent only after the one before it
was acknowledged, so what a database holds of a writer is right only if it is 1 to k.
"""
import os
import threading
import time

import psycopg2

from guests import Failed, until

WRITERS = 3
COMMIT = """insert into commits values (%(w)s, %(n)s, repeat('x', %(len)s));
update noise set v = %(n)s, filler = repeat('z', %(len)s %% 300) where n between %(k)s and %(k)s + 3"""
TABLES = "select coalesce(string_agg(c.relname || ': ' || v.msg, '; '), '') from pg_class c, lateral verify_heapam(c.oid) v where c.relkind in ('r', 't') and c.relpersistence = 'p'"
INDEXES = "select count(bt_index_check(c.oid, true)::text) from pg_class c join pg_am a on a.oid = c.relam where a.amname = 'btree' and c.relkind = 'i'"


def connect(port, limit=20):
    """None while the database does not take connections."""
    try:
        connection = psycopg2.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres", connect_timeout=limit)
    except psycopg2.OperationalError:
        return None
    connection.autocommit = True
    return connection


def connected(port, alive=lambda: True):
    def there():
        return connect(port) or not alive() or None
    connection = until("the database takes connections", there)
    if connection is True:
        raise Failed("the database has ended")
    return connection


class Client:
    """Writers, each with a connection and numbers of its own."""

    def __init__(self, path):
        self.log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.path, self.threads, self.ending = path, [], threading.Event()
        self.acked = {}  # writer -> the last number
        self.why = {}  # writer -> what ended it

    def start(self, cycle, port, last):
        """They go on after `last`."""
        self.ending.clear()
        self.acked, self.why = dict(last), {}
        self.threads = [threading.Thread(target=self.write, args=(cycle, port, w, last.get(w, 0)), daemon=True) for w in range(WRITERS)]
        for thread in self.threads:
            thread.start()

    def note(self, *words, durable=False):
        os.write(self.log, (" ".join(map(str, words)) + "\n").encode())
        if durable:
            os.fsync(self.log)

    def write(self, cycle, port, w, n):
        try:
            connection = connected(port)
            cursor = connection.cursor()
            while not self.ending.is_set():
                n += 1
                self.note("sent", cycle, w, n, f"{time.monotonic():.6f}")
                cursor.execute(COMMIT, {"w": w, "n": n, "len": 50 + n * 37 % 900, "k": 1 + (n * 7919 + w * 600) % 1990})
                self.note("acknowledged", cycle, w, n, f"{time.monotonic():.6f}", durable=True)
                self.acked[w] = n
            connection.close()
        except (psycopg2.Error, Failed) as why:
            # The database went away: what the log says stands.
            self.why[w] = str(why).strip()

    def total(self):
        return sum(self.acked.values())

    def goes_on(self, more=6):
        """It commits, all writers do."""
        before = dict(self.acked)

        def all_of_them():
            if self.why:
                raise Failed(f"a writer has ended: {self.why}")
            return all(self.acked.get(w, 0) >= before.get(w, 0) + more // WRITERS for w in range(WRITERS))
        until("the client commits", all_of_them, pause=0.05)

    def stop(self):
        self.ending.set()
        for thread in self.threads:
            thread.join(timeout=240)
            if thread.is_alive():
                raise Failed("a statement has no end")
        self.threads = []

    def account(self, cycle):
        """Of one cycle, as the file says: (writer, number) -> time, of those sent and of those acknowledged."""
        found = {"sent": {}, "acknowledged": {}}
        with open(self.path) as file:
            for line in file:
                kind, of, w, n, at = line.split()
                if int(of) == cycle:
                    found[kind][int(w), int(n)] = float(at)
        return found["sent"], found["acknowledged"]


class Observer:
    """What volrep says of the shadow, and what had been acknowledged before it said so.

    A commit that was acknowledged before the primary told its durable LSN is in the records up to there. So once
    either node says that as much is durable or applied on the shadow, that commit is.
    """

    def __init__(self, client):
        self.client, self.lock = client, threading.Lock()
        self.ending, self.thread, self.trouble, self.count = threading.Event(), None, None, 0
        self.again()

    def again(self):
        """The primary begins a new run: what was told of its last one is no longer a promise."""
        with self.lock:
            self.marks, self.reported = [], 0

    def start(self, primary, shadow):
        self.again()
        self.ending.clear()
        self.thread = threading.Thread(target=self.watch, args=(primary, shadow), daemon=True)
        self.thread.start()

    def watch(self, primary, shadow):
        try:
            while not self.ending.is_set():
                self.look(primary, shadow)
                self.ending.wait(0.4)
        except Failed as why:
            self.trouble = why

    def look(self, primary, shadow):
        marks = self.marks  # a new run has new ones
        before = dict(self.client.acked)
        p, s = primary.state(), shadow.state()
        told = []
        if p and p["role"] == "primary" and p["state"] != "Stopped":
            told += [peer[key] for peer in p["peers"] for key in ("durable_lsn", "applied_lsn")]
        if s and s["role"] == "shadow":
            told += [s["durable_lsn"], s["applied_lsn"]]
        with self.lock:
            if marks is not self.marks:
                return
            self.count += 1
            if p and p["role"] == "primary" and p["state"] != "Stopped":
                self.marks.append((p["durable_lsn"], before))
            self.reported = max([self.reported, *told])

    def stop(self):
        self.ending.set()
        if self.thread:
            self.thread.join(timeout=240)
            self.thread = None
        if self.trouble:
            raise self.trouble

    def promised(self):
        """writer -> the last number that volrep has said to be on the shadow."""
        floor = {}
        with self.lock:
            for lsn, acked in self.marks:
                if lsn <= self.reported:
                    for w, n in acked.items():
                        floor[w] = max(floor.get(w, 0), n)
        return floor


def check(port, sent, acked, before, promised, whole, deep):
    """What the database holds is right: (writer -> last number, acknowledged and lost).

    `before`: what each writer had at the start of the cycle, which both nodes hold. `promised`: the least of each. `whole`: nothing that
    was acknowledged may be missing. `deep`: look at every page and every index, too.
    """
    connection = connected(port)
    cursor = connection.cursor()
    cursor.execute("select writer, count(*), min(n), max(n) from commits group by writer")
    last = {}
    for w, count, low, high in cursor.fetchall():
        if (low, high) != (1, count):
            raise Failed(f"writer {w}: {count} commits from {low} to {high}: not a prefix")
        last[w] = high
    for w in range(WRITERS):
        k, least = last.get(w, 0), max(before.get(w, 0), promised.get(w, 0))
        if k > before.get(w, 0) and (w, k) not in sent:
            raise Failed(f"writer {w}: commit {k} was never sent")
        if k < least:
            raise Failed(f"writer {w}: ends at {k}, and {least} was said to be on the shadow (at the start of the cycle it had {before.get(w, 0)})")
    lost = {key: at for key, at in acked.items() if key[1] > last.get(key[0], 0)}
    if whole and lost:
        raise Failed(f"acknowledged and lost: {sorted(lost)[:12]}, {len(lost)} in all")
    for w, k in last.items():
        if lost and sent.get((w, k), 0.0) > min(lost.values()):
            raise Failed(f"not a prefix: commit {k} of writer {w} is there, and was sent after {min(lost, key=lost.get)} was acknowledged, which is not")
    if deep:
        cursor.execute(TABLES)
        wrong = cursor.fetchone()[0]
        if wrong:
            raise Failed(f"verify_heapam: {wrong}")
        cursor.execute(INDEXES)
        if cursor.fetchone()[0] < 50:
            raise Failed("hardly any index was looked at")
    connection.close()
    return last, len(lost)
