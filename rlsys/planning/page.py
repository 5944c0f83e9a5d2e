"""A plan as one HTML page that needs no network: the figures, the comparison, and what each device would do, as inline SVG."""

from __future__ import annotations

from html import escape

from rlsys.planning.plan import Plan, Prediction
from rlsys.planning.simulate import Interval

COLOURS = {
    "sampling": "#3b7dd8",
    "update": "#d8973b",
    "train": "#3a9b5c",
    "publish": "#d8973b",
    "waiting:samples": "#e6b8b7",
    "waiting:rewards": "#c9a6d8",
}
WIDTH, ROW, LEFT = 1000, 18, 110
ROWS = 32
"""Generators that are drawn; of more, the first."""
_STYLE = """body{font:14px/1.5 system-ui,sans-serif;max-width:1160px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.2em .9em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}
svg{background:#f4f4f4}text{font:11px system-ui,sans-serif;fill:#444}.key{display:inline-block;width:1em;height:1em;margin:0 .3em 0 1em}"""


def timeline(prediction: Prediction) -> str:
    """The steady part of a run, at most three iterations, one row per device; what is blank is idle."""
    out = prediction.outcome
    start, end = out.window()
    end = min(end, start + 3 * out.s_per_iteration)
    names = [("learner", out.learner), *((f"generator {i}", rows) for i, rows in enumerate(out.generators[:ROWS]))]
    height = ROW * len(names) + 24

    def x(time: float) -> float:
        return LEFT + (time - start) / (end - start) * WIDTH

    def bars(rows: list[Interval], y: int) -> str:
        drawn = []
        for a, b, name in rows:
            a, b = max(a, start), min(b, end)
            if b > a:
                title = f"<title>{escape(name)} {b - a:.4g} s</title>"
                place = f'x="{x(a):.1f}" y="{y + 2}" width="{max(0.3, x(b) - x(a)):.1f}" height="{ROW - 4}"'
                drawn.append(f'<rect {place} fill="{COLOURS[name]}">{title}</rect>')
        return "".join(drawn)

    parts = [f'<text x="4" y="{i * ROW + 13}">{escape(name)}</text>{bars(rows, i * ROW)}' for i, (name, rows) in enumerate(names)]
    for version in out.published:
        if start <= version <= end:
            parts.append(
                f'<line x1="{x(version):.1f}" x2="{x(version):.1f}" y1="0" y2="{height - 22}" stroke="#222" stroke-dasharray="2 3"/>'
            )
    for i in range(6):
        at = start + (end - start) * i / 5
        parts.append(f'<text x="{x(at):.1f}" y="{height - 6}" text-anchor="middle">{at - start:.4g} s</text>')
    return f'<svg viewBox="0 0 {LEFT + WIDTH + 30} {height}" width="100%" role="img">{"".join(parts)}</svg>'


def shares(shares: dict[str, float]) -> str:
    """Shares of time in words."""
    return escape(", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda item: -item[1])))


def page(plan: Plan, title: str, facts: list[str]) -> str:
    """The whole page."""
    best = plan.best
    rows = "".join(
        f"<tr><td>{escape(p.schedule.name)}</td><td>{p.split}</td><td>{p.s_per_iteration:.4g}</td><td>{p.limit.seconds:.4g}</td><td>{p.limit.bound}</td>"
        f"<td>{plan.fluid_s / p.s_per_iteration:.0%}</td><td>{plan.colocated.s_per_iteration / p.s_per_iteration:.2f}x</td></tr>"
        for p in (best, *(p for p in plan.candidates if p is not best), *plan.others)
    )
    keys = "".join(f'<span class="key" style="background:{colour}"></span>{name}' for name, colour in COLOURS.items())
    left_out = f"<p>{len(best.outcome.generators) - ROWS} more generators are not drawn.</p>" if len(best.outcome.generators) > ROWS else ""
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>
<h1>{escape(title)}</h1>
<p><b>{best.split.generators:g} generators and {best.split.trainers:g} learner devices</b>: {best.s_per_iteration:.4g} s per iteration under
{escape(best.schedule.name)}, staleness at most {best.outcome.staleness_max}.</p>
<p>Learner: {shares(best.outcome.learner_shares())}.<br>Generators: {shares(best.outcome.generator_shares())}.</p>
<p>{keys}, blank: idle; dashed: a version is published</p>{timeline(best)}{left_out}
<h2>Compared</h2><table><tr><th>schedule</th><th>generators+learners</th><th>s per iteration</th><th>its limit</th><th>set by</th>
<th>of the fluid limit ({plan.fluid_s:.4g} s)</th><th>against colocated ({plan.colocated.s_per_iteration:.4g} s)</th></tr>{rows}</table>
<h2>Needs</h2><ul>{"".join(f"<li>{escape(fact)}</li>" for fact in facts)}</ul></html>
"""
