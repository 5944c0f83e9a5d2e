"""No interleaving of events breaks the staleness bound, loses a group, ends it twice or stands still: all schedules, policies and options.

`World` plays a whole run of the real pure parts. First hypothesis chooses every event; then everything that can still happen happens, and
the record of the run is checked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from learner.line import BatchRule, StragglerPolicy
from protocol.errors import ConfigError
from rlsys.config import parse_config
from rlsys.schedules import batch_rule, describe_schedule, pacing_rule
from tests.configuration import minimal
from tests.directories import dataset, problems, tokenizer_directory
from tests.rlsys.schedule_world import World

POLICIES: tuple[StragglerPolicy, ...] = ("wait", "drop", "mask")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More problems than any run here has groups, so that a problem that is seen twice was queued again."""
    path = tmp_path_factory.mktemp("schedules")
    tokenizer_directory(path / "model")
    dataset(path / "train.jsonl", problems(600))
    return path


@st.composite
def batch_rules(draw: st.DrawFn) -> BatchRule:
    """Every combination of the numbers that the rule knows, also those that a configuration may not have."""
    groups, bound = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    policy = draw(st.sampled_from(POLICIES))
    over_issue = draw(st.integers(0, groups))
    patient = policy == "wait" and not over_issue
    return BatchRule(
        iterations=draw(st.integers(1, 4)),
        groups_per_iteration=groups,
        max_staleness=bound,
        stragglers=policy,
        may_lag=0 if policy == "wait" or groups == 1 else draw(st.integers(1, groups - 1)),
        over_issue=over_issue,
        reorder=draw(st.integers(0, bound * groups)) if patient else 0,
        parts=draw(st.integers(1, groups)) if bound == 0 else 1,
        refills=draw(st.sampled_from([0, groups, 3 * groups])),
    )


def any_of(chance: random.Random) -> Callable[[Iterable[Any]], Any]:
    """Chooses by chance."""
    return lambda options: chance.choice(list(options))


class AnyInterleaving(RuleBasedStateMachine):
    """Hypothesis chooses what happens next, and to whom."""

    directory: Path

    @initialize(batches=batch_rules(), seed=st.integers(0, 1 << 20))
    def begin(self, batches: BatchRule, seed: int) -> None:
        self.world = World(self.directory, batches)
        self.random = random.Random(seed)

    @rule(data=st.data(), times=st.integers(1, 6))
    def happens(self, data: st.DataObject, times: int) -> None:
        """A few times the same kind of event, as far as it can happen."""
        able = self.world.enabled()
        if not able:
            return
        event = data.draw(st.sampled_from(able))
        for _ in range(times):
            if event in self.world.enabled():
                getattr(self.world, event)(lambda options: data.draw(st.sampled_from(list(options))))

    @precondition(lambda self: self.world.mishaps())
    @rule(data=st.data())
    def goes_wrong(self, data: st.DataObject) -> None:
        event = data.draw(st.sampled_from(self.world.mishaps()))
        getattr(self.world, event)(lambda options: data.draw(st.sampled_from(list(options))))

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.go_on(any_of(self.random))
            self.world.check_end()


def test_no_interleaving_breaks_a_promise(directory: Path) -> None:
    machine = type("Machine", (AnyInterleaving,), {"directory": directory})
    quick = settings(max_examples=120, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=quick)


@pytest.mark.parametrize(("over_issue", "passed", "late"), [(0, 3, 3), (2, 3, 1), (2, 2, 0), (5, 1, 0), (5, 4, 0), (5, 6, 1)])
def test_what_was_over_issued_stays_when_a_batch_drops_who_is_late(over_issue: int, passed: int, late: int) -> None:
    rule = BatchRule(
        iterations=2,
        groups_per_iteration=8,
        max_staleness=1,
        stragglers="drop",
        may_lag=2,
        over_issue=over_issue,
        reorder=0,
        parts=1,
        refills=0,
    )
    assert list(rule.late(range(passed))) == list(range(late))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("bound", "parts", "reorder"),
    [(0, 1, 0), (0, 2, 0), (1, 1, 0), (2, 1, 0), (2, 1, 3)],
    ids=["sync", "minibatch", "one_off", "bounded", "window"],
)
@pytest.mark.parametrize("over_issue", [0, 4])
@pytest.mark.parametrize("refills", [0, 8])
def test_whole_runs_under_every_schedule(
    directory: Path, policy: StragglerPolicy, bound: int, parts: int, reorder: int, over_issue: int, refills: int
) -> None:
    """Longer runs of uniformly random events, mishaps among them."""
    numbers: dict[str, Any] = {"iterations": 6, "groups_per_iteration": 4, "max_staleness": bound, "parts": parts, "refills": refills}
    numbers |= {"over_issue": over_issue, "stragglers": policy, "may_lag": 0 if policy == "wait" else 2}
    numbers["reorder"] = reorder if policy == "wait" and not over_issue else 0
    for seed in range(3):
        chance = random.Random(seed)
        world = World(directory, BatchRule(**numbers), zero_variance="refill" if refills else "drop")
        for _ in range(600):
            events = world.enabled() + (world.mishaps() if chance.random() < 0.1 else [])
            if world.dispatcher.done or not events:
                break
            getattr(world, chance.choice(events))(any_of(chance))
        world.go_on(any_of(chance))
        world.check_end()


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"name": "one_of"}, "schedule.name is 'one_of': .*did you mean one_off?"),
        ({"name": "one_off", "max_staleness": 2}, "max_staleness is 2, which means nothing here: one_off has staleness 1 by definition"),
        ({"minibatches": 2}, "minibatches is 2, which means nothing here: one_off takes an iteration's groups as one batch"),
        ({"name": "minibatch", "minibatches": 9}, "schedule.minibatches is 9 but an iteration has only 2 groups"),
        (
            {"name": "minibatch", "minibatches": 2, "stragglers": "drop", "quorum": 0.4},
            "schedule.quorum is 0.4 of 2 groups: an iteration may lack 1 of them, and the last of its 2 parts has 1: it could be empty",
        ),
        ({"reorder": 1}, "reorder is 1, which means nothing here: one_off takes groups in their order"),
        ({"name": "bounded", "stragglers": "mask", "quorum": 0.5, "reorder": 1}, "reorder is 1, which means nothing here: with stragglers"),
        ({"quorum": 0.5}, "quorum is 0.5, which means nothing here: with stragglers 'wait'"),
        ({"max_requeues": 3}, "max_requeues is 3, which means nothing here"),
        ({"name": "synchronous", "stragglers": "mask"}, "stragglers 'mask' means nothing with synchronous: at staleness 0 every token"),
        ({"stragglers": "drop"}, "schedule.quorum is 0.85 of 2 groups .* which is all of them: stragglers 'drop' would never happen"),
        ({"name": "bounded", "max_staleness": 1, "reorder": 3}, "schedule.reorder is 3: more than staleness 1 x 2 groups leaves no room"),
        ({"over_issue": 5}, "schedule.over_issue is 5, more than an iteration's 2 groups"),
    ],
)
def test_options_that_mean_nothing_together_are_refused_with_the_reason(tmp_path: Path, schedule: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(minimal(tmp_path) | {"schedule": schedule}, "test")


def test_refill_rounds_without_refill_are_refused(tmp_path: Path) -> None:
    content = minimal(tmp_path)
    content["learner"] |= {"refill_rounds": 3}
    with pytest.raises(ConfigError, match="refill_rounds is 3 but zero_variance is 'drop': nothing is refilled"):
        parse_config(content, "test")


@pytest.mark.parametrize(
    ("schedule", "learner", "numbers", "said"),
    [
        ({}, {}, {"max_staleness": 1}, "one_off: staleness at most 1"),
        ({"name": "synchronous"}, {}, {"max_staleness": 0}, "synchronous: staleness at most 0"),
        ({"name": "minibatch"}, {}, {"max_staleness": 0, "parts": 4}, "4 optimizer steps per iteration, on groups as they come"),
        ({"name": "bounded"}, {}, {"max_staleness": 2, "reorder": 0}, "bounded: staleness at most 2"),
        ({"name": "bounded", "reorder": 5}, {}, {"max_staleness": 2, "reorder": 5}, "a late group is overtaken by at most 5 others"),
        ({"name": "bounded", "max_staleness": 3, "reorder": 0}, {}, {"max_staleness": 3}, "bounded: staleness at most 3"),
        ({"stragglers": "drop"}, {}, {"stragglers": "drop", "may_lag": 3}, "closes without at most 3 late groups (drop)"),
        (
            {"stragglers": "mask", "quorum": 0.5, "over_issue": 2},
            {},
            {"stragglers": "mask", "may_lag": 10, "over_issue": 2},
            "2 groups beyond",
        ),
        ({}, {"zero_variance": "refill"}, {"refills": 80}, "filtered groups are replaced, at most 80 per iteration"),
    ],
)
def test_rules_of_a_configuration(
    tmp_path: Path, schedule: dict[str, Any], learner: dict[str, Any], numbers: dict[str, Any], said: str
) -> None:
    content = minimal(tmp_path) | {"schedule": schedule}
    content["learner"] |= learner
    content["sampling"] |= {"groups_per_iteration": 20}
    config = parse_config(content, "test")
    plain = {"max_staleness": 1, "stragglers": "wait", "may_lag": 0, "over_issue": 0, "reorder": 0, "parts": 1, "refills": 0}
    rule, pacing = batch_rule(config), pacing_rule(config)
    assert {name: getattr(rule, name) for name in plain} == plain | numbers
    assert (pacing.max_staleness, pacing.reorder, pacing.over_issue) == (rule.max_staleness, rule.reorder, rule.over_issue)
    assert (pacing.iterations, pacing.groups_per_iteration) == (rule.iterations, rule.groups_per_iteration) == (3, 20)
    assert said in describe_schedule(config)
