"""The files of a small run with known numbers, written as the run itself would write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from protocol.codec import encode
from protocol.journal import Journal
from protocol.messages import Trajectory
from tests.protocol.examples import example

START_S = 1000.0
RUN = 0xAB
ITERATIONS = 4

Rows = Sequence[tuple[str, float, float, int]]


def trajectory(group: int, index: int, **changes: Any) -> Trajectory:
    """A sample of `group`; its iteration is group // 2."""
    base = example("Trajectory")
    assert isinstance(base, Trajectory)
    values = {name: getattr(base, name) for name in base.__dataclass_fields__}
    length = changes.pop("tokens", 4 + index)
    iteration = group // 2
    values |= {
        "group_id": group,
        "index": index,
        "iteration": iteration,
        "problem_id": f"train-{group}",
        "generator": f"generator-{index % 2}@1",
        "rewarder": "rewarder-0@1",
        "token_ids": np.full(length, 4, np.int32),
        "behaviour_logprobs": np.full(length, -0.5, np.float32),
        "loss_mask": np.ones(length, np.bool_),
        "spans": np.array([[max(0, iteration - 1), 0, length // 2], [iteration, 0, length]], np.int32),
        "score": float(index % 2),
        "passed": index % 2 == 1,
        "status": "accepted" if index % 2 else "wrong_answer",
        "started_s": START_S + 10 * iteration,
        "finished_s": START_S + 10 * iteration + 2 + index,
        "scored_s": START_S + 10 * iteration + 3 + index,
        "scoring_s": 0.5,
    }
    return Trajectory(**{**values, **changes})


def intervals(run_dir: Path, track: str, rows: Rows) -> None:
    """Rows (name, from, to, iteration) in seconds after START_S."""
    (run_dir / "events").mkdir(exist_ok=True)
    names = sorted({row[0] for row in rows})
    table = [[names.index(n), round(a * 1e6), round(b * 1e6), k, -1] for n, a, b, k in rows]
    with (run_dir / "events" / f"{track}.jsonl").open("a") as file:
        file.write(json.dumps({"offset_s": START_S, "names": names, "rows": table}) + "\n")


def make_run(run_dir: Path, ended: Mapping[str, Any] | None = None) -> Path:
    """Four iterations of 10 s: generators decode 6 s of each, the learner trains 4 s after them; one sample of group 5 is late."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"name": "observed", "iterations": ITERATIONS, "note": "a < b & c"}))
    records: list[dict[str, Any]] = [{"time_s": START_S + 1, "identity": "dispatcher-0@1", "event": "training started"}]
    evaluation = {
        "problems": 4,
        "failed": 0,
        "samples": 8,
        "oldest_version": 0,
        "newest_version": 0,
        "identity": "dispatcher-0@1",
        "event": "eval",
    }
    records.append({**evaluation, "time_s": START_S + 2, "version": 0, "pass_at_1": 0.25})
    for name in ("generator-0", "generator-1", "learner-0"):
        device = {"process": name, "device": "cuda:1" if name == "learner-0" else "cuda:0"}
        records.append({"time_s": START_S, "identity": "supervisor", "event": "on device", **device})
    for k in range(ITERATIONS):
        at = 10.0 * k
        records.append(
            {"time_s": START_S + at + 10, "iteration": k, "reward/mean": 0.2 + 0.1 * k, "staleness/mean": 0.5, "staleness/max": min(k, 1),
             "train/entropy": 0.5, "data/truncated_share": 0.0, "throughput/sampled_tokens_per_s": 100.0 + k,
             "throughput/trained_tokens_per_s": 90.0, "throughput/scored_samples_per_s": 3.0, "queues/groups_outstanding": 2.0}
        )  # fmt: skip
        for i in range(2):
            intervals(
                run_dir,
                f"generator-{i}",
                [("swap weights", at, at + 0.5, k), ("decode", at + 0.5, at + 6, -1), ("waiting:tasks", at + 6, at + 10, -1)],
            )
        intervals(
            run_dir,
            "rewarder-0",
            [("waiting:completions", at, at + 5, -1), ("scoring", at + 5, at + 6, -1), ("waiting:completions", at + 6, at + 10, -1)],
        )
        intervals(
            run_dir,
            "rewarder-0+score-0",
            [("waiting:completions", at, at + 5, -1), ("judge", at + 5, at + 6, k), ("waiting:completions", at + 6, at + 10, -1)],
        )
        intervals(
            run_dir, "learner-0",
            [("waiting:trajectories", at, at + 6, k), ("forward backward", at + 6, at + 9, k), ("optimizer", at + 9, at + 9.5, k),
             ("publish", at + 9.5, at + 10, k + 1)],
        )  # fmt: skip
        intervals(run_dir, "dispatcher-0", [("dispatching", at, at + 0.1, -1), ("waiting:version", at + 0.1, at + 10, -1)])
    records.append(
        {
            "time_s": START_S + 22,
            "identity": "learner-0@1",
            "event": "weights refused",
            "generator": "generator-1@1",
            "version": 2,
            "error": "<torn>",
        }
    )
    records.append({"time_s": START_S + 39, "identity": "learner-0@1", "event": "training ended", "iterations": ITERATIONS})
    records.append({**evaluation, "time_s": START_S + 40, "version": 4, "pass_at_1": 0.75})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    journal = Journal(run_dir / "journal")
    for group in range(2 * ITERATIONS):
        for index in range(4):
            late = {"finished_s": START_S + 29.0, "scored_s": START_S + 29.9, "tokens": 80} if (group, index) == (5, 3) else {}
            journal.append([b"trajectory", *encode(trajectory(group, index, **late), RUN)])
    journal.append([b"trajectory", *encode(trajectory(0, 0, score=9.0), RUN)])
    journal.close()
    if ended is not None:
        (run_dir / "exit.json").write_text(json.dumps(ended))
    return run_dir
