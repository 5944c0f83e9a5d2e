"""What `rlsys up` shows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from protocol.messages import Event
from rlsys.config import parse_config
from rlsys.progress import Progress, event_line, summary, time_left
from rlsys.screen import duration, sparkline
from rlsys.supervisor import View
from tests.configuration import minimal

LAST = {
    "staleness/mean": 0.5, "staleness/max": 1.0, "throughput/sampled_tokens_per_s": 1234.0, "train/tokens_per_s": 999.0,
    "throughput/trained_tokens_per_s": 9.0,
}  # fmt: skip


@pytest.fixture
def view(tmp_path: Path) -> View:
    return View(parse_config({**minimal(tmp_path), "iterations": 4}, "test"), tmp_path)


NOW = 5000.0


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is NOW, however long the test takes."""
    monkeypatch.setattr("time.time", lambda: NOW)


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([], ""),
        ([0.0, 0.5, 1.0], "▁▅█"),
        ([float("nan"), 1.0], "█"),
        ([float("inf"), 1.0], "█"),
        ([-1.0, 0.0, 1.0], "▁▁█"),
        ([-1.0, -2.0], "▁▁"),
        ([0.0, 0.0], "▁▁"),
    ],
)
def test_bars_stand_between_nothing_and_the_largest(values: list[float], bars: str) -> None:
    assert sparkline(values) == bars


def test_only_the_newest_bars_are_drawn() -> None:
    assert sparkline([9.0, *[1.0] * 5], width=5) == "█████"


@pytest.mark.parametrize(("seconds", "text"), [(0.9, "0:00"), (61, "1:01"), (3599, "59:59"), (3661.5, "1:01:01")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


EVAL: dict[str, Any] = {"version": 3, "pass_at_1": 0.5, "problems": 4, "failed": 0, "samples": 8, "oldest_version": 3, "newest_version": 3}


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("eval", EVAL, "held-out pass@1 0.500 at v3 (4 problems, 8 samples)"),
        (
            "eval",
            {**EVAL, "newest_version": 4, "failed": 2},
            "held-out pass@1 0.500 at v3..v4 (4 problems, 8 samples, 2 problems without a score)",
        ),
        ("skipped", {"count": 2, "reason": "prompt too long", "first": ["a", "b"]}, "2 prompts skipped (prompt too long): a, b"),
        ("weights refused", {"generator": "generator-0@1", "version": 2, "error": "differs"}, "generator-0@1 refused v2: differs"),
        ("training started", {}, "training started"),
        ("of no interest", {}, None),
    ],
)
def test_events_in_words(name: str, data: dict[str, Any], line: str | None) -> None:
    assert event_line(Event(identity="x", time_s=0.0, name=name, data=data)) == line


@pytest.mark.usefixtures("still")
def test_the_summary_before_and_while_training(view: View) -> None:
    assert summary(view) == "starting: 0 of 0 processes ready, 0 samples running"
    assert time_left(view) == "?"
    view.snapshot = {"iteration": 2, "iterations": 4, "rewards": [0.0, 0.5], "last": LAST}
    view.training_since_s = NOW - 20.0
    line = summary(view)
    assert line.startswith("iteration 2/4  reward 0.250  sampling 1,234 tok/s  training 9 tok/s  staleness 0.50 (max 1)  left 0:")
    view.snapshot["now"] = {"throughput/sampled_tokens_per_s": 77.0}
    assert "sampling 77 tok/s  training 9 tok/s" in summary(view), "of this moment where that is known"
    first = View(view.config, view.run_dir, training_since_s=1.0)
    assert summary(first) == "iteration 0/4  0 samples running  sampling ? tok/s  training ? tok/s", "what is not known is not 0"
    assert time_left(view) == "0:20", "ten seconds for each of the two that are left"


@pytest.mark.usefixtures("still")
def test_plain_lines_keep_brackets_and_carry_the_time(view: View) -> None:
    out = io.StringIO()
    view.started_s = NOW - 65
    with Progress(view, out, plain=True) as progress:
        progress.say("run [bold]x[/bold] \\[y]")
        progress.event(Event(identity="x", time_s=0.0, name="training started", data={}))
        progress.event(Event(identity="x", time_s=0.0, name="of no interest", data={}))
        progress.tick()
        progress.tick()
    lines = out.getvalue().splitlines()
    assert [line.strip() for line in lines] == ["1:05  run [bold]x[/bold] \\[y]", "1:05  training started"]


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_panel_shows_rewards_and_queues(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    out = Terminal()
    view.snapshot = {"iteration": 2, "iterations": 4, "rewards": [0.0, 1.0], "last": LAST, "queues": {"queues/samples_running": 3.0}}
    view.status = {**view.snapshot, "evaluations": [EVAL], "state": "running"}
    with Progress(view, out) as progress:
        progress.tick()
    for text in ("iteration 2/4", "▁█", "samples running 3", "0.500 at v3 on 4 problems"):
        assert text in out.getvalue()


def test_a_server_that_starts_stands_in_the_line(view: View) -> None:
    server = ["SGLang server", "starts", 23.0, "", 900.0]
    view.status = {"processes": [{"name": "generator-0", "doing": "start server", "facts": {"server": server}}, {"name": "learner-0"}]}
    assert summary(view).endswith("; generator-0 has been starting its SGLang server for 23 s of at most 900 s")
