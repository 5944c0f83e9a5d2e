"""Schedules with the real processes: what is late is dropped or trained later, within the bound, and everything that was issued ends."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protocol.ledger import Ledger
from protocol.messages import token_versions
from tests.system.conftest import Run
from tests.system.test_ring import records, trajectories


def outcomes(run: Run) -> dict[int, Any]:
    """Terminal states of training groups; each that was issued has one."""
    ledger = Ledger(run.path / "ledger.sqlite")
    ended = {o.group_id: o for o in ledger.outcomes() if o.purpose == "train"}
    assert ledger.open_groups() == {}
    ledger.close()
    return ended


def requeued(run: Run) -> list[tuple[str, int]]:
    with sqlite3.connect(run.path / "ledger.sqlite") as db:
        rows: list[tuple[str, int]] = db.execute("SELECT problem_id, requeues FROM issued WHERE requeues > 0").fetchall()
    db.close()
    return rows


@pytest.mark.parametrize("policy", ["drop", "mask"])
def test_a_late_group_holds_nobody_up(
    config: dict[str, Any], start: Callable[..., Run], tmp_path: Path, problems: Path, policy: str
) -> None:
    """The rewards of group 0 hang until two iterations were trained, those of group 12 for ever. A batch may pass by one that is late."""
    gates = [tmp_path / "first", tmp_path / "second"]
    lines = (problems / "train.jsonl").read_text().splitlines()
    held, second = json.loads(lines[0])["id"], json.loads(lines[12])["id"]
    config |= {"iterations": 5, "evaluation": {"at_start": False, "at_end": False}}
    config["data"]["shuffle"] = False
    config["schedule"] = {"name": "bounded", "max_staleness": 2, "stragglers": policy, "quorum": 0.7}
    options = {"gates": {held: str(gates[0]), second: str(gates[1])}}
    config["rewarders"] = {"reward": "tests.system.rewards:HoldingReward", "concurrency": 16, "options": options}
    config["learner"]["zero_variance"] = "keep"
    run = start(config, "--json")
    try:
        run.until(lambda status: status.get("iteration", 0) >= 2, "two iterations")
        gates[0].touch()
        assert run.wait() == 0, run.err
    finally:
        gates[0].touch()
        gates[1].touch()

    ended = outcomes(run)
    first = ended[0]
    assert first.problem_id == held
    if policy == "drop":
        assert (first.state, first.iteration, first.reason) == ("dropped", 0, "not complete when batch 0 closed")
        assert (held, 1) in requeued(run)
    else:
        assert (first.state, first.iteration) == ("trained", 2), "in the first open iteration after it was complete"
        assert sum(r.get("data/groups_late", 0) for r in records(run)) >= 1
        assert (ended[12].state, ended[12].reason) == ("unfinished", "the run had its last batch")
    given_up = {o.problem_id for o in ended.values() if o.state in ("dropped", "rejected")}
    assert {problem for problem, _ in requeued(run)} <= given_up
    trained = [o for o in ended.values() if o.state == "trained"]
    assert {o.iteration for o in trained} == set(range(5))
    for t in trajectories(run.path):
        outcome = ended[t.group_id]
        if outcome.state == "trained":
            versions = token_versions(t.spans)
            assert versions.max() <= outcome.iteration
            assert versions.min() >= outcome.iteration - 2 or policy == "mask"
    numbers = [r for r in records(run) if "reward/mean" in r]
    assert max(r["staleness/max"] for r in numbers) <= 2
    assert sum(r["data/groups_dropped"] for r in numbers) == sum(o.state == "dropped" for o in ended.values())


def test_minibatches_and_refill(config: dict[str, Any], start: Callable[..., Run]) -> None:
    """Two optimizer steps per version, on groups as they come, and groups that failed are replaced until enough are there."""
    config |= {"iterations": 3, "evaluation": {"at_start": False, "at_end": False}}
    config["schedule"] = {"name": "minibatch", "minibatches": 2}
    config["rewarders"] = {"reward": "tests.system.rewards:FaultyReward", "retries": 0}
    config["learner"] |= {"zero_variance": "refill", "refill_rounds": 50}
    run = start(config, "--json")
    assert run.wait() == 0, run.err
    ended = outcomes(run)
    trained = [o for o in ended.values() if o.state == "trained"]
    failed = [o for o in ended.values() if o.state == "failed"]
    assert sorted(o.iteration for o in trained) == [0] * 4 + [1] * 4 + [2] * 4, "every place was filled"
    assert failed
    assert not any(o.in_batch for o in failed)
    numbers = [r for r in records(run) if "reward/mean" in r]
    assert [r["train/updates"] for r in numbers] == [2, 2, 2]
    assert max(r["staleness/max"] for r in numbers) == 0
    assert sum(r["data/groups_replaced"] for r in numbers) <= len(failed), "those of the last moment belong to no batch"
