"""Trajectories for tests, in one line."""

from __future__ import annotations

from typing import Any

import numpy as np

from protocol.messages import Trajectory


def trajectory(group: int, index: int, score: float | None = 0.0, *, tokens: int = 3, **changes: Any) -> Trajectory:
    """Sampled wholly at the version before the one that trains on it, unless `spans` says otherwise."""
    iteration = changes.get("iteration", 0)
    values: dict[str, Any] = {
        "group_id": group, "index": index, "attempt": 0, "iteration": iteration, "purpose": "train", "problem_id": f"p{group}",
        "generator": "generator-0@1", "rewarder": "rewarder-0@1", "prompt_ids": np.array([1, 2], np.int32),
        "token_ids": np.arange(3, 3 + tokens, dtype=np.int32), "behaviour_logprobs": np.full(tokens, -1.0, np.float32),
        "loss_mask": np.ones(tokens, np.bool_), "spans": [[max(0, iteration - 1), 0, tokens]], "finish_reason": "stop",
        "temperature": 0.7, "max_tokens": 8, "score": score,
        "passed": bool(score), "status": "failed" if score is None else "accepted" if score else "wrong_answer",
        "parts": {} if score is None else {"words": score}, "detail": "", "started_s": 1.0, "finished_s": 2.0, "scored_s": 3.0,
        "scoring_s": 0.5,
    }  # fmt: skip
    values |= changes
    values["spans"] = np.array(values["spans"], np.int32).reshape(-1, 3)
    return Trajectory(**values)
