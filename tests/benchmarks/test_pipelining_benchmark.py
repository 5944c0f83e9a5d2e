"""The pipelining benchmark: its runs are those that were predicted, and its rows say how far they are from their limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import pipelining
from benchmarks.pipelining import COLOCATED, SCHEDULES, choose, configuration, in_units, model, profile, report, splits, with_slots
from benchmarks.stragglers import with_stragglers
from rlsys.planning.figures import read_figures
from rlsys.planning.limits import Split


def test_counting_tokens_in_units_changes_no_time() -> None:
    figures = with_slots(read_figures(pipelining.PROFILES / "pair.yaml"), 64)
    split = Split(generators=1, trainers=1)
    seconds = [model(f, "one_off", split, 6).s_per_iteration for f in (figures, in_units(figures, 10))]
    assert seconds[1] == pytest.approx(seconds[0], rel=0.002)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_a_setting_becomes_a_run_of_that_fleet(schedule: str) -> None:
    figures = profile("slow-rewards", None)
    setting = replace(choose(figures, schedule, iterations=4), generators=2.5, trainers=5.5)
    config = configuration(figures, setting, 50.0)
    assert config.generators.count == 3 and config.generators.options["device_shares"] == [1.0, 1.0, 0.5]
    assert config.rewarders.count * config.rewarders.concurrency == figures.reward.sandboxes
    assert config.learner.step_options["devices"] == 5.5
    assert config.learner.step_options["fixed_s"] == (20.0 if schedule == COLOCATED else 0.0)
    assert config.schedule.bound == pipelining.settings(schedule).bound


def test_splits_use_every_device() -> None:
    figures = profile("four", None)
    assert [str(s) for s in splits(figures, "one_off", shared=False)] == ["1+3", "2+2", "3+1"]
    assert [str(s) for s in splits(figures, "one_off", shared=True)] == ["1+3", "1.5+2.5", "2+2", "2.5+1.5", "3+1"]
    assert [str(s) for s in splits(figures, COLOCATED, shared=False)] == ["4+4"]


def test_a_row_compares_with_the_limits_of_the_lengths_that_were_drawn(tmp_path: Path) -> None:
    figures = profile("pair", None)
    setting = choose(figures, "one_off", iterations=6)
    sized = with_slots(figures, setting.slots)
    row = report(sized, setting, {"measured_s": setting.predicted_s * 1.25})
    assert (row["of_model"], row["prediction_error"]) == pytest.approx((0.8, -0.2))
    assert row["of_tightest"] >= max(row["of_model"], row["of_limit"]) * (1 - 1e-9)
    assert row["of_fluid"] < 1


def test_a_straggler_takes_three_iterations() -> None:
    figures = with_stragglers(profile("math", None), 200.0)
    assert (figures.lengths.straggler_tokens or 0) / figures.sampling.tokens_per_s_sample == pytest.approx(600)
    assert figures.lengths.straggler_share == pytest.approx(1 / 200)
