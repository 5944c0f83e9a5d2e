"""The report of a run: one self-contained HTML page, readable in light and dark, without a script and without the network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from protocol.intervals import is_waiting
from rlsys.charts import HALF, Series, bands, histogram, line_chart, number, shares, thin
from rlsys.story import STRAGGLER_TIMES, STRAGGLERS, Story, slowest_problems, stragglers, verdicts
from rlsys.usage import UNRECORDED, Row, device_usage, usage

WORK_COLOURS = {
    "decode": "var(--c1)",
    "prefill": "var(--c3)",
    "swap weights": "var(--c4)",
    "scoring": "var(--c5)",
    "forward backward": "var(--c2)",
    "pack": "var(--c6)",
    "optimizer": "var(--c3)",
    "train": "var(--c2)",
    "publish": "var(--c4)",
    "commit": "var(--c6)",
    "build batch": "var(--c6)",
    "journal batch": "var(--c6)",
    "dispatching": "var(--c6)",
    "save": "var(--c4)",
    "starting": "var(--c7)",
    "writing": "var(--c6)",
}
IDLE = ("var(--i1)", "var(--i2)", "var(--i3)", "var(--i4)")
FAULTS = (
    "weights refused",
    "restart",
    "learner resumed",
    "logger failed",
    "skipped",
    "stalled",
    "guard",
)

STYLE = """
:root{color-scheme:light dark;--bg:#f7f7f5;--card:#fff;--ink:#1d1f23;--soft:#60656f;--line:#e3e3df;--c1:#2563c9;--c2:#c2571a;--c3:#12836f;
--c4:#8a4fc4;--c5:#a8811a;--c6:#64748b;--c7:#b8bcc4;--i1:#dfe3ea;--i2:#cfd6e0;--i3:#e8dccb;--i4:#e6d3d8;--idle:#dfe3ea;--on:#fff;
--good:#12733f;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--bg:#14161a;--card:#1d2026;--ink:#e8eaee;--soft:#9aa1ad;--line:#31353d;--c1:#6ea0f7;--c2:#ef9a5d;
--c3:#4cc3ab;--c4:#bb91ee;--c5:#dcb64f;--c6:#8e9bb0;--c7:#545a65;--i1:#31363f;--i2:#3d434e;--i3:#463d30;--i4:#47353b;--idle:#31363f;
--on:#14161a;--good:#5fce93;--bad:#ff8a80}
}*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}h1{font-size:26px;margin:0;letter-spacing:-.01em}
h2{font-size:18px;margin:38px 0 4px}.lead{color:var(--soft);margin:2px 0 12px;max-width:75ch}
.pill{font-size:13px;padding:2px 10px;border-radius:99px;border:1px solid currentColor;vertical-align:middle;margin-left:10px}
.done{color:var(--good)}.failed,.dead{color:var(--bad)}.running{color:var(--c1)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(124px,1fr));gap:12px;margin:22px 0 0;padding:0;list-style:none}
.tiles li{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.tiles b{display:block;font-size:17px;font-weight:600;white-space:nowrap;letter-spacing:-.01em}.tiles span{color:var(--soft);font-size:13px}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:14px}
figure,.card{margin:0 0 14px;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;overflow-x:auto}
figcaption{font-weight:600;margin-bottom:6px}svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:11.5px;font-family:inherit}svg text.on{fill:var(--on);font-weight:600}
svg text.off{fill:var(--ink)}svg text.strong{fill:var(--ink)}.grid{stroke:var(--line);stroke-width:1}
.curve{fill:none;stroke-width:2;stroke-linejoin:round}.point{opacity:.0}.point:hover{opacity:1}
.band:hover,.bar:hover{filter:brightness(1.12)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;list-style:none;margin:8px 0 0;padding:0;color:var(--soft);font-size:13px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.unit,.empty{color:var(--soft);font-size:13px;margin:4px 0 0}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding-bottom:6px;font-size:15px}
th{text-align:left;color:var(--soft);font-weight:500;border-bottom:1px solid var(--line);padding:4px 12px 4px 0}
td{border-bottom:1px solid var(--line);padding:4px 12px 4px 0}td.n,th.n{text-align:right}tr:last-child td{border-bottom:0}
details{margin-top:10px}summary{cursor:pointer;color:var(--soft)}
pre{white-space:pre-wrap;font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,monospace;margin:10px 0 0}
footer{color:var(--soft);font-size:13px;margin-top:36px}@media print{body{background:#fff}figure,.card{break-inside:avoid}}
"""


def build_page(story: Story) -> str:
    """The whole page."""
    sections = [
        _section("Learning", "Reward of each batch, and held-out pass@1 at the version that was evaluated.", _learning(story)),
        _section(
            "Where the time went",
            "Each strip is one process. Colours are work, greys are waits; both sum to the wall time. Hover for names and times.",
            _time(story),
        ),
        _section(
            "Staleness and stragglers", "How old tokens were when they were trained on, and whom batches waited for.", _staleness(story)
        ),
        _section("Data and verdicts", "What was sampled and how it was judged.", _data(story)),
        _section("Throughput", "Over the last seconds before each iteration's end, waits included.", _throughput(story)),
        _section("Faults survived and other events", "", _events(story)),
        _section("Configuration", "", _configuration(story)),
    ]
    state = escape(story.state)
    reason = f'<p class="lead">{escape(story.reason)}</p>' if story.reason else ""
    written = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(story.name)}: report</title><style>{STYLE}</style></head><body><main>'
        f'<header><h1>{escape(story.name)}<span class="pill {state}">{state}</span></h1>{reason}'
        f'<p class="lead">{escape(str(story.run_dir))}</p>{_tiles(story)}</header>{"".join(sections)}'
        f"<footer>Written {written} by rlsys from what the run recorded"
        f"{'' if story.state != 'running' else '; the run goes on, so this is how it stands'}.</footer></main></body></html>"
    )


def write_page(story: Story, path: Path) -> None:
    """Written aside and renamed."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(build_page(story), encoding="utf-8")
    aside.replace(path)


def _section(title: str, lead: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>" + (f'<p class="lead">{escape(lead)}</p>' if lead else "") + body + "</section>"


def _tiles(story: Story) -> str:
    last = story.iterations[-1] if story.iterations else {}
    tiles: list[tuple[str, str]] = [
        (f"{len(story.iterations)} / {story.config.get('iterations', '?')}", "iterations"),
        (_duration(story.end_s - story.start_s), "recorded time"),
    ]
    if last:
        tiles.append((_mean(story, "reward/mean", 5), "reward, last 5 iterations"))
    if story.evaluations:
        first, newest = story.evaluations[0], story.evaluations[-1]
        tiles.append(
            (f"{first['pass_at_1']:.2f} → {newest['pass_at_1']:.2f}", f"held-out pass@1, v{first['version']} to v{newest['version']}")
        )
    if last:
        most = max(record.get("staleness/max") or 0 for record in story.iterations)
        tiles.append((f"{number(most)}", "most versions that a token was old"))
    for role, label in (("generator", "generators busy"), ("learner", "learner busy")):
        members = [rows for name, rows in story.processes.items() if name.startswith(role) and rows]
        if members:
            parts = [usage(rows, *_training(story, rows)) for rows in members]
            tiles.append((f"{sum(p.busy_s for p in parts) / max(1e-9, sum(p.wall_s for p in parts)):.0%}", f"{label}, while training"))
    faults = [event for event in story.events if event["event"] in FAULTS]
    tiles.append((str(len(faults)), "faults survived"))
    return (
        '<ul class="tiles">' + "".join(f"<li><b>{escape(value)}</b><span>{escape(label)}</span></li>" for value, label in tiles) + "</ul>"
    )


def _training(story: Story, rows: Sequence[Row]) -> tuple[float, float]:
    """The stretch from the start of training to its end, for shares that start-up would blur."""
    starts = [e["time_s"] for e in story.events if e["event"] == "training started"]
    ends = [e["time_s"] for e in story.events if e["event"] == "training ended"]
    begin = starts[0] if starts else rows[0].start_s
    end = ends[-1] if ends else min(story.end_s, rows[-1].end_s)
    return (begin, end) if end > begin else (rows[0].start_s, rows[-1].end_s)


# ---------------------------------------------------------------------------------------------------- sections


def _points(story: Story, name: str) -> list[tuple[float, float]]:
    return [(float(r["iteration"]), float(r[name]) if r.get(name) is not None else float("nan")) for r in story.iterations if name in r]


def _learning(story: Story) -> str:
    evaluations = [(float(e["version"]), float(e["pass_at_1"])) for e in story.evaluations if e["pass_at_1"] is not None]
    reward = line_chart(
        "Reward and held-out pass@1",
        [
            Series("reward of the batch", _points(story, "reward/mean")),
            Series("held-out pass@1", evaluations, "var(--c2)", dots=True),
        ],
        y_at_most=1.0,
    )
    training = line_chart(
        "Entropy and truncated share",
        [
            Series("entropy (nats per token)", _points(story, "train/entropy"), "var(--c3)"),
            Series("truncated share", _points(story, "data/truncated_share"), "var(--c4)"),
        ],
    )
    return f'<div class="grid2">{reward}{training}</div>'


def _colours(story: Story) -> dict[str, str]:
    """Of every activity that a process of this run was at: work in colours, waits in greys."""
    used = {row.name for rows in story.processes.values() for row in rows}
    waits = sorted(name for name in used if is_waiting(name))
    colours = {name: colour for name, colour in WORK_COLOURS.items() if name in used}
    colours |= {name: "var(--c6)" for name in sorted(used) if not is_waiting(name) and name not in colours}
    return colours | {name: IDLE[i % len(IDLE)] for i, name in enumerate(waits)} | {UNRECORDED: "var(--bg)"}


def _time(story: Story) -> str:
    seconds, colours = story.end_s - story.start_s, _colours(story)
    strips = {
        name: thin([(r.name, r.start_s - story.start_s, r.end_s - story.start_s) for r in rows], seconds)
        for name, rows in story.processes.items()
        if name != "dashboard-0" and rows
    }
    divided, table = [], []
    for name, rows in story.processes.items():
        if not rows:
            continue
        whole = usage(rows, rows[0].start_s, rows[-1].end_s)
        work = sorted(whole.work_s.items(), key=lambda item: -item[1])
        idle = sorted(whole.idle_s.items(), key=lambda item: -item[1])
        divided.append((name, [(activity, s, colours.get(activity, "var(--c6)")) for activity, s in (*work, *idle) if s > 0]))
        causes = ", ".join(f"{n.removeprefix('waiting:')} {s:.1f}" for n, s in idle[:4] if s >= 0.05)
        total = whole.busy_s + sum(whole.idle_s.values())
        table.append((name, f"{whole.wall_s:.1f}", f"{whole.busy_s:.1f}", f"{whole.busy_share:.0%}", causes or "-", f"{total:.1f}"))
    return (
        bands("Busy and waiting, over the run", strips, colours, seconds)
        + shares("Busy time by activity, idle time by cause", divided)
        + _table(
            "Sums by process (seconds)",
            ("process", "wall", "busy", "share", "idle by cause", "busy + idle"),
            table,
            numeric=(1, 2, 3, 5),
        )
        + _devices(story)
    )


def _devices(story: Story) -> str:
    """A device is busy while any process on it is; its idle time is shared among what they wait for."""
    rows = []
    for device, names in story.devices.items():
        together = [story.rows[name] for name in names]
        whole = device_usage(together, min(r[0].start_s for r in together), max(r[-1].end_s for r in together))
        idle = sorted(whole.idle_s.items(), key=lambda item: -item[1])
        causes = ", ".join(f"{n.removeprefix('waiting:')} {s:.1f}" for n, s in idle[:4] if s >= 0.05)
        figures = (f"{whole.wall_s:.1f}", f"{whole.busy_s:.1f}", f"{whole.busy_share:.0%}", causes or "-")
        rows.append((device, ", ".join(names), *figures))
    return _table(
        "Devices: busy while anyone on them is (seconds)",
        ("device", "processes", "wall", "busy", "share", "idle by cause"),
        rows,
        numeric=(2, 3, 4),
    )


def _staleness(story: Story) -> str:
    ages = [(f"{age}", float(count)) for age, count in story.staleness.items()]
    late = stragglers(story.samples)
    rows = [
        (
            str(s.sample.iteration),
            f"{s.sample.group}/{s.sample.index}",
            s.sample.problem,
            s.sample.generator,
            f"{s.sample.tokens:,}",
            f"{s.sample.sampling_s:.2f}",
            f"{s.sample.scoring_s:.2f}",
            f"{s.times:.1f}x",
            "last of its batch" if s.last else f"over {STRAGGLER_TIMES:g}x",
        )
        for s in late[:STRAGGLERS]
    ]
    heads = ("iteration", "sample", "problem", "generator", "tokens", "sampled (s)", "scored (s)", "of the median", "why")
    curves = [Series("mean", _points(story, "staleness/mean")), Series("most", _points(story, "staleness/max"), "var(--c2)")]
    return (
        f'<div class="grid2">{histogram("Tokens by staleness (versions)", ages, unit="tokens")}{line_chart("Staleness over the run", curves)}</div>'
        + _table(f"Stragglers ({len(late)} in all)", heads, rows, numeric=(0, 4, 5, 6, 7))
    )


def _data(story: Story) -> str:
    training = [s for s in story.samples if s.purpose == "train"]
    found = verdicts(training)
    if not training:
        return '<p class="empty">no sample was journaled yet</p>'
    lengths = np.array([s.tokens for s in training])
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, 15).astype(int))
    counts, _ = np.histogram(lengths, edges)
    bars = [(f"{a}-{b - 1}", float(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]
    half = len(training) // 2
    colours = ["var(--c3)", "var(--c2)", "var(--c5)", "var(--c4)", "var(--c6)", "var(--c7)"]
    names = list(found)
    shown = names[: len(colours) - 1]
    rows = []
    for label, part in (("first half", training[:half]), ("second half", training[half:]), ("all", training)):
        mine = verdicts(part)
        pieces = [(n, float(mine.get(n, 0)), colours[i]) for i, n in enumerate(shown)]
        rest = sum(count for n, count in mine.items() if n not in shown)
        rows.append((label, [p for p in [*pieces, ("other", float(rest), colours[-1])] if p[1] > 0]))
    problems = [
        (c.problem, str(c.samples), f"{c.passed / c.samples:.0%}", f"{c.tokens:,.0f}", f"{c.sampling_s:.2f}", f"{c.scoring_s:.3f}")
        for c in slowest_problems(training)
    ]
    heads = ("problem", "samples", "passed", "tokens", "sampling (s)", "scoring (s)")
    lengths_chart = histogram("Completion lengths (tokens)", bars, unit="samples", share=False)
    return f'<div class="grid2">{shares("Verdicts", rows, "samples", HALF)}{lengths_chart}</div>' + _table(
        "Slowest problems (means)", heads, problems, numeric=(1, 2, 3, 4, 5)
    )


def _throughput(story: Story) -> str:
    tokens = line_chart(
        "Tokens per second",
        [
            Series("sampled", _points(story, "throughput/sampled_tokens_per_s")),
            Series("trained", _points(story, "throughput/trained_tokens_per_s"), "var(--c2)"),
        ],
    )
    scored = line_chart("Samples scored per second", [Series("scored", _points(story, "throughput/scored_samples_per_s"), "var(--c3)")])
    return f'<div class="grid2">{tokens}{scored}</div>'


def _events(story: Story) -> str:
    rows = []
    for record in [e for e in story.events if e["event"] != "on device"][-200:]:
        detail = ", ".join(f"{k} {v}" for k, v in record.items() if k not in ("time_s", "identity", "event"))
        what = "fault" if record["event"] in FAULTS else ""
        rows.append((f"{record['time_s'] - story.start_s:.1f}", str(record.get("identity", "")), str(record["event"]), detail, what))
    lead = '<p class="lead">No fault was recorded.</p>' if not any(row[-1] for row in rows) else ""
    return lead + (_table("Events", ("s", "process", "event", "detail", ""), rows, numeric=(0,)) if rows else "")


def _configuration(story: Story) -> str:
    text = yaml.safe_dump(story.config, sort_keys=False)
    return f'<div class="card"><details><summary>{len(text.splitlines())} lines, as resolved</summary><pre>{escape(text)}</pre></details></div>'


# ---------------------------------------------------------------------------------------------------- pieces


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    if not rows:
        return ""

    def cell(tag: str, i: int, text: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{' class=n' if i in numeric else ''}>{escape(text)}</{tag}>"

    head = "".join(cell("th", i, text) for i, text in enumerate(heads))
    body = "".join("<tr>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="card"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _mean(story: Story, name: str, last: int) -> str:
    values: list[Any] = [r[name] for r in story.iterations[-last:] if r.get(name) is not None]
    return f"{sum(values) / len(values):.3f}" if values else "-"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d} min"
