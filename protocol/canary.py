"""The canary: a fixed sequence whose log-probs the learner publishes with every version, and which every generator must reproduce after a swap.

It catches what hashes cannot: weights that arrived whole and were then put into the wrong place, mixed with the old ones, or read through
a cache of the old ones. Its prompt is the first part, so that an engine's prefix cache holds it from the swap before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PROMPT_TOKENS, SCORED_TOKENS = 16, 8
BOUNDS = {"float32": 1e-3, "bfloat16": 0.5}
"""Largest absolute difference, in nats, between the learner's log-probs and the engine's, by the coarsest of the learner's, the published
and the engine's type. float32 differs by rounding alone (1e-5 seen); bfloat16 keeps 8 bits of each weight and activation."""


@dataclass(frozen=True, slots=True)
class Canary:
    """What is published: `logprobs` [SCORED_TOKENS] of the last tokens at temperature 1, from a forward pass of the learner in `dtype`."""

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    dtype: str = "float32"

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {"ids": self.ids.tolist(), "logprobs": [float(value) for value in self.logprobs], "dtype": self.dtype}


def canary_ids(vocabulary: int) -> npt.NDArray[np.int32]:
    """The sequence for a model of so many tokens: the same in every run, without structure that a model could know by heart."""
    return np.random.default_rng(0).integers(0, vocabulary, PROMPT_TOKENS + SCORED_TOKENS).astype(np.int32)


def read_canary(manifest: Mapping[str, Any]) -> Canary | None:
    """The canary of a manifest; None where it has none."""
    found = manifest.get("canary")
    return None if found is None else Canary(np.array(found["ids"], np.int32), np.array(found["logprobs"], np.float32), found["dtype"])


def bound_of(dtypes: Sequence[str]) -> float:
    """The bound for weights and engines of these types."""
    return max(BOUNDS.get(dtype, BOUNDS["bfloat16"]) for dtype in dtypes)


def difference(expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> float:
    """Largest absolute difference; infinite when something is not a number."""
    if expected.shape != found.shape:
        return float("inf")
    worst = float(np.abs(expected.astype(np.float64) - found).max(initial=0.0))
    return worst if np.isfinite(worst) else float("inf")
