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
    over_issue = draw(st.integers(0, 2))
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


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("bound", "parts", "reorder"),
    [(0, 1, 0), (0, 2, 0), (1, 1, 0), (2, 1, 0), (2, 1, 3)],
    ids=["sync", "minibatch", "one_off", "bounded", "window"],
)
@pytest.mark.parametrize("over_issue", [0, 2])
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
