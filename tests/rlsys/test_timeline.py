"""The trace against its format, the page in a real browser, and numbers that were worked out by hand."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ConfigError
from rlsys.charts import thin, ticks
from rlsys.page import build_page
from rlsys.story import Story, read_story, slowest_problems, stragglers, verdicts
from rlsys.timeline import timeline
from rlsys.trace import build_trace
from rlsys.usage import usage
from tests.browser import Browser, missing
from tests.observed import START_S, make_run

PHASES = {
    "X": {"ts", "dur", "pid", "tid", "name"}, "M": {"name", "pid", "args"}, "b": {"id", "cat", "name", "ts", "pid"},
    "e": {"id", "cat", "name", "ts", "pid"}, "s": {"id", "cat", "name", "ts", "pid", "tid"}, "f": {"id", "cat", "name", "ts", "pid", "tid"},
    "i": {"name", "ts", "s", "pid"}, "C": {"name", "ts", "args", "pid"},
}  # fmt: skip
"""What each phase of the Trace Event Format must have."""


def validate(trace: dict[str, Any]) -> None:
    """The rules of the format that viewers rely on; raises AssertionError at the first break."""
    events = trace["traceEvents"]
    json.loads(json.dumps(trace, allow_nan=False))
    opened: dict[tuple[Any, ...], float] = {}
    flows: dict[tuple[Any, ...], dict[str, Any]] = {}
    slices: dict[tuple[int, int], list[tuple[float, float]]] = {}
    named = {e["pid"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    for event in events:
        assert event["ph"] in PHASES, event
        assert PHASES[event["ph"]] <= set(event), event
        assert math.isfinite(event["ts"])
        assert event["ts"] >= 0, event
        assert event["pid"] in named | {0}, event
        if event["ph"] == "X":
            assert event["dur"] > 0
            slices.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] == "b":
            key = (event["pid"], event["cat"], event["id"], event["name"])
            assert key not in opened, f"opened twice: {key}"
            opened[key] = event["ts"]
        elif event["ph"] == "e":
            assert opened.pop((event["pid"], event["cat"], event["id"], event["name"])) <= event["ts"]
        elif event["ph"] == "s":
            flows[event["cat"], event["id"]] = event
        elif event["ph"] == "f":
            begin = flows.pop((event["cat"], event["id"]))
            assert begin["ts"] < event["ts"], "an arrow goes forward in time"
            assert begin["name"] == event["name"]
    assert not opened, "every asynchronous slice ends"
    assert not flows, "every arrow arrives"
    for place, spans in slices.items():
        spans.sort()
        for (_, end), (begin, _) in pairwise(spans):
            assert begin >= end - 1, f"slices of track {place} overlap"
    arrows = [e for e in events if e["ph"] in "sf"]
    for event in arrows:  # an arrow binds to the slice that encloses it
        assert any(a <= event["ts"] <= b for a, b in slices[event["pid"], event["tid"]]), event


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return read_story(make_run(tmp_path / "run", {"outcome": "done", "reason": "every iteration is done"}))


def test_the_trace_keeps_to_the_format_and_shows_versions_and_stragglers(story: Story) -> None:
    trace = build_trace(story)
    validate(trace)
    events = trace["traceEvents"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert names == {"generator-0", "generator-1", "rewarder-0", "learner-0", "dispatcher-0"}
    threads = {e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert threads == {"main", "score-0"}
    arrows = [e["name"] for e in events if e["ph"] == "f"]
    assert sorted(arrows) == ["v1", "v1", "v2", "v2", "v3", "v3"], "each of three versions to each of two generators"
    marks = [e for e in events if e.get("cat") == "straggler"]
    assert [e["name"] for e in marks if "iteration 2" in e["name"]] == ["straggler of iteration 2: 5/3"]
    assert len([e for e in events if e["ph"] == "b" and e["cat"] == "sampling"]) == 32


def test_numbers_by_hand(story: Story) -> None:
    """Each generator: swaps 0.5 s and decodes 5.5 s of every 10 s; the learner works 4 s of every 10 s."""
    generator = usage(story.rows["generator-0"], START_S, START_S + 40)
    assert generator.busy_s == pytest.approx(24.0)
    assert generator.idle_s == pytest.approx({"waiting:tasks": 16.0})
    learner = usage(story.rows["learner-0"], START_S, START_S + 40)
    assert learner.busy_share == pytest.approx(0.4)
    assert len(story.samples) == 32, "the second copy of 0/0 does not count"
    assert verdicts(story.samples) == {"wrong_answer": 16, "accepted": 16}
    assert slowest_problems(story.samples)[0].problem == "train-5"
    late = stragglers(story.samples)
    assert (late[0].sample.group, late[0].sample.index, late[0].last) == (5, 3, True)
    assert late[0].times == pytest.approx(9.9 / 4.5)
    assert set(story.staleness) == {0, 1}
    assert story.devices == {"cuda:0": ["generator-0", "generator-1"], "cuda:1": ["learner-0"]}
    assert "Devices: busy while anyone on them is" in build_page(story)


def test_the_page_in_a_browser(story: Story, tmp_path: Path) -> None:
    """Curves and bands have an extent on the screen, nothing is asked of any network, no script fails, and text from the run stays text."""
    if missing():
        pytest.skip(f"this machine has no {missing()} (Debian: apt-get install chromium chromium-driver)")
    path = tmp_path / "report.html"
    path.write_text(build_page(story), encoding="utf-8")
    with Browser() as browser:
        browser.open(path.as_uri())
        curves = browser.run("return [...document.querySelectorAll('path.curve')].map(p => p.getTotalLength())")
        assert len(curves) >= 8
        assert all(length > 100 for length in curves)
        for selector, least in (("rect.band", 60), ("rect.bar", 4)):
            sizes = browser.run(f"return [...document.querySelectorAll('{selector}')].map(r => r.getBoundingClientRect().width)")
            assert len(sizes) >= least
            assert all(size > 0 for size in sizes)
        heads = browser.run("return [...document.querySelectorAll('h2')].map(h => h.textContent)")
        assert {"Learning", "Where the time went", "Staleness and stragglers", "Configuration"} <= set(heads)
        assert browser.run("return document.body.textContent.includes('a < b & c') && document.body.textContent.includes('<torn>')")
        assert browser.run("return document.querySelectorAll('svg:not([aria-label])').length") == 0
        colours = browser.run(
            "const r = document.querySelectorAll('rect.band'); return new Set([...r].map(x => getComputedStyle(x).fill)).size"
        )
        assert colours >= 5
        wide = browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
        assert wide, "nothing hangs over the edge"
        assert [entry for entry in browser.log("browser") if entry["level"] == "SEVERE"] == []
        assert [url for url in browser.requests() if not url.startswith(("file:", "data:", "chrome:"))] == []


def test_a_run_that_has_only_begun_has_a_page_and_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ConfigError, match="holds no run"):
        timeline(run, None, as_json=False)
    (run / "config.yaml").write_text("name: young\niterations: 3\n")
    assert timeline(run, tmp_path / "out", as_json=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert "nothing recorded yet" in Path(said["report"]).read_text()
    validate(json.loads(Path(said["trace"]).read_text()))


def test_the_command_says_where_things_are(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    assert timeline(story.run_dir, None, as_json=False) == 0
    said = capsys.readouterr().out
    assert "generator-0" in said
    assert "busy  60%" in said
    assert str(story.run_dir / "report.html") in said


def test_axes_have_round_marks_around_the_data() -> None:
    assert ticks(0, 0.83) == [0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(3, 3) == [3, 3.25, 3.5, 3.75, 4.0]
    for low, high in ((0, 17), (-3, 0.2), (1000, 98000)):
        marks = ticks(low, high)
        assert marks[0] <= low
        assert marks[-1] >= high
        assert len(marks) <= 9


def test_thinning_keeps_what_fills_most() -> None:
    rows = [("a", 0.0, 5.0), ("b", 5.0, 5.2), ("a", 5.2, 10.0)]
    assert thin(rows, 10.0, bins=10) == [("a", 0.0, 10.0)]
    assert len(thin([(str(i % 2), i / 100, (i + 1) / 100) for i in range(1000)], 10.0, bins=20)) <= 20
