"""Plots as inline SVG, from what Bench.plot kept: bars, lines and cumulative distributions. Needs nothing but Python."""
import html, math

WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 14, 62
COLOURS = ["#1f6fb4", "#e07b1a", "#2c9f58", "#b8423f", "#7d5fb2", "#7a5a42", "#c75a9c", "#6b7280", "#9c9a1e", "#1ca3b8"]


def label(value):
    """A tick's number, short."""
    if value == 0:
        return "0"
    size = abs(value)
    for bound, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= bound:
            return f"{value / (1e3 if suffix == 'k' else bound):g}{suffix}"
    return f"{value:g}" if size >= 1e-3 else f"{value:.0e}"


def steps(low, high, count=6):
    """Round numbers from low to high."""
    if high <= low:
        high = low + 1
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.floor(low / step)
    return [round(step * i, 12) for i in range(first, first + count + 3) if step * (i - 1) < high]


class Axis:
    """Values to pixels."""

    def __init__(self, values, log, start, end, zero=False):
        values = [v for v in values if v is not None and (not log or v > 0)] or [1]
        self.log, self.start, self.end = log, start, end
        low, high = min(values), max(values)
        if log:
            self.low, self.high = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
            self.high = max(self.high, self.low + 1)
            self.ticks = [10 ** e for e in range(self.low, self.high + 1)]
            if len(self.ticks) <= 3:
                self.ticks = sorted({t * m for t in self.ticks for m in (1, 2, 5) if t * m <= 10 ** self.high})
        else:
            self.ticks = steps(min(low, 0) if zero else low, high)
            self.low, self.high = self.ticks[0], self.ticks[-1]

    def __call__(self, value):
        at = math.log10(max(value, 10 ** self.low)) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)


def text(x, y, what, anchor="middle", more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{html.escape(str(what))}</text>'


def frame(y, plot, width, bottom):
    out = []
    for tick in y.ticks:
        at = y(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(text(LEFT - 6, at + 4, label(tick), "end"))
    middle = (TOP + bottom) / 2
    out.append(text(14, middle, plot["ylabel"], more=f'transform="rotate(-90 14 {middle:.0f})"'))
    return out


def bars(plot, colours):
    """Groups of bars: one group for each x, one bar for each series."""
    names = list(dict.fromkeys(x for points in plot["series"].values() for x, _ in points))
    series = list(plot["series"].items())
    bottom = HEIGHT - BOTTOM
    y = Axis([v for _, points in series for _, v in points], plot["logy"], bottom, TOP, zero=True)
    room = (WIDTH - LEFT - RIGHT) / max(1, len(names))
    wide = min(46, room * 0.84 / max(1, len(series)))
    out = frame(y, plot, WIDTH, bottom)
    base = y(10 ** y.low) if y.log else y(0)
    letters = max(6, int(room / 5.6))
    for i, name in enumerate(names):
        centre = LEFT + room * (i + 0.5)
        for j, (title, points) in enumerate(series):
            value = dict((x, v) for x, v in points).get(name)
            if value is None:
                continue
            at, left = y(value), centre + (j - len(series) / 2) * wide
            out.append(f'<rect x="{left:.1f}" y="{min(at, base):.1f}" width="{wide * 0.92:.1f}" height="{abs(base - at):.1f}" '
                       f'fill="{colours[title]}"><title>{html.escape(f"{title}, {name}: {value:,.4g}")}</title></rect>')
        for k, line in enumerate(wrapped(str(name), letters)[:3]):
            out.append(text(centre, bottom + 16 + 13 * k, line))
    out.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, plot["xlabel"]))
    return out


def wrapped(name, letters):
    lines = [""]
    for word in name.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > letters:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def lines(plot, colours):
    """Lines with marks, or a distribution as steps without."""
    steps_ = plot["kind"] == "cdf"
    all_ = [(x, v) for points in plot["series"].values() for x, v in points if x is not None and v is not None]
    named = any(isinstance(x, str) for x, _ in all_)
    order = list(dict.fromkeys(x for x, _ in all_)) if named else []
    place = (lambda x: order.index(x)) if named else (lambda x: x)
    bottom = HEIGHT - BOTTOM
    x = Axis([place(a) for a, _ in all_], plot["logx"] and not named, LEFT, WIDTH - RIGHT)
    y = Axis([b for _, b in all_], plot["logy"], bottom, TOP, zero=True)
    if steps_:
        y.ticks, y.low, y.high = [0, 0.25, 0.5, 0.75, 0.9, 1], 0, 1
    out = frame(y, plot, WIDTH, bottom)
    for tick in range(len(order)) if named else x.ticks:
        out.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{bottom}"/>')
        out.append(text(x(tick), bottom + 16, order[tick] if named else label(tick)))
    for title, points in plot["series"].items():
        at = [(x(place(a)), y(b)) for a, b in points if a is not None and b is not None]
        if not at:
            continue
        path = f"M{at[0][0]:.1f} {at[0][1]:.1f}" + "".join((f"H{a:.1f}V{b:.1f}" if steps_ else f"L{a:.1f} {b:.1f}") for a, b in at[1:])
        out.append(f'<path d="{path}" fill="none" stroke="{colours[title]}" stroke-width="2"/>')
        if not steps_ and len(at) <= 60:
            out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colours[title]}"><title>{html.escape(f"{title}, {p[0]}: {p[1]:,.4g}")}</title></circle>'
                    for (a, b), p in zip(at, [p for p in points if None not in p])]
    out.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 22, plot["xlabel"]))
    return out


def svg(plot):
    """One plot, with its legend, as a figure element."""
    colours = {title: COLOURS[i % len(COLOURS)] for i, title in enumerate(plot["series"])}
    body = bars(plot, colours) if plot["kind"] == "bar" else lines(plot, colours)
    legend = "".join(f'<span><i style="background:{colours[title]}"></i>{html.escape(title)}</span>' for title in plot["series"])
    legend = f'<div class="legend">{legend}</div>' if len(plot["series"]) > 1 else ""
    return (f'<figure><figcaption>{html.escape(plot["title"])}</figcaption>{legend}'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(plot["title"])}">{"".join(body)}</svg></figure>')
