"""The limits against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actors.dispatcher import sample_seed
from actors.engines.lengths import Lengths
from rlsys.planning.figures import Figures
from rlsys.planning.limits import (
    Load,
    Split,
    best_split_share,
    colocated_limit_s,
    drawn_load,
    expected_load,
    fluid_limit_s,
    schedule_limit,
)


def figures(**changes: Any) -> Figures:
    """1,000 samples; one device samples 1,000 tokens per second and trains 2,000."""
    content = {
        "devices": 4,
        "groups_per_iteration": 100,
        "group_size": 10,
        "lengths": {"mean": 100, "sigma": 0},
        "sampling": {"tokens_per_s_sample": 10, "tokens_per_s": 1000, "slots": 100},
        "training": {"tokens_per_s": 2000},
    }
    return Figures.model_validate({**content, **changes})


LOAD = Load(tokens=100_000, longest=400)


def test_each_term_of_the_schedule_limit() -> None:
    limit = schedule_limit(figures(), LOAD, Split(generators=3, trainers=1), 1)
    assert limit.sampling == pytest.approx(100 / 3)  # 100,000 tokens at 1,000 per second on 3 devices
    assert limit.training == pytest.approx(50)
    assert limit.scoring == 0
    assert limit.latency == pytest.approx((40 + 50) / 2)  # 400 tokens alone at 10 per second, then the step; two iterations under way
    assert limit.seconds == limit.training and limit.bound == "training"


def test_a_larger_bound_hides_latency_until_a_fleet_is_the_limit() -> None:
    one = figures(reward={"seconds": 30, "sandboxes": 1000})
    found = [schedule_limit(one, LOAD, Split(generators=3, trainers=1), s) for s in range(4)]
    assert [limit.latency for limit in found] == pytest.approx([120, 60, 40, 30])
    assert [limit.seconds for limit in found] == pytest.approx([120, 60, 50, 50])
    assert found[0].scoring == 30  # 1,000 samples x 30 s in 1,000 sandboxes


def test_shared_cores_are_a_limit_of_their_own() -> None:
    """100 s of sampling, 50 s of training, 1,000 samples scored for 0.2 s and passed on for 0.05 s: 400 s of work."""
    one = figures(cores=2, ring_s=0.05, reward={"seconds": 0.2, "sandboxes": 1000})
    limit = schedule_limit(one, LOAD, Split(generators=3, trainers=1), 1)
    assert limit.cores == pytest.approx(200) and limit.bound == "cores"
    assert fluid_limit_s(one, LOAD) == pytest.approx(200)
    assert fluid_limit_s(figures(), LOAD) == pytest.approx(150 / 4)


def test_a_batch_takes_at_least_its_work_on_all_generators() -> None:
    limit = schedule_limit(figures(), Load(tokens=100_000, longest=100), Split(generators=1, trainers=3), 0)
    assert limit.latency == pytest.approx(100 + 50 / 3)


def test_updates_prompts_and_fixed_parts_count() -> None:
    one = figures(
        prompt_tokens=50,
        sampling={"tokens_per_s_sample": 10, "tokens_per_s": 1000, "slots": 100, "update_s": 2, "prefill_tokens_per_s": 500},
        training={"tokens_per_s": 2000, "fixed_s": 3, "publish_s": 4, "trained_share": 0.5},
    )
    limit = schedule_limit(one, LOAD, Split(generators=2, trainers=2), 1)
    assert limit.sampling == pytest.approx((100 + 100 * 50 / 500) / 2 + 2)
    assert limit.training == pytest.approx(3 + 4 + 0.5 * (100_000 + 1000 * 50) / 2000 / 2)


def test_fluid_and_colocated() -> None:
    assert fluid_limit_s(figures(), LOAD) == pytest.approx((100 + 50) / 4)
    assert colocated_limit_s(figures(switch_s=5), LOAD) == pytest.approx(40 + 50 / 4 + 10)
    slow = figures(reward={"seconds": 6, "sandboxes": 100})
    assert colocated_limit_s(slow, LOAD) == pytest.approx(60 + 50 / 4), "1,000 samples of 6 s on 100 sandboxes take longer than sampling"


def test_whole_devices_waste_what_does_not_divide() -> None:
    """Work 100 + 50: 3 + 1 devices take 50 s, 2 + 2 take 50 s; evenly it would be 37.5 s."""
    assert best_split_share(figures(), LOAD) == pytest.approx(0.75)
    assert best_split_share(figures(devices=3), LOAD) == pytest.approx(1.0)
    assert best_split_share(figures(cores=1), LOAD) == 1.0, "150 s of work on one core, whatever the split"


def test_the_expected_load_is_the_mean_of_draws() -> None:
    one = figures(lengths={"mean": 600, "sigma": 0.9, "cap": 3200})
    expected, rng = expected_load(one), np.random.default_rng(0)
    lengths = Lengths(one.lengths)
    longest = np.mean([max(lengths.quantile(u) for u in rng.random(1000)) for _ in range(100)])
    assert expected.tokens == pytest.approx(600_000)
    assert expected.longest == pytest.approx(longest, rel=0.02)
    stragglers = figures(lengths={"mean": 600, "sigma": 0.9, "cap": 3200, "straggler_share": 0.01, "straggler_tokens": 50_000})
    assert expected_load(stragglers).longest == pytest.approx(50_000, rel=0.001)


def test_the_drawn_load_is_that_of_the_run() -> None:
    one = figures(groups_per_iteration=3, group_size=2, lengths={"mean": 600, "sigma": 0.9, "cap": 3200})
    lengths = Lengths(one.lengths)
    batches = [[lengths(sample_seed(7, group, i)) for group in range(3 * k, 3 * k + 3) for i in range(2)] for k in (1, 2)]
    assert drawn_load(one, 7, 1, 3) == Load(tokens=sum(map(sum, batches)) / 2, longest=sum(map(max, batches)) / 2)
