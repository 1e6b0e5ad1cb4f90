"""How late a shadow's image is, seen from outside: numbered blocks written and flushed through NBD, and looked for in its file.

A client writes a number into a sector that nothing else uses and sends a FLUSH; from the FLUSH's answer on it looks at that sector in
the shadow's backing, mapped into memory (a file on tmpfs, so what was written there is seen at once), until the number is there.
"""
import ctypes, mmap, random, socket, struct, threading, time

OPTION, REQUEST, WRITE, FLUSH = 0x49484156454F5054, 0x25609513, 1, 3


class Client:
    """As much of NBD as this takes: fixed newstyle, one request at a time, simple replies."""

    def __init__(self, path, export):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)
        assert self.take(16) == b"NBDMAGICIHAVEOPT"
        self.take(2)
        self.socket.sendall(struct.pack(">I", 3) + struct.pack(">QII", OPTION, 1, len(export)) + export.encode())
        self.size, _ = struct.unpack(">QH", self.take(10))

    def take(self, n):
        got = b""
        while len(got) < n:
            more = self.socket.recv(n - len(got))
            if not more:
                raise ConnectionError("the NBD server has closed the connection")
            got += more
        return got

    def request(self, kind, offset=0, data=b""):
        self.socket.sendall(struct.pack(">IHHQQI", REQUEST, 0, kind, 0, offset, len(data)) + data)
        _, error, _ = struct.unpack(">IIQ", self.take(16))
        if error:
            raise OSError(error, f"NBD request {kind}")


class Probe(threading.Thread):
    """Probes about `rate` times a second; `seen` are (seconds from the submission of the write, seconds from the FLUSH's
    answer) until the number was in the image of the shadow. The volume's last sector is used."""

    def __init__(self, uri, backing, rate=100):
        super().__init__(daemon=True)
        export, path = uri.removeprefix("nbd+unix:///").split("?socket=")
        self.client, self.rate, self.seen, self.over, self.trouble = Client(path, export), rate, [], threading.Event(), None
        self.file = open(backing, "rb")
        self.at = self.client.size - 512
        page = self.at & ~(mmap.PAGESIZE - 1)
        self.map, self.at_map = mmap.mmap(self.file.fileno(), mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ, offset=page), self.at - page

    def run(self):
        # PR_SET_TIMERSLACK: sleeps of a few microseconds are no longer than that.
        ctypes.CDLL(None).prctl(29, 1000, 0, 0, 0)
        try:
            number = random.getrandbits(48) << 16
            while not self.over.is_set():
                number += 1
                self.one(struct.pack(">Q", number))
                # At irregular times, so that nothing periodic hides.
                self.over.wait(random.expovariate(self.rate))
        except Exception as trouble:
            self.trouble = trouble

    def one(self, mark):
        begun = time.perf_counter()
        self.client.request(WRITE, self.at, mark * 64)
        self.client.request(FLUSH)
        flushed = time.perf_counter()
        while self.map[self.at_map:self.at_map + 8] != mark:
            if time.perf_counter() - flushed > 60:
                raise TimeoutError("a flushed write is not in the shadow's image after 60 s")
            time.sleep(10e-6)
        now = time.perf_counter()
        self.seen.append((now - begun, now - flushed))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()
        self.map.close(), self.file.close(), self.client.socket.close()
        if self.trouble and not _[0]:
            raise self.trouble
