"""A stage that is ten times too slow, and stands still for a while: the pacing rule stops the generators, not a full socket, and no process grows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.system.conftest import Run
from tests.system.gated import GATE

CONFIG = Path(__file__).parent.parent.parent / "configs" / "simulated.yaml"
GROUPS, SIZE, ITERATIONS, SPEED = 16, 4, 16, 1000
"""At this speed an iteration under the slow stage takes 0.24 s."""
LINE = 2 * GROUPS
"""(S + 1) G groups under one_off."""
LENGTHS = {"mean": 12000, "sigma": 0.5, "cap": 32000}
"""An iteration is about 6 MB of token ids and log-probs: a process that kept them all would grow by 50 MB in the second half."""
ROOM = 16 << 20
"""Bytes by which a process may differ between the halves of a run."""


@pytest.fixture
def balanced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Two generators of few slots; reward and learner keep up with them."""
    monkeypatch.setenv("RLSYS_CACHE", str(tmp_path / "cache"))
    content: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    content["iterations"] = ITERATIONS
    content["sampling"] |= {"groups_per_iteration": GROUPS, "group_size": SIZE, "max_tokens": 32000}
    content["generators"] |= {"count": 2, "slots": 8}
    content["generators"]["options"] |= {"lengths": LENGTHS, "tokens_per_s_sample": 2000, "tokens_per_s": 16000}
    content["learner"]["step_options"] |= {"devices": 1, "tokens_per_s": 32000}
    for options in (content["generators"]["options"], content["rewarders"]["options"], content["learner"]["step_options"]):
        options["speed"] = SPEED
    return content


@pytest.mark.parametrize("slow", ["learner", "rewarder"])
def test_a_slow_stage_stops_the_generators_by_pacing_and_no_memory_grows(
    slow: str, balanced: dict[str, Any], start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    monkeypatch.setenv(GATE, str(gate))
    iteration_s = GROUPS * SIZE * LENGTHS["mean"] / 32000
    if slow == "learner":
        balanced["learner"]["step"] = "tests.system.gated:GatedStep"
        balanced["learner"]["step_options"]["tokens_per_s"] /= 10
    else:
        balanced["rewarders"]["reward"] = "tests.system.gated:GatedReward"
        balanced["rewarders"]["concurrency"] = 2
        balanced["rewarders"]["options"]["seconds"] = 10 * iteration_s * 2 / (GROUPS * SIZE)
    run = start(balanced, "--json")

    def sampled(status: dict[str, Any]) -> bool:
        """The whole line was issued and is sampled: nothing but the pacing rule keeps the generators from more."""
        queues = status.get("queues", {})
        empty = queues.get("queues/samples_running") == queues.get("queues/samples_waiting") == 0
        return empty and queues.get("queues/groups_outstanding") == LINE and status["iteration"] >= 2

    run.until(sampled, f"line of {LINE} sampled groups")
    gate.touch()
    assert run.wait() == 0, run.err
    figures = json.loads(run.out.splitlines()[-1])
    assert (figures["outcome"], figures["iterations"], figures["staleness_max"]) == ("done", ITERATIONS, 1)

    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "memory/learner_0" in record]  # the first may come before a process has said its memory
    # A group is outstanding until its terminal state is known, which may come after the version that gave its place in the line away.
    assert len(records) >= ITERATIONS - 2 and max(r["queues/groups_outstanding"] for r in records) <= LINE + GROUPS
    for name in (name for name in records[-1] if name.startswith("memory/")):
        values = [(record["iteration"], record[name]) for record in records if record.get(name) is not None]
        early = max(value for iteration, value in values if 3 < iteration <= ITERATIONS // 2)
        late = max(value for iteration, value in values if iteration > ITERATIONS // 2)
        assert late <= early + ROOM, (
            f"{name}: {early / 2**20:.0f} MiB at most in the first half, {late / 2**20:.0f} in the second: {values}"
        )
