"""The last lines of a run, from what it recorded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlsys.report import lines, summarise
from tests.rlsys.test_overlap import record

EVAL = {"version": 2, "pass_at_1": 0.25, "problems": 4, "samples": 8}


def finished_run(run_dir: Path) -> None:
    exit_record = {
        "outcome": "done", "evaluations": [EVAL],
        "phases": [{"name": "start-up", "wall_s": 2.0, "cpu_s": 1.0}, {"name": "training", "wall_s": 8.0, "cpu_s": 6.0}],
    }  # fmt: skip
    (run_dir / "exit.json").write_text(json.dumps(exit_record))
    iterations = [
        {"iteration": k, "reward/mean": 0.5, "data/tokens": tokens, "staleness/mean": mean, "staleness/max": most, "staleness/mixed_share": mixed}
        for k, (tokens, mean, most, mixed) in enumerate([(100, 0.0, 0.0, 0.0), (300, 1.0, 1.0, 0.5)])
    ]  # fmt: skip
    records = [{"event": "eval", **EVAL}, *iterations]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    record(run_dir, "learner-0", ("train", 0, 4))
    record(run_dir, "generator-0", ("decode", 1, 2))
    (run_dir / "final_model").mkdir()


def test_figures_of_a_finished_run(tmp_path: Path) -> None:
    finished_run(tmp_path)
    figures = summarise(tmp_path)
    assert (figures["outcome"], figures["iterations"], figures["overlap"]) == ("done", 2, pytest.approx(0.25))
    assert figures["staleness_mean"] == pytest.approx(300 / 400), "by token, not by iteration"
    assert (figures["staleness_max"], figures["mixed_share"]) == (1.0, 0.25)
    assert (figures["s_per_iteration"], figures["cpu_s_per_iteration"]) == (4.0, 3.0)
    assert figures["cpu_share"] == pytest.approx(6 / 8 / (os.cpu_count() or 1))
    text = lines(tmp_path, figures)
    assert text[0] == "held-out pass@1  0.250 at v2 (4 problems, 8 samples)"
    assert "iterations       2, 4.00 s and 3.00 CPU-s each" in text
    assert "overlap          a generator decoded during 25% of the learner's busy time" in text
    assert "staleness        mean 0.75, most 1; 25.0% of completions mix versions" in text
    assert "time             start-up 2.0 s, training 8.0 s" in text
    assert f"final model      {tmp_path / 'final_model'}" in text


def test_a_run_that_ended_early_says_what_it_knows(tmp_path: Path) -> None:
    figures = summarise(tmp_path)
    assert (figures["outcome"], figures["iterations"]) == (None, 0)
    assert lines(tmp_path, figures) == []
    finished_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2, "reward/me')
    assert summarise(tmp_path)["iterations"] == 2
