"""One self-contained HTML page from a result's JSON alone: aims, then every group with its table, plots and commands."""
import html, json, os

import plots

STYLE = """
:root{color-scheme:light dark;--ink:#1c2330;--soft:#5b6675;--rule:#d9dee5;--ground:#fff;--card:#f6f8fa;--good:#19713f;--bad:#b02a26}
@media(prefers-color-scheme:dark){:root{--ink:#e2e7ee;--soft:#9aa6b5;--rule:#323b48;--ground:#12171e;--card:#1a212b;--good:#55c488;--bad:#ff8a80}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--ground);max-width:1080px;margin:0 auto;padding:24px 16px 80px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:21px;margin:44px 0 6px;border-top:1px solid var(--rule);padding-top:22px}h3{font-size:17px;margin:28px 0 6px}
p.about{color:var(--soft);max-width:85ch}table{border-collapse:collapse;width:100%;margin:8px 0;font-size:14px}
th,td{padding:4px 10px;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top}th{color:var(--soft);font-weight:600}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}.reached{color:var(--good);font-weight:600}.missed{color:var(--bad);font-weight:600}
.note{color:var(--soft);font-size:13px}.wide{overflow-x:auto}figure{margin:14px 0;background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px}
figcaption{font-weight:600}.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;color:var(--soft);margin:4px 0}.legend i{display:inline-block;width:11px;height:11px;
margin-right:6px;border-radius:2px}svg{width:100%;height:auto;display:block}svg text{font-size:11.5px;fill:var(--soft)}svg .grid{stroke:var(--rule);stroke-width:1}
details{margin:8px 0}summary{cursor:pointer;color:var(--soft)}pre{background:var(--card);border:1px solid var(--rule);border-radius:6px;padding:10px;overflow-x:auto;font-size:12.5px}
nav a{margin-right:14px;color:inherit}
"""


def esc(what):
    return html.escape(str(what))


def number(value):
    """Three digits that count, and thousands apart."""
    if value is None or isinstance(value, str):
        return value or "-"
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 or value == 0 else f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 else f"{value:.3g}"


def verdict(figure):
    if figure["reached"] is None:
        return "-"
    return '<span class="reached">reached</span>' if figure["reached"] else '<span class="missed">missed</span>'


def aim(figure):
    sign = {">=": "≥", "<=": "≤"}
    return f"{sign[figure['aim']['is']]} {figure['aim']['bound']:g}{'×' if figure['against'] else ' ' + figure['unit']}" if figure["aim"] else ""


def measured(figure):
    """What an aim is of: the ratio, or the value where there is none."""
    return f"{number(figure['ratio'])}×" if figure["against"] else f"{number(figure['value'])} {figure['unit']}"


def table(head, rows):
    """`head`: titles, those with a leading > are numbers."""
    cells = lambda tag, row: "".join(f"<{tag}{' class=n' if h.startswith('>') else ''}>{c}</{tag}>" for h, c in zip(head, row))
    return ('<div class="wide"><table><tr>' + cells("th", [esc(h.lstrip(">")) for h in head]) + "</tr>"
            + "".join(f"<tr>{cells('td', row)}</tr>" for row in rows) + "</table></div>")


def summary(figures):
    aims = [f for f in figures if f["aim"]]
    if not aims:
        return "<p>No figure of this run has an aim.</p>"
    rows = [[f'<a href="#{anchor(f["part"], f["group"])}">{esc(f["group"])}</a>: {esc(f["name"])}', aim(f), measured(f),
             esc(f["against"]["label"]) if f["against"] else "", verdict(f)] for f in aims]
    judged = [f for f in aims if f["reached"] is not None]
    return (f"<p>{sum(f['reached'] for f in judged)} of {len(judged)} aims reached"
            + (f", {len(aims) - len(judged)} not measured" if len(judged) < len(aims) else "") + ".</p>"
            + table(["figure", ">aim", ">measured", "against", ""], rows))


def anchor(part, group):
    return "".join(c if c.isalnum() else "-" for c in f"{part}-{group}".lower())


def group(document, part, name):
    figures = [f for f in document["figures"] if (f["part"], f["group"]) == (part, name)]
    out = [f'<h3 id="{anchor(part, name)}">{esc(name)}</h3>']
    rows = []
    for f in figures:
        note = f'<div class="note">{esc(f["note"])}</div>' if f["note"] else ""
        against = f'{esc(f["against"]["label"])} ({number(f["against"]["value"])})' if f["against"] else ""
        rows.append([esc(f["name"]) + note, number(f["value"]), esc(f["unit"]), f"{number(f['ratio'])}×" if f["ratio"] is not None else "",
                     against, aim(f), verdict(f) if f["aim"] else ""])
    if rows:
        out.append(table(["figure", ">value", "unit", ">ratio", "to (its value)", ">aim", ""], rows))
    out += [plots.svg(p) for p in document["plots"] if (p["part"], p["group"]) == (part, name)]
    commands = list(dict.fromkeys(f["command"] for f in figures if f["command"]))
    if commands:
        out.append("<details><summary>commands</summary><pre>" + "\n".join(map(esc, commands)) + "</pre></details>")
    return "".join(out)


def section(document, part):
    names = [x["group"] for x in document["figures"] + document["plots"] if x["part"] == part["name"]]
    out = [f'<h2 id="{esc(part["name"])}">{esc(part["title"])}</h2>']
    out += [f'<p class="about">{esc(text)}</p>' for text in part["about"].split("\n\n")]
    if part["failed"]:
        out.append(f'<p class="missed">This part did not end: {esc(part["failed"])}</p>')
    out += [f'<p class="note">skipped: {esc(why)}</p>' for why in part.get("skipped", [])]
    return "".join(out) + "".join(group(document, part["name"], name) for name in dict.fromkeys(names))


def flat(value):
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ')} {flat(v)}" for k, v in value.items() if v)
    if isinstance(value, (list, tuple)):
        return ", ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in value)
    return str(value)


def the_machine(document):
    names = {"cpu": "processor", "cpus": "processors", "memory_gib": "memory, GiB", "load_before": "load before", "load_after": "load after",
             "shadow_disk": "shadow's disk", "revision": "git revision"}
    versions = document["machine"].get("versions", {})
    rows = [[esc(names.get(k, k)), esc(flat(v))] for k, v in document["machine"].items() if k != "versions" and v]
    rows += [[esc(k), esc(v)] for k, v in versions.items() if v]
    rows.append(["run", esc(flat({k: v for k, v in document["args"].items() if v}))])
    return '<h2 id="machine">The machine and the method</h2>' + table(["", ""], rows) + METHOD


METHOD = """<p class="about">Everything of one run was measured on one machine, one thing after the other, so that its ratios hold and its absolute figures hold for this
machine alone. Where a row has rounds, every subject has its turn in each round and the median is told. Peers and volrep share the processors with the programs that
load them; the shadow runs on the same machine, too: every figure of volrep has the work of both nodes in it. "Missed" is a result like another: an aim is
stated before it is measured. fio's own results are in the file .raw.json.gz beside this page.</p>"""


def render(path):
    """Writes the page of the result at `path` beside it; its path."""
    with open(path) as f:
        document = json.load(f)
    links = [(p["name"], p["title"]) for p in document["parts"]] + [("machine", "Machine and method")]
    body = [f"<h1>volrep, measured</h1><p class=note>{esc(document['begun'])}, {document.get('seconds', 0):,.0f} s</p>",
            "<nav>" + "".join(f'<a href="#{esc(n)}">{esc(t)}</a>' for n, t in links) + "</nav>", "<h2>Aims</h2>", summary(document["figures"])]
    body += [section(document, part) for part in document["parts"]] + [the_machine(document)]
    out = os.path.splitext(path)[0] + ".html"
    with open(out, "w") as f:
        f.write(f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
                f"<title>volrep, measured {esc(document['begun'][:10])}</title><style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n")
    return out
