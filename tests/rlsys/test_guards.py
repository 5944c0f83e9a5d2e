"""Each guard on series that it must speak on, and on series of a healthy run, on which all are silent."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from rlsys.guards import Guards, GuardSettings

HEALTHY = {
    "train/entropy": 0.5,
    "train/ratio_mean": 1.0,
    "train/grad_norm": 0.3,
    "train/logprob_drift": 0.01,
    "data/truncated_share": 0.05,
    "data/zero_variance_share": 0.25,
    "reward/mean": 0.4,
    "data/completion_tokens_mean": 100.0,
}

BROKEN: dict[str, Mapping[str, float]] = {
    "entropy collapse": {"train/entropy": 0.01},
    "exploding ratio": {"train/ratio_mean": 50.0},
    "exploding gradient": {"train/grad_norm": 30.0},
    "log-prob drift": {"train/logprob_drift": 2.0},
    "truncation": {"data/truncated_share": 0.9},
    "nothing to learn from": {"data/zero_variance_share": 1.05},
    "reward jump with shorter answers": {"reward/mean": 1.0, "data/completion_tokens_mean": 12.0},
}


def feed(guards: Guards, count: int, start: int = 0, **changes: float) -> list[str]:
    values = {**HEALTHY, **{name.replace("__", "/"): value for name, value in changes.items()}}
    found = []
    for i in range(start, start + count):
        wobble = 1.0 + 0.05 * math.sin(i)
        found += [alarm.guard for alarm in guards.observe(i, {name: value * wobble for name, value in values.items()})]
    return found


@pytest.mark.parametrize("guard", BROKEN)
def test_what_breaks_is_told_once_and_again_only_after_it_was_well(guard: str) -> None:
    guards = Guards(GuardSettings())
    broken = {name.replace("/", "__"): value for name, value in BROKEN[guard].items()}
    assert feed(guards, 20) == []
    found = feed(guards, 10, 20, **broken)
    assert found == [guard]
    feed(guards, 40, 30)
    assert feed(guards, 10, 70, **broken) == [guard], "it speaks again"


def test_a_healthy_run_that_learns_is_left_alone() -> None:
    """Entropy halves, the reward rises slowly, completions get a little shorter."""
    guards = Guards(GuardSettings())
    for i in range(200):
        share = i / 200
        values = {
            **HEALTHY,
            "train/entropy": 0.5 * (1 - 0.6 * share),
            "reward/mean": 0.3 + 0.55 * share + 0.05 * math.sin(i),
            "data/completion_tokens_mean": 100 - 30 * share,
            "data/zero_variance_share": 0.12 + 0.7 * share,
        }
        assert guards.observe(i, values) == []


def test_alarms_say_what_and_where_to_look() -> None:
    guards = Guards(GuardSettings())
    feed(guards, 20)
    [alarm] = [a for i in range(20, 30) for a in guards.observe(i, {**HEALTHY, "train/entropy": 0.001})]
    assert alarm.iteration == 24 or alarm.iteration < 25
    assert alarm.sentence.startswith(f"entropy collapse at iteration {alarm.iteration}: entropy fell from 0.")
    assert "rlsys samples" in alarm.look


def test_off_is_silent_and_missing_numbers_are_no_alarm() -> None:
    assert feed(Guards(GuardSettings(action="off")), 40, train__entropy=0.0) == []
    guards = Guards(GuardSettings())
    for i in range(30):
        assert guards.observe(i, {"reward/mean": float("nan")}) == []
