"""The configurations beside postgresql.crm, and what the agent does only with other settings: a lab of its own for each.

    unshare --mount --pid --net --fork --kill-child --mount-proc recipes.py VOLREP SCRATCH ROUNDS WHICH [SCENARIO...]

WHICH is a key of LABS. The configurations are run as they stand; replaced is what a user has to replace, and no more.
"""

import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

sys.dont_write_bytecode = True

import cluster
from cluster import HERE, TOOLS, Lab
from outside import NODES, VIP, say, until


# As database.crm describes it, with that script behind it.
UNIT = """
[Service]
Type=forking
ExecStart=/etc/init.d/iris start
ExecStop=/etc/init.d/iris stop
TimeoutSec=300
"""


class Script(Lab):
    """database.crm: an LSB script, and xfs."""

    RECIPE, SIZE, MKFS, PLACE = "database.crm", "300M", "mkfs.xfs", "/epic"

    def __init__(self, *args):
        super().__init__(*args)
        for node in self.nodes.values():
            node.put(os.path.join(HERE, "database"), os.path.join(node.dir, "upper"), "etc/init.d/iris")

    def recipe(self):
        return replaced(super().recipe(), {"ip=192.0.2.100 ": f"ip={VIP} "})


class Systemd(Script):
    """The same by a unit. Its nodes have systemd as pid 1."""

    def __init__(self, *args):
        super().__init__(*args)
        with open("/proc/self/mounts") as file:
            unified = next(line.split()[1] for line in file if line.split()[2] == "cgroup2")
        for node in self.nodes.values():
            node.cgroup = os.path.join(unified, f"volrep-{self.volume}-{node.name}")
            node.write("etc/systemd/system/iris.service", UNIT)

    def recipe(self):
        return replaced(super().recipe(), {"epic-db lsb:iris ": "epic-db systemd:iris "})

    def close(self):
        """What the kernel keeps of the nodes; their processes may be going still."""
        for node in self.nodes.values():
            for place, _, _ in os.walk(node.cgroup, topdown=False):
                until(f"{place} is empty", lambda: gone(place))


def gone(cgroup):
    try:
        os.rmdir(cgroup)
    except OSError:
        return False
    return True


def replaced(text, words):
    for word, by in words.items():
        assert word in text, f"{word} is not in the recipe"
        text = text.replace(word, by)
    return text


class Pcs(Lab):
    """postgresql.pcs, and that it says the same as postgresql.crm."""

    def configure(self, node):
        for n in NODES:
            node.run("pcs", "stonith", "create", f"fence-{n}", "fence_lab", f"port={n}", f"pcmk_host_list={n}", "op", "monitor", "interval=60s", "timeout=20s")
        with open(os.path.join(TOOLS, "postgresql.pcs")) as file:
            say(node.run("sh", self.give("postgresql.pcs", file.read())).strip() or "pcs says nothing")
        ours = node.run("cibadmin", "--query")
        node.run("sh", "-c", "cibadmin --empty >/run/fence/other.xml")
        node.run("env", "CIB_file=/run/fence/other.xml", "crm", "-F", "configure", "load", "replace", self.crm())
        with open(os.path.join(self.top, "fence", "other.xml")) as file:
            theirs = file.read()
        differences = compare(meaning(theirs), meaning(ours))
        assert not differences, "crm and pcs differ:\n" + "\n".join(differences)
        say(f"pcs and crm make the same of it: {len(meaning(ours))} facts")


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)(ms|s|m|min)?", text).groups()
    return int(number) * {"ms": 0.001, "m": 60, "min": 60}.get(unit, 1)


def meaning(xml):
    """What a CIB's configuration says, without ids and order, defaults filled in: {fact: value}."""
    root, facts = ElementTree.fromstring(xml), {}

    def pairs(of, where, kind):
        for pair in of.findall(f"./{kind}/nvpair"):
            facts[f"{where} {kind} {pair.get('name')}"] = pair.get("value")

    resources = root.find("./configuration/resources")
    for item in resources.iter():
        name = item.get("id")
        if item.tag == "primitive":
            facts[f"{name}"] = f"{item.get('class')}:{item.get('provider')}:{item.get('type')}"
            pairs(item, name, "instance_attributes")
            for action in ("start", "stop"):
                facts[f"{name} {action} 0 None timeout"] = 20
            promotable = root.find(f".//clone/primitive[@id='{name}']") is not None
            for op in item.findall("./operations/op"):
                # pcs writes down what the agent can do, asked for or not.
                if op.get("name") not in ("start", "stop", "monitor") and not promotable:
                    continue
                what = f"{name} {op.get('name')} {seconds(op.get('interval', '0')):g} {op.get('role')}"
                facts[f"{what} timeout"] = seconds(op.get("timeout", "20s"))
                for key in set(op.keys()) - {"id", "name", "interval", "role", "timeout"}:
                    facts[f"{what} {key}"] = op.get(key)
        if item.tag in ("group", "clone"):
            facts[f"{name}"] = f"{item.tag} of " + " ".join(child.get("id") for child in item if child.tag in ("primitive", "group"))
        if item.tag in ("primitive", "group", "clone"):
            pairs(item, name, "meta_attributes")
    for rule in root.find("./configuration/constraints"):
        said = {k: v for k, v in rule.items() if k != "id"}
        usual = {"rsc-role": "Started", "with-rsc-role": "Started"} if rule.tag == "rsc_colocation" else {"symmetrical": "true"}
        facts[f"{rule.tag} {sorted({**usual, **said}.items())}"] = True
    for kind, where in (("cluster_property_set", "crm_config"), ("meta_attributes", "rsc_defaults"), ("meta_attributes", "op_defaults")):
        for pair in root.findall(f"./configuration/{where}/{kind}/nvpair"):
            # The others are the cluster's own.
            if where != "crm_config" or pair.get("name") in ("stonith-enabled", "no-quorum-policy"):
                facts[f"{where} {pair.get('name')}"] = pair.get("value")
    return facts


def compare(crm, pcs):
    """Where they differ."""
    return [f"{fact}: crm {crm.get(fact)}, pcs {pcs.get(fact)}" for fact in sorted(crm.keys() | pcs.keys()) if crm.get(fact) != pcs.get(fact)]


class Rpo(Lab):
    """Nobody is in a sync set. The daemons have addresses of their own, which can be lost alone."""

    SYNC, RPO = False, 6
    LINK = {"a": "10.77.1.1", "b": "10.77.1.2"}

    def __init__(self, *args):
        super().__init__(*args)
        for name, node in self.nodes.items():
            node.addresses.append(f"{self.LINK[name]}/24")

    def set_up(self):
        super().set_up()
        # As its administrator does, so that it finds the other when that one has its place.
        told = f'\n[[peer]]\nname = "b"\naddress = "{self.LINK["b"]}:7654"\n'
        self.nodes["a"].run("sh", "-c", "cat >>/etc/volrep/epic.toml", input=told)

    def whole(self):
        """The shadow holds what the primary has; it is in no sync set."""
        shadow = self.nodes[self.other(self.writer())]
        until("the pair is whole again", lambda: shadow.status().get("state") == "UpToDate" and shadow.status()["role"] == "shadow")


def score(lab, of):
    """The promotion score of a node, as the cluster knows it."""
    asked = next(node for node in lab.nodes.values() if node.proc)
    done = subprocess.run(asked.inside("crm_attribute", "--lifetime", "reboot", "--node", of, "--name", "master-epic-volrep", "--query", "--quiet"),
                          capture_output=True, text=True)
    return done.stdout.strip() or None


def never(what, condition, limit):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        assert not condition(), what
        time.sleep(0.2)


def lagging(lab):
    """A shadow outside of the sync set: promoted only as far as `rpo` says, and no more than that is lost."""
    name = lab.writer()
    node, other = lab.nodes[name], lab.nodes[lab.other(name)]
    lab.whole()
    never("a score without rpo", lambda: score(lab, other.name), 12)
    before, begun = len(lab.client.acked), time.monotonic()
    node.run("crm_resource", "--resource", "epic-volrep", "--set-parameter", "rpo", "--parameter-value", str(lab.RPO))
    until("a score with rpo", lambda: score(lab, other.name) == "100")
    assert lab.check("rpo, a score", begun, before)[0] == name

    # Cut off from the primary alone, the other has more and more lag, and loses its score; the primary is lost: nothing moves.
    other.run("ip", "addr", "del", f"{lab.LINK[other.name]}/24", "dev", "eth0")
    until("no score beyond rpo", lambda: score(lab, other.name) is None, 30)
    say(f"rpo: cut off, no score after {time.monotonic() - begun:.1f} s")
    before, begun = len(lab.client.acked), time.monotonic()
    fenced = len(lab.fencer.done)
    node.kill()
    until(f"{name} is fenced", lambda: name in lab.fencer.done[fenced:])
    never("promoted beyond rpo", other.writes, 15)
    lab.back(name)
    assert lab.check("rpo, too late", begun, before)[0] == name
    other.run("ip", "addr", "add", f"{lab.LINK[other.name]}/24", "dev", "eth0")
    until("the score is back", lambda: score(lab, other.name) == "100")

    before, begun = list(lab.client.acked), time.monotonic()
    say(f"rpo: {name}")
    node.kill()
    until("the other is promoted", other.writes)
    until("the client commits again", lambda: lab.client.times[-1] > begun + 1)
    acked, times, found = list(lab.client.acked), list(lab.client.times), lab.client.rows()
    lost = [i for i, n in enumerate(acked) if n not in found]
    newest = [i for i, t in enumerate(times) if t <= begun + 0.1][-len(lost):] if lost else []
    oldest = begun - times[lost[0]] if lost else 0.0
    say(f"rpo: on {other.name}, outage {lab.client.outage(begun):.2f} s, the newest {len(lost)} of {len(before)} commits lost, back to {oldest:.3f} s before")
    assert lost == newest and oldest <= lab.RPO, f"rpo: lost {lost[:20]}, newest {newest[:20]}"
    outage = lab.client.outage(begun)
    for i in reversed(lost):  # what is checked from here on was acknowledged by what goes on
        del lab.client.acked[i], lab.client.times[i]
    lab.back(name)
    lab.whole()
    node = lab.nodes[lab.writer()]
    node.run("crm_resource", "--resource", "epic-volrep", "--set-parameter", "rpo", "--parameter-value", "0")
    until("no score without rpo", lambda: score(lab, name) is None)
    until("the client commits", lambda: lab.client.times[-1] > time.monotonic() - 1)
    return outage


def refused(lab):
    """The cluster can't be asked whether the old primary is down, so a promotion is refused. It is tried again, by the same daemon."""
    name = lab.writer()
    node, other = lab.nodes[name], lab.nodes[lab.other(name)]
    node.run("crm_attribute", "--type", "rsc_defaults", "--name", "failure-timeout", "--update", "15s")
    lock = os.path.join(lab.top, other.name, "disk", "epic", "lock")

    def daemon():
        with open(lock) as file:
            return file.read().strip()
    before, begun, pid = len(lab.client.acked), time.monotonic(), daemon()
    say(f"refused: {name}")
    other.run("mount", "--bind", "/bin/false", "/usr/sbin/cibadmin")
    node.kill()
    tells = other.inside("crm_mon", "--as-xml")
    until("the promotion is refused", lambda: 'op_key="epic-volrep_promote_0"' in subprocess.run(tells, capture_output=True, text=True).stdout)
    assert not other.writes() and other.status()["role"] == "shadow" and other.status()["standing"] == "member", other.status()
    other.run("umount", "/usr/sbin/cibadmin")
    refused_at = time.monotonic() - begun

    def promoted():
        assert daemon() == pid, f"the daemon was restarted: {pid}, {daemon()}"
        return other.writes()
    until("it is promoted after all", promoted)
    say(f"refused: after {refused_at:.1f} s, promoted after {time.monotonic() - begun:.1f} s")
    who, outage = lab.check("refused", begun, before)
    assert who == other.name
    lab.back(name)
    lab.whole()
    other.run("crm_attribute", "--type", "rsc_defaults", "--name", "failure-timeout", "--update", "60s")
    return outage


cluster.SPECIAL.update(rpo=lagging, refused=refused)


LABS = {
    "lsb": (Script, ["node", "move", "daemon"]),
    "systemd": (Systemd, ["node", "move", "daemon"]),
    "pcs": (Pcs, ["node", "move", "refused"]),
    "rpo": (Rpo, ["rpo"]),
}


if __name__ == "__main__":
    make, scenarios = LABS[sys.argv[4]]
    cluster.main(make, sys.argv[5:] or scenarios)
