"""The step benchmark runs real iterations on each side, and its parts hold every CPU second that it counts."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks import step
from rlsys.config import load_config
from tests.system.conftest import problems, tiny_model  # noqa: F401  (fixtures)


@pytest.fixture
def overrides(tiny_model: Path, problems: Path) -> list[str]:  # noqa: F811
    """The quickstart made tiny."""
    changes = {
        "model.path": tiny_model,
        "data.train": problems / "train.jsonl",
        "data.eval": problems / "held_out.jsonl",
        "sampling.groups_per_iteration": 2,
        "sampling.group_size": 2,
        "sampling.max_tokens": 16,
    }
    return [f"{key}={value}" for key, value in changes.items()]


def test_every_process_of_a_run_is_counted(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [argument for change in overrides for argument in ("--set", change)]
    step.main(["--only", "rlsys", "--json", "--iterations", "2", "--repeats", "1", *arguments])
    found = json.loads(capsys.readouterr().out)["rlsys"]
    assert set(found["by_process"]) == {
        *("generator", "learner", "dispatcher", "dashboard", "supervisor"),
        *("rewarder", "rewarder (scoring and cells)"),
    }
    assert found["cpu_s"]["sampling"] > 0
    assert sum(found["cpu_s"].values()) == pytest.approx(sum(found["by_process"].values()), abs=1e-3)
    assert 0 < found["tokens"] <= 16


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed (extra bench)")
def test_trl_does_the_same_iterations(overrides: list[str], tmp_path: Path) -> None:
    config = load_config(step.ROOT / "configs" / "quickstart.yaml", [*step.OVERRIDES, *overrides])
    found = step.run_trl(config, 1, tmp_path, argparse.Namespace(micro_batch=4), bf16=False)
    assert set(found["cpu_s"]) == set(step.PARTS)
    assert min(found["cpu_s"]["sampling"], found["cpu_s"]["learning"]) > 0
    assert 0 < found["tokens"] <= 16


def test_without_trl_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        step.main([])
    assert ended.value.code == 2
    assert "pip install -e '.[bench]'" in capsys.readouterr().err


def test_the_cost_between_two_readings_is_in_proportion() -> None:
    meter = step.Meter({})
    meter.readings = [
        step.Reading(10.0, {("learner", "own"): 1.0}),
        step.Reading(12.0, {("learner", "own"): 2.0, ("generator", "own"): 4.0}),
    ]
    assert meter.at(11.5) == {("learner", "own"): 1.75, ("generator", "own"): 3.0}
