"""The guest's image: a kernel, a first file system for it, and a Debian userland, made from packages.

What is here is the same for every run, so it is kept: `image()` answers at once, without a network,
when this recipe was carried out before. The key is the recipe (the lists below and the steps that
use them); the versions that it found on that day are in the folder's `versions` file. Packages come
from the machine's own Debian sources, through an apt with folders of its own: neither the system's
package lists nor its installed packages are touched, and nothing of a guest is installed.

A folder appears under its name only when it is complete, and only one process makes it.
"""
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile

KERNEL = r"^linux-image-6\.12\.[0-9.+~a-z]*-cloud-amd64(-unsigned)?$"
# The later suites are where Debian 12 has a kernel with ublk.
SUITES = "bookworm bookworm-updates bookworm-backports"
SECURITY = "bookworm-security"
USERLAND = [
    "bash", "coreutils", "sed", "grep", "gawk", "findutils", "diffutils", "tar", "jq", "procps", "psmisc",
    "util-linux", "mount", "kmod", "udev", "iproute2", "iputils-ping", "hostname", "debianutils", "busybox-static",
    "e2fsprogs", "xfsprogs", "fio", "fuse3", "dmsetup", "nbd-client", "libnbd-bin", "nbdkit", "qemu-utils",
    "strace", "python3-minimal", "python3", "socat",
    "postgresql-15", "postgresql-contrib", "drbd-utils",
]
# What the first file system needs to reach the second one; the rest is loaded on demand from there.
FIRST_MODULES = ["virtio_blk", "overlay"]
STEPS = "4"  # raise it when the steps below change what comes out


class Trouble(Exception):
    """What went wrong and what to do about it."""


def cache():
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "volrep", "vm")


def image(extra=(), say=lambda text: None):
    """The folder with `vmlinuz`, `initrd`, `root.ext4` and `versions`, made if it is not there."""
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "init"), "rb") as file:
        init = file.read()
    packages = sorted(set(USERLAND) | set(extra))
    recipe = "\n".join([STEPS, KERNEL, SUITES, SECURITY, *packages, *FIRST_MODULES]).encode() + init
    folder = os.path.join(cache(), hashlib.sha256(recipe).hexdigest()[:16])
    if os.path.isdir(folder):
        return folder
    os.makedirs(cache(), exist_ok=True)
    with open(os.path.join(cache(), "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.isdir(folder):  # another process made it meanwhile
            return folder
        work = tempfile.mkdtemp(prefix="making.", dir=cache())
        try:
            make(work, packages, init, say)
            out = os.path.join(work, "out")
            os.rename(out, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def make(work, packages, init, say):
    for tool, package in [("apt-get", "apt"), ("dpkg-deb", "dpkg"), ("mkfs.ext4", "e2fsprogs"),
                          ("busybox", "busybox-static"), ("cpio", "cpio"), ("depmod", "kmod"), ("xz", "xz-utils")]:
        if not shutil.which(tool, path=search_path()):
            raise Trouble(f"{tool} is missing here: apt-get install {package}")
    out, root = os.path.join(work, "out"), os.path.join(work, "root")
    os.makedirs(out)
    apt = Apt(work)
    say("reading Debian's package lists")
    apt.update()
    kernel = apt.newest(KERNEL)
    say(f"downloading {kernel} and a userland of {len(packages)} packages and what they need")
    debs = apt.download([kernel], alone=True) + apt.download(packages)
    say(f"unpacking {len(debs)} packages")
    usrmerge(root)
    for deb in debs:
        # Packages bring /lib as a folder; here it is a link, which has to stay.
        run(["sh", "-c", 'dpkg-deb --fsys-tarfile "$1" | tar -x --keep-directory-symlink -C "$2"', "-", deb, root])
    with open(os.path.join(out, "versions"), "w") as file:
        file.writelines(sorted(os.path.basename(deb) + "\n" for deb in debs))
    version = next(name[len("vmlinuz-"):] for name in os.listdir(os.path.join(root, "boot")) if name.startswith("vmlinuz-"))
    shutil.move(os.path.join(root, "boot", "vmlinuz-" + version), os.path.join(out, "vmlinuz"))
    modules = os.path.join(root, "usr/lib/modules", version)
    say("unpacking the kernel's modules")
    compressed = find(modules, ".ko.xz")
    for start in range(0, len(compressed), 200):
        run(["xz", "--decompress", *compressed[start:start + 200]])
    run(["depmod", "--basedir", root, version])
    first_file_system(work, out, init, modules)
    settle(root)
    say("making the file system")
    size = int(run(["du", "--summarize", "--block-size=1M", "--apparent-size", root]).split()[0])
    target = os.path.join(out, "root.ext4")
    run(["mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", "-d", root, target, f"{size + size // 4 + 64}M"])


def search_path():
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin"


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "PATH": search_path(), "LC_ALL": "C.UTF-8"}, **options)
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise Trouble(f"{' '.join(command[:3])} … failed (status {done.returncode}):\n{tail}")
    return done.stdout


def find(top, ending):
    return [os.path.join(where, name) for where, _, names in os.walk(top) for name in names if name.endswith(ending)]


class Apt:
    """apt-get with folders of its own, and the machine's Debian sources with the later suites added."""

    def __init__(self, work):
        self.work = work
        for folder in ["lists/partial", "cache/archives/partial", "parts"]:
            os.makedirs(os.path.join(work, folder))
        self.sources()
        self.options = []
        for key, value in {
            "Dir::Etc::sourcelist": "/dev/null", "Dir::Etc::sourceparts": f"{work}/parts",
            "Dir::State::lists": f"{work}/lists", "Dir::Cache": f"{work}/cache",
            "Dir::State::status": "/dev/null", "Dir::State::extended_states": f"{work}/extended",
            "APT::Sandbox::User": "root", "APT::Install-Recommends": "false", "Acquire::Languages": "none",
            "Debug::NoLocking": "true", "Acquire::Retries": "3",
            # Hooks of the machine's own (docker-clean deletes what was downloaded) don't belong here.
            "APT::Update::Post-Invoke": "", "DPkg::Post-Invoke": "", "Binary::apt-get::APT::Keep-Downloaded-Packages": "true",
        }.items():
            self.options += ["-o", f"{key}={value}"]

    def sources(self):
        """Each of the machine's entries for Debian itself, with its suites replaced."""
        found = False
        folder = "/etc/apt/sources.list.d"
        names = [os.path.join(folder, name) for name in sorted(os.listdir(folder))] if os.path.isdir(folder) else []
        for path in [p for p in names if p.endswith(".sources")]:
            with open(path) as file:
                text = "".join(line for line in file if not line.startswith("#"))
            stanzas = []
            for stanza in re.split(r"\n\s*\n", text):
                suites = re.search(r"^Suites:(.*)$", stanza, re.M)
                if not suites or not any(word.startswith("bookworm") for word in suites[1].split()):
                    continue
                wanted = SECURITY if "security" in suites[1] else SUITES
                stanzas.append(re.sub(r"^Suites:.*$", "Suites: " + wanted, stanza, flags=re.M))
            found |= self.write(os.path.basename(path), "\n\n".join(stanzas))
        for path in ["/etc/apt/sources.list"] + [p for p in names if p.endswith(".list")]:
            lines = []
            for line in open(path).read().splitlines() if os.path.exists(path) else []:
                entry = re.match(r"^(deb\s+(?:\[[^]]*\]\s+)?\S+)\s+(bookworm\S*)\s+(.*)$", line)
                for suite in (SECURITY if "security" in entry[2] else SUITES).split() if entry else []:
                    lines.append(f"{entry[1]} {suite} {entry[3]}")
            found |= self.write(os.path.basename(path), "\n".join(dict.fromkeys(lines)))
        if not found:
            raise Trouble("no Debian 12 source among /etc/apt/sources.list*: the guest is made from its packages, "
                          "so it can be built only on Debian 12 (copy the cache of one that is: " + cache() + ")")

    def write(self, name, text):
        if text.strip():
            with open(os.path.join(self.work, "parts", name), "w") as file:
                file.write(text.strip() + "\n")
        return bool(text.strip())

    def call(self, tool, *words, **options):
        try:
            return run([tool, *self.options, *words], **options)
        except Trouble as why:
            raise Trouble(f"{why}\nThe guest is made from Debian's packages: can this machine reach them "
                          "(apt-get update)? Once it is made, no network is needed.") from None

    def update(self):
        self.call("apt-get", "update", "-qq", "--error-on=any")

    def newest(self, pattern):
        names = self.call("apt-cache", "pkgnames", "linux-image-").split()
        names = [name for name in names if re.match(pattern, name)]
        if not names:
            raise Trouble("Debian's lists have no 6.12 cloud kernel for amd64: is a bookworm-security or "
                          "bookworm-backports suite behind this machine's sources?")
        return max(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])

    def download(self, packages, alone=False):
        """The paths of the packages, with all that they depend on unless `alone`."""
        archives = os.path.join(self.work, "cache/archives")
        if alone:
            before = set(os.listdir(archives))
            self.call("apt-get", "-q", "download", *packages, cwd=archives)
            return [os.path.join(archives, name) for name in sorted(set(os.listdir(archives)) - before)]
        self.call("apt-get", "-qq", "install", "--yes", "--download-only", *packages)
        return [path for path in find(archives, ".deb") if "linux-image" not in path]


def usrmerge(root):
    """The links that Debian has at its top; packages bring both spellings of a path."""
    for name in ["bin", "sbin", "lib", "lib64"]:
        os.makedirs(os.path.join(root, "usr", name))
        os.symlink("usr/" + name, os.path.join(root, name))


def settle(root):
    """What the packages' own install scripts would have done, as far as a guest needs it."""
    etc = os.path.join(root, "etc")
    for name in ["proc", "sys", "dev", "run", "tmp", "root", "mnt", "out", "var/lib/postgresql"]:
        os.makedirs(os.path.join(root, name), exist_ok=True)
    os.chmod(os.path.join(root, "tmp"), 0o1777)
    files = {
        "passwd": "root:x:0:0:root:/root:/bin/bash\npostgres:x:101:101::/var/lib/postgresql:/bin/bash\n"
                  "nobody:x:65534:65534::/:/usr/sbin/nologin\n",
        "group": "root:x:0:\ndisk:x:6:\ntty:x:5:\npostgres:x:101:\nnogroup:x:65534:\n",
        "hosts": "127.0.0.1 localhost\n10.77.0.1 guest1\n10.77.0.2 guest2\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
        "fstab": "", "hostname": "guest\n", "machine-id": "0123456789abcdef0123456789abcdef\n",
    }
    for name, text in files.items():
        with open(os.path.join(etc, name), "w") as file:
            file.write(text)
    os.chown(os.path.join(root, "var/lib/postgresql"), 101, 101)
    if not os.path.lexists(os.path.join(root, "usr/bin/sh")):
        os.symlink("dash" if os.path.exists(os.path.join(root, "usr/bin/dash")) else "bash", os.path.join(root, "usr/bin/sh"))
    if not os.path.lexists(os.path.join(root, "usr/bin/awk")):
        os.symlink("gawk", os.path.join(root, "usr/bin/awk"))
    for where in ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "boot"]:
        shutil.rmtree(os.path.join(root, where), ignore_errors=True)


def first_file_system(work, out, init, modules):
    """busybox, the two modules in their order, and `init`."""
    first = os.path.join(work, "first")
    for name in ["bin", "modules", "proc", "sys", "dev", "lower", "upper", "new"]:
        os.makedirs(os.path.join(first, name))
    shutil.copy(shutil.which("busybox", path=search_path()), os.path.join(first, "bin/busybox"))
    os.symlink("busybox", os.path.join(first, "bin/sh"))
    with open(os.path.join(first, "init"), "wb") as file:
        file.write(init)
    os.chmod(os.path.join(first, "init"), 0o755)
    needs = {}
    with open(os.path.join(modules, "modules.dep")) as file:
        for line in file:
            name, _, rest = line.strip().partition(":")
            needs[os.path.basename(name).removesuffix(".ko").replace("-", "_")] = [name, *rest.split()]
    order = []
    for module in FIRST_MODULES:
        for path in reversed(needs[module]):
            if path not in order:
                order.append(path)
    for number, path in enumerate(order):
        shutil.copy(os.path.join(modules, path), os.path.join(first, "modules", f"{number:02}.ko"))
    run(["sh", "-c", f"find . | cpio --quiet -o -H newc > '{out}/initrd'"], cwd=first)
