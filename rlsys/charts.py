"""Charts as inline SVG: no library, no script, no network. Colours are CSS variables of the page, so that light and dark both work.

Every chart has a title and a description for screen readers, and every mark a <title> that browsers show as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WAITING = "waiting:"
Point = tuple[float, float]
HALF, WIDE, HEIGHT = 540, 1110, 220
"""Pixels of half a page and of a whole one, so that letters are alike everywhere."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 12, 34


@dataclass(frozen=True, slots=True)
class Series:
    """One curve. `dots` marks single measurements, drawn without a line when `line` is False."""

    label: str
    points: Sequence[Point]
    colour: str = "var(--c1)"
    line: bool = True
    dots: bool = False


def number(value: float) -> str:
    """Short: 12,345, 3.21, 0.0012."""
    if not math.isfinite(value):
        return "-"
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values that span [low, high]; the first is at most `low`, the last at least `high`."""
    if not high > low:
        high = low + 1.0
    raw = (high - low) / max(1, count - 1)
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if m * step >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def line_chart(
    title: str, series: Sequence[Series], *, x_label: str = "iteration", y_at_most: float | None = None, width: int = HALF
) -> str:
    """Curves over a common axis. Points that are not finite break a line."""
    known = [(x, y) for s in series for x, y in s.points if math.isfinite(y)]
    if not known:
        return empty(title, "nothing recorded yet")
    xs, ys = [x for x, _ in known], [y for _, y in known]
    y_ticks = ticks(min(0.0, *ys), max(ys) if y_at_most is None else max(y_at_most, *ys))
    x_low, x_high = min(xs), max(*xs, min(xs) + 1)
    plot_w, plot_h = width - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> Point:
        return (
            _LEFT + (x - x_low) / (x_high - x_low) * plot_w,
            _TOP + (1 - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])) * plot_h,
        )

    parts = [_grid(y_ticks, [t for t in ticks(x_low, x_high, 8) if x_low <= t <= x_high], place, x_label, width)]
    for one in series:
        if one.line:
            parts += [
                f'<path class="curve" d="{_path([place(*p) for p in run])}" stroke="{one.colour}"/>'
                for run in _runs(one.points)
                if len(run) > 1
            ]
        radius = 4 if one.dots else 2.5 if len(one.points) <= 80 else 1.5
        hidden = "" if one.dots or len(one.points) == 1 else ' class="point"'
        for x, y in one.points:
            if math.isfinite(y):
                cx, cy = place(x, y)
                tip = f"{one.label}: {number(y)} at {x_label} {number(x)}"
                parts.append(
                    f'<circle{hidden} cx="{cx:.1f}" cy="{cy:.1f}" r="{radius}" fill="{one.colour}"><title>{escape(tip)}</title></circle>'
                )
    last = ", ".join(f"{s.label} ends at {number(s.points[-1][1])}" for s in series if s.points)
    return _figure(title, _svg(title, last, width, HEIGHT, "".join(parts)), legend([(s.label, s.colour) for s in series]))


def histogram(
    title: str, bars: Sequence[tuple[str, float]], *, unit: str = "", share: bool = True, colour: str = "var(--c1)", width: int = HALF
) -> str:
    """Vertical bars with labels below; `share` writes each bar's share above it."""
    total = sum(value for _, value in bars)
    if not total:
        return empty(title, "nothing recorded yet")
    plot_w, plot_h = width - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM - 14
    top = ticks(0, max(value for _, value in bars))
    slot = plot_w / len(bars)
    wide = min(90.0, slot * 0.8)
    parts = [_grid(top, [], lambda x, y: (0, _TOP + 14 + (1 - y / top[-1]) * plot_h), "", width, base=_TOP + 14 + plot_h)]
    labels = max(1, math.ceil(len(bars) / 16))
    for i, (label, value) in enumerate(bars):
        x, height = _LEFT + slot * i + (slot - wide) / 2, value / top[-1] * plot_h
        y = _TOP + 14 + plot_h - height
        tip = f"{label}: {number(value)} {unit} ({value / total:.1%})"
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{height:.1f}" fill="{colour}" rx="2">'
            f"<title>{escape(tip)}</title></rect>"
        )
        if i % labels == 0:
            parts.append(f'<text x="{x + wide / 2:.1f}" y="{_TOP + 30 + plot_h:.1f}" text-anchor="middle">{escape(label)}</text>')
        if share and len(bars) <= 12:
            parts.append(f'<text class="strong" x="{x + wide / 2:.1f}" y="{y - 4:.1f}" text-anchor="middle">{value / total:.0%}</text>')
    words = ", ".join(f"{label}: {value / total:.0%}" for label, value in bars[:12])
    return _figure(title, _svg(title, words, width, HEIGHT, "".join(parts)), f'<p class="unit">{escape(unit)}</p>' if unit else "")


def shares(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, float, str]]]], unit: str = "s", width: int = WIDE) -> str:
    """Horizontal bars of equal length, one a row, divided into (label, value, colour); a legend below."""
    if not rows:
        return empty(title, "nothing recorded yet")
    left, height = 110, 30
    plot_w = width - left - _RIGHT
    parts, colours = [], dict[str, str]()
    for i, (name, pieces) in enumerate(rows):
        y, x = 6 + i * height, float(left)
        total = sum(value for _, value, _ in pieces) or 1.0
        parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        for label, value, colour in pieces:
            part = value / total * plot_w
            colours.setdefault(label, colour)
            tip = f"{name}, {label}: {number(value)} {unit} ({value / total:.1%})"
            parts.append(
                f'<rect class="band" x="{x:.2f}" y="{y}" width="{part:.2f}" height="22" fill="{colour}"><title>{escape(tip)}</title></rect>'
            )
            if part > 44:
                kind = "off" if any(light in colour for light in ("--i", "--bg", "--c7")) else "on"
                parts.append(f'<text class="{kind}" x="{x + part / 2:.1f}" y="{y + 15}" text-anchor="middle">{value / total:.0%}</text>')
            x += part
    words = "; ".join(f"{name}: {', '.join(f'{lb} {number(v)} {unit}' for lb, v, _ in pieces[:4])}" for name, pieces in rows)
    return _figure(title, _svg(title, words, width, 12 + len(rows) * height, "".join(parts)), legend(list(colours.items())))


def bands(title: str, tracks: Mapping[str, Sequence[tuple[str, float, float]]], colours: Mapping[str, str], seconds: float) -> str:
    """A strip per track over the time of the run: (activity, from, to) in seconds. Marks are never thinner than can be seen."""
    if not tracks or seconds <= 0:
        return empty(title, "nothing recorded yet")
    left, height = 110, 26
    plot_w = WIDE - left - _RIGHT
    bottom = 8 + len(tracks) * height
    parts = []
    for tick in [t for t in ticks(0, seconds, 8) if t <= seconds]:
        x = left + tick / seconds * plot_w
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{number(tick)} s</text>')
    for i, (name, rows) in enumerate(tracks.items()):
        y = 6 + i * height
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        for activity, begin, end in rows:
            x, width = left + begin / seconds * plot_w, (end - begin) / seconds * plot_w
            tip = f"{name}: {activity}, {number(begin)} s to {number(end)} s"
            parts.append(
                f'<rect class="band" x="{x:.2f}" y="{y}" width="{max(width, 0.4):.2f}" height="19" fill="{colours.get(activity, "var(--idle)")}">'
                f"<title>{escape(tip)}</title></rect>"
            )
    used = {activity for rows in tracks.values() for activity, _, _ in rows}
    words = f"{len(tracks)} processes over {number(seconds)} seconds"
    return _figure(title, _svg(title, words, WIDE, bottom + 24, "".join(parts)), legend([(a, c) for a, c in colours.items() if a in used]))


def thin(rows: Sequence[tuple[str, float, float]], seconds: float, bins: int = 560) -> list[tuple[str, float, float]]:
    """At most `bins` rows: each stretch of the time axis shows the activity that filled most of it."""
    width = seconds / bins
    filled: list[dict[str, float]] = [{} for _ in range(bins)]
    for name, begin, end in rows:
        for i in range(max(0, int(begin / width)), min(bins, int(end / width) + 1)):
            covered = min(end, (i + 1) * width) - max(begin, i * width)
            if covered > 0:
                filled[i][name] = filled[i].get(name, 0.0) + covered
    merged: list[tuple[str, float, float]] = []
    for i, seconds_by_name in enumerate(filled):
        if not seconds_by_name:
            continue
        name = max(seconds_by_name, key=lambda n: seconds_by_name[n])
        if merged and merged[-1][0] == name and abs(merged[-1][2] - i * width) < 1e-9:
            merged[-1] = (name, merged[-1][1], (i + 1) * width)
        else:
            merged.append((name, i * width, (i + 1) * width))
    return merged


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Colour and name of each; nothing for a single one."""
    if len(entries) < 2:
        return ""
    items = "".join(
        f'<li><i style="background:{colour}"></i>{escape(label.replace(WAITING, "waits for "))}</li>' for label, colour in entries
    )
    return f'<ul class="legend">{items}</ul>'


def empty(title: str, why: str) -> str:
    """A chart that has nothing to show yet."""
    return _figure(title, f'<p class="empty">{escape(why)}</p>', "")


def _figure(title: str, body: str, after: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{body}{after}</figure>"


def _svg(title: str, description: str, width: int, height: float, body: str) -> str:
    label = escape(f"{title}: {description}", quote=True)
    return f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{label}"><desc>{escape(description)}</desc>{body}</svg>'


def _grid(
    y_ticks: Sequence[float],
    x_ticks: Sequence[float],
    place: Callable[[float, float], Point],
    x_label: str,
    width: int,
    base: float | None = None,
) -> str:
    bottom = HEIGHT - _BOTTOM if base is None else base
    parts = []
    for tick in y_ticks:
        y = place(0.0, tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        x = place(tick, y_ticks[0])[0]
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{number(tick)}</text>')
    if x_label:
        parts.append(f'<text x="{width - _RIGHT}" y="{bottom + 30:.1f}" text-anchor="end">{escape(x_label)}</text>')
    return "".join(parts)


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _runs(points: Sequence[Point]) -> list[list[Point]]:
    """Stretches of finite points."""
    runs: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return runs
