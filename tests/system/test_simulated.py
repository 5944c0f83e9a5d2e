"""A simulated run is a run: real processes, journal and ledger, in which sampling, rewards and training only take their time."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.engines.lengths import LengthOptions, Lengths
from rlsys.report import read_iterations
from tests.system.conftest import Run
from tests.system.test_ring import trajectories

CONFIG = Path(__file__).parent.parent.parent / "configs" / "simulated.yaml"


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The shipped configuration, faster and smaller: 5 iterations of 8 groups x 4 samples on 2 devices."""
    monkeypatch.setenv("RLSYS_CACHE", str(tmp_path / "cache"))
    content: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    content["iterations"] = 5
    content["sampling"] |= {"groups_per_iteration": 8, "group_size": 4}
    content["generators"]["count"] = 2
    for options in (content["generators"]["options"], content["rewarders"]["options"], content["learner"]["step_options"]):
        options["speed"] = 400
    content["learner"]["step_options"]["devices"] = 1
    return content


def test_every_simulated_sample_is_accounted_for_and_none_is_stale(simulated: dict[str, Any], start: Callable[..., Run]) -> None:
    simulated["generators"]["engine"] = "tests.system.gated:AwaitsSwap"
    run = start(simulated, "--json")
    assert run.wait() == 0, run.err
    figures = json.loads(run.out.splitlines()[-1])
    assert (figures["outcome"], figures["iterations"], figures["staleness_max"]) == ("done", 5, 1)
    assert figures["mixed_share"] > 0, "no weights were swapped in while samples ran"

    samples = trajectories(run.path)
    assert {(t.group_id, t.index) for t in samples} == {(g, i) for g in range(40) for i in range(4)}
    lengths = Lengths(LengthOptions.model_validate(simulated["generators"]["options"]["lengths"]))
    ledger = sqlite3.connect(run.path / "ledger.sqlite")
    assert ledger.execute("SELECT state, COUNT(*) FROM ended GROUP BY 1").fetchall() == [("trained", 40)]
    ledger.close()
    assert all(t.iteration - 1 <= int(t.spans[0, 0]) <= int(t.spans[-1, 0]) <= t.iteration for t in samples)
    longest = max(lengths.quantile(1.0) for _ in samples)
    assert all(1 <= len(t.token_ids) <= longest and t.finish_reason in ("stop", "length") for t in samples)
    # nobody is faster than the model: a sample takes at least its tokens at the rate of one that runs alone
    assert all(t.finished_s - t.started_s >= len(t.token_ids) / (110 * 400) - 1e-3 for t in samples)

    records = read_iterations(run.path)
    trained = sum(record["train/tokens_trained"] for record in records)
    assert trained == sum(len(t.token_ids) + len(t.prompt_ids) for t in samples)
    assert sum(record["train/seconds"] for record in records) >= trained / 9000 / 400
