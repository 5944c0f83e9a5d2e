"""When stages begin: by iteration, by reward, by truncation, never for a group that was already issued, and the same when computed again."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.stages import StageClock, StageRule
from protocol.messages import GroupOutcome


def ended(group: int, iteration: int, score: float | None = 0.0, samples: int = 4, truncated: int = 0) -> GroupOutcome:
    return GroupOutcome(
        group_id=group, iteration=iteration, purpose="train", problem_id=f"p{group}", state="trained", reason="", num_samples=samples,
        num_passed=0, mean_score=score, oldest_version=0, newest_version=0, in_batch=True, num_truncated=truncated,
    )  # fmt: skip


def clock(*ends: dict[str, Any], iterations: int = 20, max_staleness: int = 1) -> StageClock:
    rules = [StageRule(lr=10.0**-i, **end) for i, end in enumerate(ends)]
    return StageClock(rules, iterations=iterations, max_staleness=max_staleness)


def test_a_stage_that_ends_at_an_iteration_is_known_as_soon_as_that_can_be_issued() -> None:
    stages = clock({"iteration": 4}, {"iteration": 6}, {}, max_staleness=2)
    known = []
    for iteration in range(6):
        known.append(list(stages.starts))
        stages.close(iteration, [])
    assert known == [[0], [0], [0, 4], [0, 4], [0, 4, 6], [0, 4, 6]], "groups for 4 may be issued once 1 is trained, at version 2"
    assert [stages.stage_of(k) for k in range(8)] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert [stages.lr(k) for k in (0, 3, 4, 6, 19)] == [1.0, 1.0, 0.1, 0.01, 0.01]


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_a_condition_ends_a_stage_at_the_first_iteration_that_nothing_was_issued_for(max_staleness: int) -> None:
    """Mean score over the last two iterations, weighted by samples: 3/4 is reached with iteration 3."""
    stages = clock({"reward": 0.75, "over": 2}, {}, max_staleness=max_staleness)
    for iteration, score in enumerate([0.9, 0.5, 0.5, 1.0]):
        assert stages.starts == [0]
        stages.close(iteration, [ended(iteration, iteration, score), ended(99, iteration, None, samples=0)])
    assert stages.starts == [0, 3 + 1 + max_staleness]


def test_truncation_and_the_earliest_end_count() -> None:
    stages = clock({"iteration": 12, "truncated": 0.5, "over": 1}, {"iteration": 15, "truncated": 0.5, "over": 3}, {})
    stages.close(0, [ended(0, 0, truncated=1)])
    stages.close(1, [ended(1, 1, truncated=3)])
    assert stages.starts == [0, 3]
    for iteration in range(2, 14):
        stages.close(iteration, [ended(iteration, iteration, truncated=4 if iteration < 3 else 1)])
    assert stages.starts == [0, 3, 15], "the long completions of iteration 2 belong to the stage before"


def test_a_stage_that_would_begin_after_the_run_does_not() -> None:
    stages = clock({"reward": 0.0, "over": 1}, {}, iterations=3, max_staleness=2)
    stages.close(0, [ended(0, 0, 1.0)])
    assert stages.starts == [0]


ends = st.fixed_dictionaries(
    {}, optional={"iteration": st.integers(1, 12), "reward": st.floats(0.1, 1), "truncated": st.floats(0.1, 1), "over": st.integers(1, 3)}
)


@given(st.lists(ends, min_size=1, max_size=4), st.integers(0, 3), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4)), max_size=14))
def test_no_border_moves_once_a_group_may_have_been_issued_for_it(
    rules: list[dict[str, Any]], max_staleness: int, history: list[tuple[float, int]]
) -> None:
    """And whoever computes it again from how groups ended finds the same borders."""
    outcomes = [[ended(k, k, score, truncated=cut)] for k, (score, cut) in enumerate(history)]
    stages = clock(*rules, iterations=14, max_staleness=max_staleness)
    decided: dict[int, int] = {k: stages.stage_of(k) for k in range(max_staleness + 1)}
    for k, of_iteration in enumerate(outcomes):
        stages.close(k, of_iteration)
        horizon = k + 1 + max_staleness  # version k + 1 is out: groups up to here may be issued
        assert all(stages.stage_of(j) == stage for j, stage in decided.items()), "a group was issued in another stage"
        decided[horizon] = stages.stage_of(horizon)
    again = clock(*rules, iterations=14, max_staleness=max_staleness)
    for k, of_iteration in enumerate(outcomes):
        again.close(k, of_iteration)
    assert again.starts == stages.starts == sorted(stages.starts)
