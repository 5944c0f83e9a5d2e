"""Many generators, each a process of its own, on one dispatcher and one learner: benchmarks/many_generators.py with twenty of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.many_generators import GROUP_SIZE, measure
from tests.system.test_ring import trajectories


@pytest.mark.slow
def test_twenty_generators_all_work_and_nothing_is_lost(tmp_path: Path) -> None:
    run = tmp_path / "r" / "run"
    figures = measure(run, generators=20, rate=60.0, tokens=32, rewarders=2, seconds=20.0, start_s=400.0)
    assert figures["audit"]["lost"] == figures["audit"]["doubled"] == figures["audit"]["too_stale"] == 0, figures["audit"]
    assert figures["restarts"] == 0 and figures["audit"]["reissued"] == 0
    samples = trajectories(run)
    assert {t.generator for t in samples} == {f"generator-{i}@1" for i in range(20)}
    assert len({(t.group_id, t.index) for t in samples}) == len(samples) >= 20 * GROUP_SIZE
    assert figures["samples_per_s"] > 0 and set(figures["memory_bytes"]) == {"dispatcher-0", "learner-0", "dashboard-0", "supervisor"}
