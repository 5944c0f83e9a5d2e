"""A run as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open: one process per track group, weight versions as flows.

The format is "Trace Event Format" (Google, 2016): `X` complete slices, `b`/`e` asynchronous slices for samples, `s`/`f` flows from a version's
publication to each swap of it, `C` counters, `i` instants for stragglers and events, `M` names. Times are microseconds since the run's start.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from protocol.intervals import TRAINING, is_waiting
from rlsys.story import Story, stragglers
from rlsys.usage import Row

MOST_SAMPLES = 50_000
"""Newest samples that get a slice of their own; beyond that viewers become slow."""
_COLOURS = {"decode": "thread_state_running", "prefill": "thread_state_runnable", "swap weights": "yellow", "publish": "yellow"}
"""Names that viewers reserve for colours."""


def build_trace(story: Story) -> dict[str, Any]:
    """The whole trace as plain data."""
    events: list[dict[str, Any]] = []
    processes = list(story.processes)
    pids = {name: i + 1 for i, name in enumerate(processes)}
    for name in processes:
        events.append(_meta("process_name", pids[name], 0, {"name": name}))
        events.append(_meta("process_sort_index", pids[name], 0, {"sort_index": pids[name]}))
    threads: dict[str, tuple[int, int]] = {}
    counts: dict[str, int] = defaultdict(int)
    for track in sorted(story.rows, key=lambda t: ("+" in t, t)):
        process, _, thread = track.partition("+")
        if process not in pids:
            continue
        threads[track] = (pids[process], counts[process])
        counts[process] += 1
        events.append(_meta("thread_name", *threads[track], {"name": thread or "main"}))
    for track, place in threads.items():
        events += [_slice(row, place, story.start_s) for row in story.rows[track] if row.end_s > row.start_s]
    events += _flows(story, threads)
    events += _samples(story, pids)
    events += _instants(story, pids)
    events += _counters(story, pids)
    events.sort(key=lambda e: (e["ph"] != "M", e["ts"]))
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"run": story.name, "state": story.state}}


def write_trace(story: Story, path: Path) -> None:
    """As JSON, written aside and renamed."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(json.dumps(build_trace(story)))
    aside.replace(path)


def _us(time_s: float, start_s: float) -> float:
    return round((time_s - start_s) * 1e6, 1)


def _meta(name: str, pid: int, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "ts": 0, "args": args}


def _slice(row: Row, place: tuple[int, int], start_s: float) -> dict[str, Any]:
    event: dict[str, Any] = {
        "ph": "X",
        "name": row.name,
        "cat": "wait" if is_waiting(row.name) else "work",
        "pid": place[0],
        "tid": place[1],
        "ts": _us(row.start_s, start_s),
        "dur": round((row.end_s - row.start_s) * 1e6, 1),
        "args": {key: value for key, value in (("iteration", row.iteration), ("group", row.group)) if value >= 0},
    }
    if is_waiting(row.name):
        event["cname"] = "grey"
    elif row.name in _COLOURS:
        event["cname"] = _COLOURS[row.name]
    elif row.name in TRAINING:
        event["cname"] = "good"
    return event


def _flows(story: Story, threads: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """From the end of each publication to the first swap of that version in each generator. Each arrow has an id of its own."""
    published = {row.iteration: row for row in story.rows.get("learner-0", ()) if row.name == "publish"}
    events: list[dict[str, Any]] = []
    for track, rows in story.rows.items():
        seen: set[int] = set()
        for row in rows:
            source = published.get(row.iteration)
            if row.name != "swap weights" or source is None or row.iteration in seen or track not in threads:
                continue
            seen.add(row.iteration)
            common = {"name": f"v{row.iteration}", "cat": "weights", "id": f"{track}/v{row.iteration}"}
            leaves, arrives = source.end_s - 1e-6, max(row.start_s, source.end_s) + 1e-6
            for ph, place, at in (("s", threads["learner-0"], leaves), ("f", threads[track], arrives)):
                event = {"ph": ph, **common, "pid": place[0], "tid": place[1], "ts": _us(at, story.start_s)}
                events.append({**event, "bp": "e"} if ph == "f" else event)
    return events


def _samples(story: Story, pids: dict[str, int]) -> list[dict[str, Any]]:
    """Each sample under its generator while it was sampled, and under its reward actor while it was scored."""
    late = {(s.sample.group, s.sample.index) for s in stragglers(story.samples)}
    events = []
    for sample in story.samples[-MOST_SAMPLES:]:
        key = f"{sample.group}/{sample.index}"
        args = {
            "iteration": sample.iteration, "problem": sample.problem, "tokens": sample.tokens, "versions": list(sample.versions),
            "verdict": sample.verdict, "score": sample.score, "finish": sample.finish, "straggler": (sample.group, sample.index) in late,
        }  # fmt: skip
        spans = (
            (sample.generator, "sampling", sample.started_s, sample.finished_s),
            (sample.rewarder, "scoring", sample.scored_s - sample.scoring_s, sample.scored_s),
        )
        for process, what, begin, end in spans:
            if process in pids and end > begin >= story.start_s:
                common = {"cat": what, "name": f"{what} {key}", "id": key, "pid": pids[process], "tid": 0}
                events.append({"ph": "b", **common, "ts": _us(begin, story.start_s), "args": args})
                events.append({"ph": "e", **common, "ts": _us(end, story.start_s), "args": {}})
    return events


def _instants(story: Story, pids: dict[str, int]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for straggler in stragglers(story.samples):
        sample = straggler.sample
        if straggler.last and sample.generator in pids:
            name = f"straggler of iteration {sample.iteration}: {sample.group}/{sample.index}"
            args = {"times_the_median": round(straggler.times, 2), "tokens": sample.tokens, "problem": sample.problem}
            place = {"pid": pids[sample.generator], "tid": 0, "ts": _us(sample.finished_s, story.start_s)}
            events.append({"ph": "i", "s": "p", "name": name, "cat": "straggler", **place, "args": args})
    for record in story.events:
        if record["event"] == "on device":
            continue
        process = str(record.get("identity", "")).partition("@")[0]
        args = {key: value for key, value in record.items() if key not in ("time_s", "identity", "event")}
        place = {"pid": pids.get(process, 0), "tid": 0, "ts": _us(record["time_s"], story.start_s)}
        events.append({"ph": "i", "s": "g", "name": record["event"], "cat": "event", **place, "args": args})
    return events


def _counters(story: Story, pids: dict[str, int]) -> list[dict[str, Any]]:
    pid = pids.get("learner-0", 0)
    events = []
    for record in story.iterations:
        for name in ("reward/mean", "staleness/mean", "queues/groups_outstanding"):
            if record.get(name) is not None:
                args = {name.partition("/")[2]: record[name]}
                events.append({"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": _us(record["time_s"], story.start_s), "args": args})
    return events
