"""What the benchmarks need of the machine, and what is told of it beside the figures."""
import hashlib, os, platform, re, shutil, subprocess, sys

PACKAGES = ["fio", "nbdkit", "libnbd-bin", "qemu-utils", "rsync", "zstd", "b3sum", "iperf3", "iproute2", "util-linux", "procps",
            "postgresql", "postgresql-contrib"]


def said(*command):
    """A command's output, or nothing."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def install(packages):
    """Installs what is missing, as root. What can't be had is told: the parts that need it say so again."""
    have = lambda name: "ok installed" in said("dpkg-query", "-W", "-f", "${Status}", name)
    missing = [name for name in dict.fromkeys(packages) if not have(name)]
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        print(f"not root on Debian, so not installed: {' '.join(missing)}", file=sys.stderr)
        return
    print(f"installing {' '.join(missing)}", flush=True)
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive", LC_ALL="C.UTF-8")
    get = lambda *names: subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *names], env=env,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode == 0
    subprocess.run(["apt-get", "update", "-qq"], env=env, stdin=subprocess.DEVNULL)
    if "postgresql" in missing and get("postgresql-common"):
        # No cluster of the system's own: it would be a server that nobody asked for.
        path = "/etc/postgresql-common/createcluster.conf"
        with open(path) as f:
            text = f.read()
        with open(path, "w") as f:
            f.write(re.sub(r"(?m)^#?create_main_cluster.*", "create_main_cluster = false", text))
    if not get(*missing):
        for name in missing:  # one that can't be had must not take the others with it
            if not get(name):
                print(f"not to be had: {name}", file=sys.stderr)


def build(root, kind="bin", name="volrep"):
    """A release binary of this tree."""
    path = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(root, "target")), "release", "" if kind == "bin" else "examples", name)
    if not os.path.exists(path):
        print(f"building the release binary of {name}", flush=True)
        subprocess.run(["cargo", "build", "--release", f"--{kind}", name], cwd=root, check=True)
    return path


def first(pattern, text, default=""):
    found = re.search(pattern, text)
    return found.group(1).strip() if found else default


def read(path):
    try:
        with open(path) as f:
            return f.read().strip()
    except OSError:
        return ""


def disk(path):
    """File system and device below a directory."""
    source, kind, options = (said("findmnt", "-n", "-o", "SOURCE,FSTYPE,OPTIONS", "-T", path).split(None, 2) + ["", "", ""])[:3]
    name = os.path.basename(os.path.realpath(source)) if source.startswith("/dev/") else ""
    queue = f"/sys/block/{re.sub(r'p?[0-9]+$', '', name) if not os.path.exists(f'/sys/block/{name}') else name}/queue"
    return {"filesystem": kind, "options": options, "device": name, "size": said("lsblk", "-dno", "SIZE,MODEL", source) if name else "",
            "scheduler": first(r"\[(.+?)\]", read(f"{queue}/scheduler")), "write_cache": read(f"{queue}/write_cache")}


def describe(args, root):
    """Processor, kernel, disks, versions: what a reader needs to judge the figures."""
    cpu = read("/proc/cpuinfo")
    with open(args.volrep, "rb") as f:
        digest = hashlib.sha256(f.read()).hexdigest()[:16]
    revision = said("git", "-C", root, "rev-parse", "--short=12", "HEAD") + (" and changes" if said("git", "-C", root, "status", "--porcelain", "-uno") else "")
    return {
        "cpu": first(r"model name\s*:\s*(.+)", cpu, platform.machine()), "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        "hypervisor": first(r"(hypervisor)", cpu), "kernel": platform.release(), "system": first(r'PRETTY_NAME="(.+?)"', read("/etc/os-release")),
        "disk": disk(args.base), "shadow_disk": disk(args.shadow_base), "load_before": os.getloadavg(), "revision": revision,
        "versions": {"volrep": f"{said(args.volrep, '--version')} (sha256 {digest}…)", "fio": said("fio", "--version"),
                     "nbdkit": said("nbdkit", "--version"), "qemu-nbd": first(r"(qemu-nbd \S+)", said("qemu-nbd", "--version")),
                     "rsync": first(r"version (\S+)", said("rsync", "--version")), "zstd": first(r"v([\d.]+)", said("zstd", "--version")),
                     "PostgreSQL": first(r"(\d+\.\d+)", said("/usr/lib/postgresql/15/bin/postgres", "--version"))}}
