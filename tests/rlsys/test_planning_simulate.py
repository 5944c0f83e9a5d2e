"""The simulation by events: exact where it can be worked out by hand, never faster than its limits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.settings import ScheduleSettings
from rlsys.planning.figures import Figures
from rlsys.planning.limits import Split, drawn_load, schedule_limit
from rlsys.planning.simulate import shares, simulate, simulate_colocated, steady

SYNCHRONOUS, ONE_OFF = ScheduleSettings(name="synchronous"), ScheduleSettings(name="one_off")


def figures(**changes: Any) -> Figures:
    content = {
        "devices": 4,
        "groups_per_iteration": 10,
        "group_size": 4,
        "lengths": {"mean": 100, "sigma": 0},
        "sampling": {"tokens_per_s_sample": 10, "tokens_per_s": 1000, "slots": 64},
        "training": {"tokens_per_s": 400},
    }
    return Figures.model_validate({**content, **changes})


def test_synchronous_is_the_sum_of_its_parts() -> None:
    """40 samples of 100 tokens at 10 per second: 10 s; a reward of 3 s; 4,000 tokens on one learner device: 10 s."""
    out = simulate(figures(reward={"seconds": 3, "sandboxes": 40}), Split(generators=2, trainers=1), SYNCHRONOUS, iterations=5)
    assert out.published == pytest.approx([0, 23, 46, 69, 92, 115])
    assert out.staleness_max == 0
    assert out.learner_shares() == pytest.approx({"train": 10 / 23, "waiting:samples": 10 / 23, "waiting:rewards": 3 / 23})
    assert out.generator_shares() == pytest.approx({"sampling": 10 / 23, "idle:pacing": 13 / 23})


def test_one_off_overlaps_what_the_bound_allows() -> None:
    """Batches of 0 and 1 are sampled first; then sampling (10 s) hides behind training (10 s)."""
    out = simulate(figures(), Split(generators=2, trainers=1), ONE_OFF, iterations=8)
    assert out.s_per_iteration == pytest.approx(10)
    assert out.staleness_max == 1
    assert out.generator_shares()["sampling"] == pytest.approx(1.0)
    assert out.learner_shares()["train"] == pytest.approx(1.0)


def test_rewards_queue_for_sandboxes() -> None:
    """40 samples of 3 s on 10 sandboxes: 12 s after all are sampled at once."""
    out = simulate(figures(reward={"seconds": 3, "sandboxes": 10}), Split(generators=2, trainers=1), SYNCHRONOUS, iterations=4)
    assert out.s_per_iteration == pytest.approx(10 + 12 + 10)


def test_colocated_uses_every_device_for_each_part_and_switches_twice() -> None:
    out = simulate_colocated(figures(switch_s=2), iterations=4)
    assert out.s_per_iteration == pytest.approx(10 + 2 + 2.5 + 2)


def test_updates_stall_the_generators() -> None:
    sampling = {"tokens_per_s_sample": 10, "tokens_per_s": 1000, "slots": 64, "update_s": 4}
    out = simulate(figures(sampling=sampling), Split(generators=2, trainers=1), SYNCHRONOUS, iterations=4)
    assert out.s_per_iteration == pytest.approx(4 + 10 + 10)
    assert out.generator_shares()["update"] == pytest.approx(4 / 24)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.floats(0.0, 1.2), st.sampled_from([4, 16, 64]), st.floats(0, 40))
def test_no_schedule_beats_its_limit(generators: int, trainers: int, staleness: int, sigma: float, slots: int, reward_s: float) -> None:
    one = figures(
        lengths={"mean": 300, "sigma": sigma, "cap": 2000},
        sampling={"tokens_per_s_sample": 20, "tokens_per_s": 300, "slots": slots},
        reward={"seconds": reward_s, "sandboxes": 8},
    )
    split = Split(generators=generators, trainers=trainers)
    schedule = ScheduleSettings(name="bounded", max_staleness=staleness) if staleness else SYNCHRONOUS
    out = simulate(one, split, schedule, iterations=10)
    assert out.staleness_max <= staleness
    total = sum(out.learner_shares().values()), sum(out.generator_shares().values())
    assert total == pytest.approx((1.0, 1.0), abs=1e-6)
    whole = drawn_load(one, 0, 0, 10)
    at_least = schedule_limit(one, whole, split, staleness)
    assert out.published[-1] >= 10 * max(at_least.sampling, at_least.training, at_least.scoring) * (1 - 1e-9)


def test_parts_that_share_cores_slow_each_other_down() -> None:
    """Alone 10 s of sampling on 2 devices and 10 s of training: one at a time takes no longer on 2 cores, all three at once half as long again."""
    alone = simulate(figures(cores=2), Split(generators=2, trainers=1), SYNCHRONOUS, iterations=4)
    assert alone.s_per_iteration == pytest.approx(20)
    assert simulate(figures(cores=1), Split(generators=2, trainers=1), SYNCHRONOUS, iterations=4).s_per_iteration == pytest.approx(30)
    together = simulate(figures(cores=2), Split(generators=2, trainers=1), ONE_OFF, iterations=8)
    assert together.s_per_iteration == pytest.approx(15)
    assert together.learner_shares()["train"] == pytest.approx(1.0)


def test_rewards_and_what_passes_samples_on_need_cores_too() -> None:
    """On one core everything happens in turn: 2 generators for 10 s, 40 samples scored for 0.5 s and passed on for 0.25 s, 10 s of training."""
    one = figures(cores=1, ring_s=0.25, reward={"seconds": 0.5, "sandboxes": 40})
    out = simulate(one, Split(generators=2, trainers=1), ONE_OFF, iterations=8)
    assert out.s_per_iteration == pytest.approx(2 * 10 + 40 * 0.75 + 10)
    assert simulate(one, Split(generators=2, trainers=1), SYNCHRONOUS, iterations=8).s_per_iteration == pytest.approx(60)
    colocated = simulate_colocated(figures(cores=2, devices=4, ring_s=0.25), iterations=8)
    assert colocated.s_per_iteration == pytest.approx((4 * 10 + 40 * 0.25 + 4 * 2.5) / 2, rel=0.15)


def test_every_rank_and_thread_needs_a_core_and_a_judge_elsewhere_needs_none() -> None:
    """Alone 10 s of sampling and, on two ranks, 5 s of training."""
    split = Split(generators=1, trainers=2)
    assert simulate(figures(cores=2), split, SYNCHRONOUS, iterations=4).s_per_iteration == pytest.approx(10 + 5)
    assert simulate(figures(cores=1), split, SYNCHRONOUS, iterations=4).s_per_iteration == pytest.approx(10 + 2 * 5)
    threads = figures(cores=2, sampling={"tokens_per_s_sample": 10, "tokens_per_s": 100, "slots": 10, "cores": 4})
    plain = figures(cores=2, sampling={"tokens_per_s_sample": 10, "tokens_per_s": 100, "slots": 10})
    alone, slowed = (simulate(one, Split(generators=1, trainers=1), SYNCHRONOUS, iterations=4).s_per_iteration for one in (plain, threads))
    assert slowed - 10 == pytest.approx(2 * (alone - 10)), "four threads on two cores take twice as long; training the same 10 s"
    judge = {"seconds": 7, "sandboxes": 40}
    elsewhere = simulate(figures(cores=1, reward={**judge, "cores": 0}), split, SYNCHRONOUS, iterations=4).s_per_iteration
    assert elsewhere == pytest.approx(10 + 7 + 2 * 5)
    here = simulate(figures(cores=1, reward=judge), split, SYNCHRONOUS, iterations=4).s_per_iteration
    assert here == pytest.approx(10 + 40 * 7 + 2 * 5)


def test_the_share_of_the_full_rate_is_that_of_full_slots() -> None:
    """Ten slots, 100 tokens/s without end: full slots give 10 / (1 / 10 + 9 / 100) = 52.6 tokens/s, which sampling alone reaches."""
    sampling = {"tokens_per_s_sample": 10, "tokens_per_s": 100, "slots": 10, "additive": True}
    split, bounded = Split(generators=1, trainers=1), ScheduleSettings(name="bounded")
    out = simulate(figures(sampling=sampling), split, bounded, iterations=16)
    assert out.sampling_share() == pytest.approx(1.0, rel=0.02)
    few = simulate(figures(sampling={**sampling, "additive": False, "slots": 5}), split, bounded, iterations=16)
    assert few.sampling_share() == pytest.approx(1.0, rel=0.02), "5 slots of 10 tokens/s each never reach 100"


def test_what_passes_samples_on_costs_nothing_where_devices_are_their_own() -> None:
    out = simulate(figures(ring_s=5), Split(generators=2, trainers=1), SYNCHRONOUS, iterations=4)
    assert out.s_per_iteration == pytest.approx(20)


def test_the_steady_part_lies_inside_the_run() -> None:
    for iterations in range(1, 12):
        for staleness in range(4):
            first, last = steady(iterations, staleness)
            assert 0 <= first < last <= iterations


def test_shares_of_a_window() -> None:
    assert shares([(0, 4, "a"), (4, 6, "b"), (8, 20, "a")], 2, 10, rest="c") == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.25})
