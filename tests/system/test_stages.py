"""configs/stages_tiny.yaml with the real processes: each sample is of its stage, and the stages can be computed again from the ledger."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from learner.stages import StageClock
from protocol.ledger import Ledger
from rlsys.config import load_config
from rlsys.stages import stage_rules
from tests.system.conftest import Run
from tests.system.test_ring import records, trajectories

TINY = Path(__file__).parent.parent.parent / "configs" / "stages_tiny.yaml"


def test_stages_change_samples_and_steps_and_stand_in_the_ledger(
    config: dict[str, Any], start: Callable[..., Run], tiny_model: Path, problems: Path
) -> None:
    content = yaml.safe_load(TINY.read_text())
    content["model"]["path"], content["data"]["train"] = str(tiny_model), str(problems / "train.jsonl")
    content |= {"rewarders": config["rewarders"], "deadlines": config["deadlines"]}
    content["learner"] |= config["learner"] | {"optimizer": content["learner"]["optimizer"]}
    run = start(content, "--json")
    assert run.wait() == 0, run.err

    ledger = Ledger(run.path / "ledger.sqlite")
    stages, outcomes = ledger.stages(), ledger.outcomes()
    ledger.close()
    with sqlite3.connect(run.path / "ledger.sqlite") as db:
        issued = dict(db.execute("SELECT group_id, stage FROM issued"))
        labels = dict(db.execute("SELECT group_id, iteration FROM issued"))
    db.close()
    resolved = load_config(run.path / "config.yaml")
    clock = StageClock(stage_rules(resolved), iterations=9, max_staleness=1)
    for iteration in range(9):
        clock.close(iteration, [o for o in outcomes if o.iteration == iteration])
    assert [(stage.stage, stage.name, stage.iteration) for stage in stages] == [
        (i, ("short", "medium", "long")[i], iteration) for i, iteration in enumerate(clock.starts)
    ]
    assert clock.starts[:2] == [0, 3]
    assert clock.starts[2] in (6, 5), "at iteration 6, or as soon as completions of two iterations were cut off"
    assert issued == {group: clock.stage_of(label) for group, label in labels.items()}

    for t in trajectories(run.path):
        assert t.stage == issued[t.group_id]
        assert (t.max_tokens, t.temperature) == [(40, 1.0), (60, 1.0), (80, 0.9)][t.stage]
        assert len(t.token_ids) <= t.max_tokens
    numbers = [r for r in records(run) if "reward/mean" in r]
    assert [r["train/stage"] for r in numbers] == [clock.stage_of(k) for k in range(9)]
    assert [r["train/lr"] for r in numbers] == [[5e-4, 2e-4, 5e-4][clock.stage_of(k)] for k in range(9)]
    assert [r["stage"] for r in records(run) if r.get("event") == "stage"] == ["short", "medium", "long"]
