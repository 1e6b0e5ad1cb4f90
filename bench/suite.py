"""The benchmark suite: runs the parts below bench/parts, and keeps every figure with what it is measured against.

A part is a module with a docstring (its method, shown on the page), `TITLE` and `def run(bench)`. It may have
`PACKAGES` (Debian packages beside machine.PACKAGES), `LONG = True` (only by name or with --long) and `ORDER` (a number;
parts run in its order, then by name). It has scratch directories of its own, `bench.args.dir` on the disk and
`bench.args.shadow_dir` on tmpfs, which are taken away after it with every process that `bench.children` started.
"""
import contextlib, datetime, gzip, importlib.util, json, os, shutil, signal, statistics, subprocess, sys, tempfile, time, traceback, types

import lab, machine, page

HERE = os.path.dirname(os.path.abspath(__file__))


class Skip(Exception):
    """Raised by a part, or a piece of it (`with bench.piece(...)`), that can't be measured here: says why."""


def parts():
    """The modules of bench/parts, in the order in which they run."""
    found = []
    for name in sorted(os.listdir(os.path.join(HERE, "parts"))):
        if name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"parts_{name[:-3]}", os.path.join(HERE, "parts", name))
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.NAME = name[:-3]
            module.LONG, module.ORDER = getattr(module, "LONG", False), getattr(module, "ORDER", 50)
            module.PACKAGES = getattr(module, "PACKAGES", ())
            found.append(module)
    return sorted(found, key=lambda part: (part.ORDER, part.NAME))


class Bench:
    """What a part is given: arguments, processes that end with it, and where its figures go."""

    lab = lab

    def __init__(self, args, root):
        self.args, self.root, self.children = args, root, lab.Children()
        self.places, self.part, self.raw = {root: "."}, None, {}
        self.began = time.monotonic()
        self.document = {"version": 1, "begun": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                         "args": {}, "machine": {}, "parts": [], "figures": [], "plots": []}

    def plain(self, text):
        """Without the names of this run's directories."""
        for place, name in sorted(self.places.items(), key=lambda item: -len(item[0])):
            text = text.replace(place, name)
        return text

    def say(self, text):
        print(f"  {self.plain(text)}", flush=True)

    @staticmethod
    def median(values):
        return statistics.median(values)

    def figure(self, group, name, value, unit, against=None, aim=None, command=None, note=None):
        """Keeps one figure. `against`: (label, value of the peer or limit in this run); `aim`: (">=" or "<=", bound) of the
        ratio to it, or of the value where there is nothing against. Returns the ratio or None."""
        ratio = value / against[1] if value is not None and against and against[1] else None
        judged, reached = ratio if against else value, None
        if aim and judged is not None:
            reached = judged >= aim[1] if aim[0] == ">=" else judged <= aim[1]
        self.document["figures"].append({
            "part": self.part, "group": group, "name": name, "value": value, "unit": unit,
            "against": {"label": against[0], "value": against[1]} if against else None, "ratio": ratio,
            "aim": {"is": aim[0], "bound": aim[1]} if aim else None, "reached": reached,
            "command": self.plain(command) if command else None, "note": self.plain(note) if note else None})
        told = f"  {group}: {name}: {page.number(value)} {unit}"
        told += f", {page.number(ratio)} x {against[0]}" if ratio is not None else ""
        told += f" (aim {aim[0]} {aim[1]:g}: {'reached' if reached else 'MISSED'})" if reached is not None else ""
        print(told, flush=True)
        return ratio

    def plot(self, group, title, kind, series, xlabel, ylabel, logx=False, logy=False):
        """Keeps one plot: `kind` is "bar" (x are names), "line" or "cdf"; `series` is {label: [(x, y), ...]}."""
        if kind not in ("bar", "line", "cdf"):
            raise ValueError(f"a plot of an unknown kind: {kind}")
        self.document["plots"].append({
            "part": self.part, "group": group, "title": title, "kind": kind, "xlabel": xlabel, "ylabel": ylabel, "logx": logx, "logy": logy,
            "series": {label: [[x, y] for x, y in points] for label, points in series.items()}})

    def keep(self, name, document):
        """Keeps a raw result, such as fio's JSON, in the file beside the page; a name may come more than once."""
        self.raw.setdefault(self.part or "", {}).setdefault(name, []).append(document)

    def pair(self, name, on_disk=False, size="1G", **options):
        """A running primary and shadow (lab.Volrep); `on_disk`: the shadow's files beside the primary's, not on tmpfs."""
        args = types.SimpleNamespace(volrep=self.args.volrep, dir=self.args.dir, size=size,
                                     shadow_dir=os.path.join(self.args.dir, "shadows") if on_disk else self.args.shadow_dir)
        return lab.Volrep(args, self.children, name, **options)

    def script(self, command, limit=3600):
        """Runs one of this directory's programs, which end what they start; an interruption ends them. The exit status."""
        self.say(" ".join(command))
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            return child.wait(limit)
        except BaseException:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait(60)
            raise

    @contextlib.contextmanager
    def piece(self, name):
        """A piece of a part that may be impossible here: its Skip is noted, and the part goes on."""
        try:
            yield
        except Skip as why:
            self.say(f"skipped: {name}: {why}")
            self.document["parts"][-1].setdefault("skipped", []).append(f"{name}: {self.plain(str(why))}")

    @contextlib.contextmanager
    def scratch(self, name):
        """The part's directories; nothing of them is left."""
        made = []
        for key, place in (("dir", self.args.base), ("shadow_dir", self.args.shadow_base)):
            path = tempfile.mkdtemp(prefix=f"volrep-bench-{name}-", dir=place)
            os.chmod(path, 0o755)  # a database runs as another user
            made.append(path)
            self.places[path] = "$DIR" if key == "dir" else "$SHADOW_DIR"
            setattr(self.args, key, path)
        try:
            yield
        except BaseException:
            self.logs(made)
            raise
        finally:
            self.children.stop()
            for path in made + [f"/dev/shm/{os.path.basename(made[0])}"]:
                shutil.rmtree(path, True)

    def logs(self, places):
        """The last lines of what the nodes said, for who wants to know why a part did not end."""
        for place in places:
            for at, _, names in os.walk(place):
                if "log" in names and os.path.getsize(os.path.join(at, "log")):
                    with open(os.path.join(at, "log"), errors="replace") as f:
                        self.say(f"{at}/log:\n" + "".join(f.readlines()[-20:]))

    def one(self, module):
        """Runs a part; a defect in it is told, and is not the end of the others."""
        self.part = module.NAME
        entry = {"name": module.NAME, "title": module.TITLE, "about": module.__doc__.strip(), "failed": None}
        self.document["parts"].append(entry)
        print(f"== {module.TITLE}", flush=True)
        begun = time.monotonic()
        try:
            with self.scratch(module.NAME):
                module.run(self)
        except Skip as why:
            entry.setdefault("skipped", []).append(self.plain(str(why)))
            print(f"  skipped: {why}", flush=True)
        except KeyboardInterrupt:
            entry["failed"] = "interrupted"
            raise
        except (Exception, SystemExit) as why:
            entry["failed"] = self.plain(f"{type(why).__name__}: {why}")
            traceback.print_exc()
        finally:
            entry["seconds"] = time.monotonic() - begun
            self.part = None

    def write(self):
        """Page, JSON and raw results, with what there is; the paths."""
        self.document["seconds"] = time.monotonic() - self.began
        os.makedirs(self.args.out, exist_ok=True)
        path = os.path.join(self.args.out, self.args.stamp)
        with open(f"{path}.json", "w") as f:
            json.dump(self.document, f, separators=(",", ":"))
        with gzip.open(f"{path}.raw.json.gz", "wt", compresslevel=9) as f:
            f.write(self.plain(json.dumps(self.raw)))
        return [page.render(f"{path}.json"), f"{path}.json", f"{path}.raw.json.gz"]


def prepare(args, root, chosen):
    """Defaults, packages, the program."""
    args.seconds = args.seconds or (1 if args.quick else 5)
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.base, args.shadow_base = args.dir or "/var/tmp", args.shadow_dir
    args.stamp = datetime.datetime.now().strftime("bench-%Y-%m-%d-%H%M%S")
    machine.install([*machine.PACKAGES, *(package for part in chosen for package in part.PACKAGES)])
    args.volrep = os.path.abspath(args.volrep or machine.build(root))


def run(args, root):
    """All chosen parts, then the page; the exit status."""
    chosen = [part for part in parts() if part.NAME in args.parts or not args.parts and (not part.LONG or args.long)]
    prepare(args, root, chosen)
    bench = Bench(args, root)
    bench.places[args.volrep] = "volrep"
    bench.document["args"] = {key: getattr(args, key) for key in ("seconds", "rounds", "quick", "long", "rows")}
    bench.document["args"]["parts"] = [part.NAME for part in chosen]
    bench.document["machine"] = machine.describe(args, root)
    for number in signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    status = 0
    try:
        for part in chosen:
            bench.one(part)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    bench.document["machine"]["load_after"] = os.getloadavg()
    for path in bench.write():
        print(os.path.relpath(path))
    return status or int(any(part["failed"] for part in bench.document["parts"]))
