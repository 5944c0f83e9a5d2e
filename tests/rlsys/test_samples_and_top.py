"""`rlsys samples` and `rlsys top` on the files of a run with known numbers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from protocol.errors import ConfigError, DataError
from rlsys.browse import interval_of
from rlsys.cli import main
from rlsys.samples import read_trajectories
from rlsys.screen import screen
from rlsys.top import Tail, top
from tests.directories import tokenizer_directory
from tests.observed import make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = make_run(tmp_path / "run")
    config = yaml.safe_load((made / "config.yaml").read_text())
    model = tokenizer_directory(tmp_path / "model")
    (made / "config.yaml").write_text(yaml.safe_dump({**config, "model": {"path": str(model)}}))
    return made


def chosen(run: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    assert main(["samples", str(run), "--json", "-n", "0", *options]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_filters(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """8 groups of 4: iteration = group // 2, odd members pass with score 1, member i has 4 + i tokens, 5/3 has 80."""
    everything = chosen(run, capsys)
    assert len(everything) == 32
    assert {(s["group_id"], s["index"]) for s in everything} == {(g, i) for g in range(8) for i in range(4)}
    assert all(s["score"] == s["index"] % 2 for s in everything), "the first copy of 0/0 counts, as for the learner"
    assert {s["iteration"] for s in chosen(run, capsys, "--iteration", "1:2")} == {1, 2}
    assert len(chosen(run, capsys, "--iteration", "3")) == 8
    assert all(s["passed"] for s in chosen(run, capsys, "--reward-min", "1"))
    assert len(chosen(run, capsys, "--reward-max", "0.5")) == 16
    assert len(chosen(run, capsys, "--verdict", "accepted")) == 16
    assert [(s["group_id"], s["index"]) for s in chosen(run, capsys, "--length", "20:")] == [(5, 3)]
    assert len(chosen(run, capsys, "--problem", "train-7", "--verdict", "wrong_answer")) == 2
    assert chosen(run, capsys, "--purpose", "eval") == []
    assert chosen(run, capsys, "--sort", "length", "--reverse")[0]["tokens"] == 80
    assert len(chosen(run, capsys, "--sort", "time")) == 32


def test_samples_in_words(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samples", str(run), "-n", "1", "--verdict", "accepted"]) == 0
    said = capsys.readouterr().out
    assert "=== train-7  sample 7/3  iteration 3 (train)  accepted, score 1  7 tokens" in said
    assert "--- completion" in said
    assert main(["samples", str(run), "--problem", "nowhere"]) == 0
    assert "no sample passes" in capsys.readouterr().out


def test_bad_input_is_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samples", str(run), "--iteration", "soon"]) == 2
    assert "--iteration soon: expected a number" in capsys.readouterr().err
    assert main(["samples", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["top", str(tmp_path)]) == 2
    assert main(["why", str(tmp_path)]) == 2
    assert main(["logs", str(tmp_path / "nowhere"), "--merge"]) == 2
    for command in ("timeline", "samples", "logs", "status", "top", "why"):
        assert main([command, "x" * 300]) == 2, command
        assert main([command, "/".join(["part"] * 3000)]) == 2, command
    capsys.readouterr()
    (tmp_path / "status.json").write_text('{"state": "runn')
    for command in ("status", "top", "why"):
        assert main([command, str(tmp_path)]) == 2
        assert "status.json: is no status of a run" in capsys.readouterr().err
    with pytest.raises(DataError, match="holds no journal"):
        list(read_trajectories(tmp_path))
    with pytest.raises(ConfigError):
        interval_of("1:x", "length")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--verdict", "typo"], "--verdict typo: no sample has it; there are: wrong_answer (16), accepted (16)"),
        (["--iteration", "10:3"], "--iteration 10:3: expected numbers from 0 on, the smaller one first"),
        (["--iteration=-1"], "--iteration -1: expected numbers from 0 on"),
        (["--length", ""], "--length : expected numbers"),
        (["--reward-min", "nan"], "no score lies between them"),
        (["--reward-min", "1", "--reward-max", "0"], "--reward-min 1 and --reward-max 0: no score lies between them"),
    ],
)
def test_filters_that_can_match_nothing_are_refused(run: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samples", str(run), *options]) == 2
    assert says in capsys.readouterr().err


STATUS = {
    "run_dir": "/runs/a", "state": "running", "time_s": 100.0, "since_s": 40.0, "training_since_s": 60.0, "iteration": 3, "iterations": 6,
    "rewards": [0.1, 0.2, 0.4], "evaluations": [{"pass_at_1": 0.3, "version": 0, "problems": 9}],
    "last": {"throughput/sampled_tokens_per_s": 1234.0, "throughput/trained_tokens_per_s": 99.0,
             "staleness/mean": 0.5, "staleness/max": 1, "idle/learner": 0.25},
    "queues": {"queues/groups_outstanding": 7.0}, "memory": {"memory/learner_0": 5e8}, "stalled": True, "why": "generator-0 is [stopped]",
    "processes": [
        {"name": "learner-0", "pid": 5, "doing": "waiting:trajectories", "peer": "rewarder", "detail": "2 groups", "for_s": 9.0, "silent_s": 0.1},
        {"name": "generator-0", "pid": 6, "doing": "decode", "peer": "", "detail": "", "for_s": 2.0, "silent_s": 30.0, "stopped": True},
        {"name": "rewarder-0", "pid": 7, "doing": "scoring", "peer": "", "detail": "", "for_s": 2.0, "silent_s": 0.1},
    ],
}  # fmt: skip


def text_of(content: dict[str, Any], now_s: float) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(screen(content, ["   0:20  held-out pass@1"], now_s))
    return out.getvalue()


def test_the_screen_shows_everything() -> None:
    text = text_of(STATUS, 101.0)
    for part in (
        "iteration 3/6", "left 0:40", "▃▅█", "0.300 at v0 on 9 problems", "sampling 1,234 tok/s", "mean 0.50, most 1", "learner 25%",
        "groups outstanding 7", "500 MB", "waits for trajectories from rewarder (2 groups)", "stopped, 31 s without a word; last at decode",
        "generator-0 is [stopped]", "nothing moves", "held-out pass@1",
    ):  # fmt: skip
        assert part in text, part
    assert "no news" not in text
    new = {
        "name": "learner-1",
        "pid": 8,
        "doing": "starting",
        "peer": "",
        "detail": "",
        "for_s": 19.0,
        "silent_s": 19.0,
        "registered": False,
    }
    line = next(row for row in text_of({**STATUS, "processes": [new]}, 101.0).splitlines() if "learner-1" in row)
    assert "starting" in line and "silent" not in line, "imports take their time"
    assert "training 99 tok/s" in text and "sampling 5 tok/s" in text_of({**STATUS, "now": {"throughput/sampled_tokens_per_s": 5.0}}, 101.0)
    assert "no news for 60 s" in text_of(STATUS, 160.0)
    assert "iteration 0/0" in text_of({}, 1.0), "nothing is there yet"


def test_top_without_a_terminal_prints_once(run: Path) -> None:
    (run / "status.json").write_text(json.dumps({**STATUS, "since_s": 1000.0}))
    out = io.StringIO()
    assert top(run, out, once=False) == 0
    assert "iteration 3/6" in out.getvalue()
    assert "generator-1@1 refused v2: <torn>" in out.getvalue()


def test_top_tells_how_a_run_ended(run: Path) -> None:
    (run / "status.json").write_text(json.dumps(STATUS))
    (run / "exit.json").write_text(
        json.dumps({"outcome": "failed", "reason": "wandb is not installed", "iterations_done": 4, "iterations": 6})
    )
    out = io.StringIO()
    assert top(run, out, once=True) == 0
    assert "failed" in out.getvalue() and "wandb is not installed" in out.getvalue() and "iteration 4/6" in out.getvalue()


def test_events_are_read_on_from_where_they_stopped(run: Path) -> None:
    tail = Tail(run / "metrics.jsonl", 1000.0)
    assert len(tail.read()) == 5
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"time_s": 1050, "identity": "x", "event": "training ended"}\n{"time_s": 10')
    assert tail.read()[-1] == "   0:50  training ended"
    assert len(tail.read()) == 6
