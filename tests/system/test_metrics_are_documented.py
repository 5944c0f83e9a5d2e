"""Every number that a run writes stands in docs/metrics.md, and TensorBoard holds the same names as metrics.jsonl."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.system.conftest import Run

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "metrics.md"


def test_names_of_a_run(config: dict[str, Any], start: Callable[..., Run]) -> None:
    config["iterations"] = 2
    run = start(config)
    assert run.wait() == 0, run.err
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    names = {name for record in records if "iteration" in record for name in record if "/" in name}
    assert {"reward/mean", "staleness/max", "train/loss", "eval/pass_at_1", "idle/learner", "train/clip_share", "train/entropy"} <= names

    documented = [re.escape(name) for name in re.findall(r"`([a-z_]+/[a-z_0-9<>]+)`", DOCUMENT.read_text())]
    patterns = [re.compile(re.sub(r"<[a-z]+>", "[a-z_0-9]+", name.replace("\\<", "<").replace("\\>", ">"))) for name in documented]
    assert not [name for name in sorted(names) if not any(pattern.fullmatch(name) for pattern in patterns)]

    board = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"tensors": 0})
    board.Reload()
    assert set(board.Tags()["tensors"]) == names
    assert [event.step for event in board.Tensors("reward/mean")] == [0, 1]
    assert [event.step for event in board.Tensors("eval/pass_at_1")] == [0, 2]
