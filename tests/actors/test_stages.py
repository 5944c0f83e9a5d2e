"""The prompts of stages: their data sets and filters, what is given back, and that a restarted dispatcher goes on with the same ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.dataset import Problem
from actors.stages import Drawn, Prepared, Prompts, Result, StageFilters, StagePlan, keeps
from protocol.ledger import Issue, Stage
from protocol.messages import GroupOutcome, TerminalState

GROUPS = 4


def prompts_of(*names: str) -> list[Prepared]:
    return [Prepared(Problem(name, name, b""), np.array([1], np.int32)) for name in names]


def make(*filters: StageFilters, sets: list[list[str]] | None = None, shuffle: bool = False) -> Prompts:
    plans = [StagePlan(name=f"s{i}", train=Path("x"), max_tokens=8, temperature=1.0, filters=f) for i, f in enumerate(filters)]
    names = sets or [["a", "b", "c", "d", "e"]] * len(plans)
    return Prompts(plans, [prompts_of(*of_stage) for of_stage in names], seed=3, shuffle=shuffle, max_requeues=1)


def outcome(group: int, problem: str, iteration: int, passed: int, *, state: TerminalState = "trained", samples: int = 4) -> GroupOutcome:
    return GroupOutcome(
        group_id=group, iteration=iteration, purpose="train", problem_id=problem, state=state, reason="", num_samples=samples,
        num_passed=passed, mean_score=passed / max(samples, 1), oldest_version=0, newest_version=0, in_batch=state in ("trained", "filtered"),
    )  # fmt: skip


def draw(prompts: Prompts, group: int, iteration: int, max_staleness: int = 1) -> Drawn:
    drawn = prompts.next(iteration, max_staleness)
    prompts.take(group, drawn)
    return drawn


def name(drawn: Drawn) -> str:
    return drawn.prepared.problem.problem_id


@pytest.mark.parametrize(
    ("filters", "results", "kept"),
    [
        ({"drop_solved": True}, [], True),
        ({"drop_solved": True}, [(0, 4, 4)], False),
        ({"drop_solved": True}, [(0, 4, 4), (0, 4, 3)], True),
        ({"drop_solved": True}, [(0, 4, 4), (1, 4, 4)], False),
        ({"solved_at_most": (6, 16)}, [(0, 16, 6)], True),
        ({"solved_at_most": (6, 16)}, [(0, 16, 7)], False),
        ({"solved_at_most": (6, 16)}, [(0, 16, 16), (1, 16, 2)], True),
        ({"solved_at_most": (6, 16)}, [(0, 8, 3)], True),
        ({"solved_at_most": (6, 16)}, [(0, 8, 4)], False),
        ({"solved_at_most": (0, 4)}, [], True),
        ({}, [(0, 4, 4)], True),
    ],
)
def test_filters(filters: dict[str, Any], results: list[tuple[int, int, int]], kept: bool) -> None:
    """What counts for drop_solved is the stage before (0 for stage 1), for solved_at_most the newest samples of all stages."""
    known = [Result(stage, 0, samples, passed) for stage, samples, passed in results]
    assert keeps(StageFilters(**filters), known, 1) is kept


def test_a_stage_begins_with_its_problems_and_only_when_enough_is_known() -> None:
    prompts = make(StageFilters(), StageFilters(drop_solved=True), sets=[["a", "b", "c", "d"], ["d", "c", "b", "a", "z"]])
    first = [draw(prompts, n, n // GROUPS) for n in range(8)]
    assert [name(d) for d in first] == ["a", "b", "c", "d"] * 2
    prompts.starts = [0, 2]  # as told with version 1
    assert not prompts.knows_all(2, version=1, taken=4)
    for group, passed in ((0, 4), (1, 3), (2, 4)):
        prompts.end(outcome(group, name(first[group]), 0, passed))
    assert not prompts.knows_all(2, version=1, taken=4), "one group of batch 0 was not heard of"
    prompts.end(outcome(3, "d", 0, 0))
    prompts.end(outcome(4, "b", 1, 4))  # iteration 1 is not certain to be trained when groups for 2 begin: it does not count
    assert prompts.knows_all(2, version=1, taken=4)
    assert [name(draw(prompts, 8 + n, 2)) for n in range(4)] == ["d", "b", "z", "d"]
    entered = list(prompts.entered)
    assert [(e.stage, e.name, e.iteration, e.problems, e.of) for e in entered] == [(0, "s0", 0, 4, 4), (1, "s1", 2, 3, 5)]


def test_a_filter_that_leaves_nothing_leaves_everything_and_says_so() -> None:
    prompts = make(StageFilters(), StageFilters(drop_solved=True), sets=[["a"], ["a"]])
    draw(prompts, 0, 0)
    prompts.end(outcome(0, "a", 0, 4))
    prompts.starts = [0, 2]
    assert name(draw(prompts, 1, 2)) == "a"
    assert prompts.entered[-1].problems == 0


def test_what_was_given_up_comes_back_once_and_first_unless_its_stage_no_longer_has_it() -> None:
    prompts = make(StageFilters(), StageFilters(), sets=[["a", "b", "c", "d"], ["b", "y"]])
    drawn = [draw(prompts, n, 0) for n in range(3)]
    prompts.end(outcome(0, "a", 0, 0, state="dropped", samples=0))
    prompts.end(outcome(1, "b", 0, 0, state="rejected"))
    prompts.end(outcome(2, "c", 0, 0, state="failed"))
    again = draw(prompts, 3, 0)
    assert (name(again), again.requeues, drawn[0].requeues) == ("a", 1, 0)
    prompts.end(outcome(3, "a", 0, 0, state="superseded"))
    prompts.starts = [0, 1]
    later = [draw(prompts, 4 + n, 1) for n in range(3)]
    assert [(name(d), d.stage, d.requeues) for d in later] == [("b", 1, 1), ("b", 1, 0), ("y", 1, 0)], (
        "a was given up twice; b is in both stages"
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_restarted_dispatcher_goes_on_with_the_same_prompts(seed: int) -> None:
    """From the issue log and the terminal states, at any moment of a run with stages, filters and groups that are given up."""
    chance = random.Random(seed)
    filters = (StageFilters(), StageFilters(solved_at_most=(2, 4)), StageFilters(drop_solved=True))
    names = [f"p{i}" for i in range(12)]
    prompts = make(*filters, sets=[names] * 3, shuffle=True)
    issues, outcomes, open_groups = [], [], {}
    for group in range(60):
        iteration = group // GROUPS
        if iteration + 1 in (4, 9):
            prompts.starts = [0, 4, 9][: (4, 9).index(iteration + 1) + 2]
        drawn = draw(prompts, group, iteration)
        open_groups[group] = (name(drawn), iteration)
        issues.append(Issue(
            group_id=group, attempt=0, iteration=iteration, purpose="train", problem_id=name(drawn), generator="g", issued_s=0.0,
            stage=drawn.stage, requeues=drawn.requeues,
        ))  # fmt: skip
        for done in sorted(open_groups):
            problem, due = open_groups[done]
            if due < iteration or chance.random() < 0.1:  # what is trained before S = 1 iterations ago has ended
                state = chance.choice(["trained", "trained", "filtered", "dropped", "rejected"])
                ended = outcome(done, problem, due, chance.randint(0, 4), state=state)  # type: ignore[arg-type]
                prompts.end(ended)
                outcomes.append(ended)
                del open_groups[done]
        if chance.random() < 0.2:
            other = make(*filters, sets=[names] * 3, shuffle=True)
            chance.shuffle(outcomes)
            other.restore(issues, [Stage(e.stage, e.name, e.iteration, e.problems, e.of, e.kept) for e in prompts.entered])
            for ended in outcomes:
                other.end(ended)
            other.settle()
            label = group // GROUPS
            assert sorted((name(d), d.requeues) for d in other._returned) == sorted((name(d), d.requeues) for d in prompts._returned)
            assert other._fresh == prompts._fresh
            assert {s: [p.problem.problem_id for p in kept] for s, kept in other._entered.items()} == {
                s: [p.problem.problem_id for p in kept] for s, kept in prompts._entered.items()
            }
            if not prompts._returned:
                assert name(other.next(label, 1)) == name(prompts.next(label, 1))
