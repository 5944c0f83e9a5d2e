"""Sizes of fleets: what may be asked for, who comes, who leaves, and when reward actors follow their queue."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from protocol.errors import ConfigError
from rlsys.config import RunConfig, parse_config
from rlsys.scaling import QueueRule, leavers, newcomers, parse_sizes, resized, sizes_of
from tests.configuration import minimal


def config(tmp_path: Path, **changes: object) -> RunConfig:
    return parse_config({**minimal(tmp_path), **changes}, "test")


def test_sizes_are_read_and_faults_are_named() -> None:
    assert parse_sizes(["generators=3", "learner=2"]) == {"generators": 3, "learner": 2}
    for words in (["generators"], ["generators=many"], ["generators=-1"], ["teachers=2"], ["rewarders=1", "rewarders=2"]):
        with pytest.raises(ConfigError, match=r"expected FLEET=COUNT|stands twice"):
            parse_sizes(words)
    with pytest.raises(ConfigError, match=r"generators=999999999999\.\.\.: a fleet has at most 4096 processes"):
        parse_sizes(["generators=" + "9" * 30])


def test_a_resized_configuration_keeps_all_else_and_its_rules(tmp_path: Path) -> None:
    before = config(tmp_path)
    after = resized(before, {"generators": 5, "rewarders": 2})
    assert sizes_of(after) == {"generators": 5, "rewarders": 2, "learner": 1}
    assert resized(after, sizes_of(before)) == before
    with pytest.raises(ConfigError, match="rewarders=0: at least 1 is needed"):
        resized(before, {"rewarders": 0})
    with pytest.raises(ConfigError, match=r"scale: learner\.ranks is 3 but an iteration has only 2 groups"):
        resized(before, {"learner": 3})
    with pytest.raises(ConfigError, match=r"learner\.commit_every is 0: nothing is committed"):
        resized(config(tmp_path, learner={"commit_every": 0}), {"learner": 2})
    with pytest.raises(ConfigError, match=r"scale: generators\.count is 100000.*4096"):
        resized(before, {"generators": 100_000})
    limited = config(tmp_path, rewarders={"count": 2, "min": 1, "max": 4})
    with pytest.raises(ConfigError, match=r"count is 5, expected a number from min \(1\) to max \(4\)"):
        resized(limited, {"rewarders": 5})


def test_limits_come_in_pairs_around_the_count(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rewarders: max is missing"):
        config(tmp_path, rewarders={"min": 1})
    with pytest.raises(ConfigError, match="count is 1, expected a number from min"):
        config(tmp_path, rewarders={"min": 2, "max": 3})


def test_after_any_changes_the_fleet_has_its_size_and_no_index_is_used_twice() -> None:
    rng = random.Random(0)
    staying, going = {0}, set[int]()
    for _ in range(500):
        wanted = rng.randint(1, 6)
        used = staying | going
        if wanted > len(staying):
            fresh = newcomers(used, len(staying), wanted)
            assert not used & set(fresh)
            staying |= set(fresh)
        else:
            gone = leavers(staying, wanted)
            assert all(index > rest for index in gone for rest in staying - set(gone)), "the first ones stay"
            staying -= set(gone)
            going |= set(gone)
        assert len(staying) == wanted
        going -= {index for index in going if rng.random() < 0.5}


def simulate(rule: QueueRule, arrivals: list[int], per_actor: int) -> list[int]:
    """Seconds of a queue that `count` actors work off, each `per_actor` a second; the sizes over time."""
    count, queue, sizes = rule.low, 0, []
    for second, new in enumerate(arrivals):
        queue += new
        busy = min(queue, count * rule.concurrency)
        count = rule.wanted(count, queue - busy, busy, float(second))
        queue = max(0, queue - count * per_actor)
        sizes.append(count)
    return sizes


def test_reward_actors_follow_the_queue_within_limits_and_do_not_swing() -> None:
    sizes = simulate(QueueRule(1, 8, 4, 10.0), [24] * 300 + [0] * 600, per_actor=4)
    assert min(sizes) == 1 and max(sizes) <= 8
    assert max(sizes[:300]) >= 6, "six actors are needed for what arrives"
    assert sizes[-1] == 1, "and one when nothing does"
    busy = sizes[150:300]
    assert max(busy) - min(busy) <= 2
    assert simulate(QueueRule(2, 4, 1, 5.0), [100] * 100, per_actor=1)[-1] == 4


def test_a_short_burst_changes_nothing() -> None:
    assert set(simulate(QueueRule(1, 8, 4, 10.0), ([40] + [0] * 19) * 10, per_actor=8)) == {1}
