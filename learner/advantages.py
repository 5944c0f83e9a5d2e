"""Scores of one iteration to advantages. Every sample of a completion's tokens gets the same advantage.

An advantage function takes the scores [N] and the group id of each sample [N] and returns advantages [N]; its options are its
keyword-only arguments. Samples of a group need not stand together. `tests/contracts/test_advantages.py` tests every entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from learner.options import bind

ADVANTAGES = {
    "grpo": "learner.advantages:grpo",
}
"""Name in the configuration -> function."""

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

STD_FLOOR = 1e-4
"""Added to a standard deviation before dividing by it, as in TRL: scores that differ by rounding alone stay near 0."""


def advantages(
    name: str, options: Mapping[str, Any], scores_N: Sequence[float] | FloatArray, group_ids_N: Sequence[int] | IntArray
) -> FloatArray:
    """Advantages [N] by the function called `name`. A score that is not finite gets NaN and is no part of its group's statistics."""
    scores, groups = np.asarray(scores_N, np.float64), np.asarray(group_ids_N, np.int64)
    if scores.shape != groups.shape or scores.ndim != 1:
        raise ValueError(f"advantages: scores {scores.shape} and group ids {groups.shape} must be two vectors of one length")
    finite = np.isfinite(scores)
    result = np.full(scores.shape, np.nan)
    if finite.any():
        result[finite] = bind(name, ADVANTAGES, options, "advantage")(scores[finite], groups[finite])
    return result


def grpo(scores_N: FloatArray, group_ids_N: IntArray, *, divide_by_std: bool = True) -> FloatArray:
    """Score minus the mean of its group, divided by the group's standard deviation.

    The deviation is that of a sample (n - 1), as in TRL and verl. A group of one sample, or of equal scores, gets 0.
    Source: DeepSeekMath, section 4.1.2.
    """
    group_N = _places(group_ids_N)
    centred_N = scores_N - _mean(scores_N, group_N)[group_N]
    if not divide_by_std:
        return centred_N
    count = np.bincount(group_N)
    variance = np.bincount(group_N, centred_N**2) / np.maximum(count - 1, 1)
    return centred_N / (np.sqrt(variance) + STD_FLOOR)[group_N]


def _places(group_ids_N: IntArray) -> IntArray:
    """Group ids as places 0..num_groups-1."""
    return np.unique(group_ids_N, return_inverse=True)[1].astype(np.int64)


def _mean(values_N: FloatArray, group_N: IntArray) -> FloatArray:
    """Mean of each group [num_groups]; exactly the common value where all values of a group are equal."""
    count = np.bincount(group_N)
    mean: FloatArray = np.bincount(group_N, values_N) / count
    low, high = np.full(len(count), np.inf), np.full(len(count), -np.inf)
    np.minimum.at(low, group_N, values_N)
    np.maximum.at(high, group_N, values_N)
    return np.where(low == high, low, mean)
