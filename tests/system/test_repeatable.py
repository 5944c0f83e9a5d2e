"""One generator, one reward actor, no overlap: two runs of a seed give the same tokens, rewards and weights, to the last bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import Run
from tests.system.test_ring import records, trajectories


def repeatable(config: dict[str, Any], iterations: int) -> dict[str, Any]:
    """Fewer slots than samples, so that who is sampled beside whom depends on when tasks and credits arrive."""
    config["schedule"] = {"name": "synchronous"}
    config["iterations"] = iterations
    config["generators"]["slots"] = 6
    return config


def outcome(run: Run) -> tuple[dict[Any, Any], list[float], bytes]:
    """What was sampled and scored, the losses, and the final weights."""
    samples = {
        (t.group_id, t.index): (t.problem_id, t.token_ids.tobytes(), t.behaviour_logprobs.tobytes(), t.score, t.status)
        for t in trajectories(run.path)
        if t.purpose == "train"
    }
    losses = [r["train/loss"] for r in records(run) if "train/loss" in r]
    return samples, losses, Path(run.path / "final_model" / "model.safetensors").read_bytes()


def assert_equal(one: tuple[dict[Any, Any], list[float], bytes], other: tuple[dict[Any, Any], list[float], bytes]) -> None:
    assert one[0].keys() == other[0].keys()
    assert [key for key in one[0] if one[0][key] != other[0][key]] == [], "samples that differ"
    assert one[2] == other[2], "weights"


def test_two_runs_of_a_seed_are_the_same_bit_by_bit(config: dict[str, Any], start: Callable[..., Run]) -> None:
    config = repeatable(config, 5)
    outcomes = []
    for seed in (0, 0, 1):
        run = start(config | {"seed": seed})
        assert run.wait() == 0, run.err
        outcomes.append(outcome(run))
    one, again, other = outcomes
    assert len(one[0]) == 5 * 4 * 4
    assert_equal(one, again)
    assert one[1] == again[1], "losses"
    assert len(one[1]) == 5
    assert (one[0] == other[0], one[2] == other[2]) == (False, False), "another seed is another run"


@pytest.mark.faults
def test_deaths_change_no_bit(config: dict[str, Any], start: Callable[..., Run]) -> None:
    """What died is sampled again from its seeds, scored again, or trained again from the journal."""
    config = repeatable(config, 30)
    config["restarts"] = {"backoff_s": 0.05}
    undisturbed = start(config)
    assert undisturbed.wait() == 0, undisturbed.err
    run = start(config)
    for at, victim in ((2, "generator-0"), (6, "learner-0"), (10, "rewarder-0"), (14, "generator-0"), (18, "dispatcher-0")):
        run.until(lambda status, at=at: status.get("iteration", 0) >= at, f"iteration {at}")
        os.kill(run.pids()[victim], signal.SIGKILL)
    assert run.wait(200, restarts=True) == 0, run.err
    assert len(run.exit_record["restarts"]) == 5
    assert_equal(outcome(undisturbed), outcome(run))
