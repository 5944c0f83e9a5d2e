"""Kills do not shorten what a run trains on: real processes with the simulated engine, long-tailed lengths, a fifth of the samples hit.

`tests/actors/test_bias.py` shows the same of the custody alone, on a clock of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.actors.test_bias import LENGTHS, kolmogorov_smirnov
from tests.system.conftest import Run
from tests.system.test_ring import trajectories
from tests.system.test_simulated import simulated as simulated  # a fixture
from tests.system.test_survival import ROLES, rehearse, sound

pytestmark = pytest.mark.slow

GROUPS, SIZE, ITERATIONS = 1280, 8, 2
SLOTS, FLEET, KILLS = 512, 2, 22
TOKENS_PER_S = 150.0
"""Of one sample: 2.7 s for a mean one, 27 s for the longest, beside 3 s to replace a generator. A kill hits about 220 that none hit before."""


def run_of(simulated: dict[str, Any], seed: int, engine: str = "simulated") -> dict[str, Any]:
    options = {"tokens_per_s_sample": TOKENS_PER_S, "tokens_per_s": TOKENS_PER_S * SLOTS, "lengths": LENGTHS}
    simulated["seed"], simulated["iterations"] = seed, ITERATIONS
    simulated["sampling"] |= {"groups_per_iteration": GROUPS, "group_size": SIZE, "max_tokens": 4096}
    simulated["generators"] = {"count": FLEET, "slots": SLOTS, "engine": engine, "options": options}
    simulated["rewarders"]["options"] = {"seconds": 0.001}
    simulated["learner"]["step_options"] = {"tokens_per_s": 1e8}
    simulated["restarts"] = {**dict.fromkeys(ROLES, 10_000), "backoff_s": 0.05, "max_backoff_s": 0.2}
    return simulated


def lengths(run: Run) -> tuple[npt.NDArray[np.int64], int]:
    """What was trained, by sample, and how many samples were drawn again after a death."""
    samples = {}
    for t in trajectories(run.path):
        samples.setdefault((t.group_id, t.index), t)
    assert len(samples) == GROUPS * SIZE * ITERATIONS >= 20_000
    return np.array([len(samples[key].token_ids) for key in sorted(samples)]), sum(t.attempt > 0 for t in samples.values())


def killed(run: Run) -> tuple[npt.NDArray[np.int64], int]:
    """The same for a run whose generators are killed while it samples."""

    def all_sample(status: dict[str, Any]) -> bool:
        sampled = [p["progress"] > 0 for p in status.get("processes", []) if p["name"].startswith("generator")]
        return len(sampled) == FLEET and all(sampled)

    run.until(all_sample, "samples")
    result = rehearse(run, KILLS, 3, "--roles", "generator", "--pause", "1")
    assert len(result["hits"]) == KILLS
    assert run.wait(600, restarts=True) == 0, run.err
    assert len(run.exit_record["restarts"]) == KILLS
    sound(run, ITERATIONS)
    return lengths(run)


def test_lengths_are_those_of_a_run_without_faults_and_fresh_seeds_would_be_noticed(
    simulated: dict[str, Any], start: Callable[..., Run]
) -> None:
    """The undisturbed run has another seed, so that equality is not by construction."""
    run = start(run_of(simulated, seed=8))
    assert run.wait(600) == 0, run.err
    undisturbed, again = lengths(run)
    assert again == 0

    survived, hit = killed(start(run_of(simulated, seed=7)))
    print(f"{len(survived)} samples, {hit} drawn again, p {kolmogorov_smirnov(survived, undisturbed):.3g}")
    assert hit >= 0.2 * len(survived)
    assert kolmogorov_smirnov(survived, undisturbed) > 0.01

    fresh, hit = killed(start(run_of(simulated, seed=7, engine="tests.system.engines:FreshSeeds")))
    print(f"{len(fresh)} samples, {hit} drawn afresh, p {kolmogorov_smirnov(fresh, undisturbed):.3g}")
    assert hit >= 0.15 * len(fresh)
    assert fresh.mean() < 0.97 * undisturbed.mean(), "long samples are hit more often, and drawn shorter the second time"
    assert kolmogorov_smirnov(fresh, undisturbed) < 0.01
