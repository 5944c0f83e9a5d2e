"""Scores of one iteration to advantages. All tokens of a completion get the same advantage.

An advantage function takes the scores [N] and the group id of each sample [N] and returns advantages [N]; one with a third argument
`passed_N` is also told which samples are right [N]. Its options are its keyword-only arguments. Samples of a group need not stand together.
Scores arrive finite, and with the penalty for length in them if there is one.
`tests/contracts/test_advantages.py` tests every entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from learner.options import bind
from protocol.errors import ConfigError

ADVANTAGES = {
    "grpo": "learner.advantages:grpo",
    "dr_grpo": "learner.advantages:dr_grpo",
    "rloo": "learner.advantages:rloo",
    "reinforce_pp": "learner.advantages:reinforce_pp",
    "reinforce_pp_baseline": "learner.advantages:reinforce_pp_baseline",
    "pass_at_k": "learner.advantages:pass_at_k",
}
"""Name in the configuration -> function."""

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

DRAWN = 4
"""k of pass@k, if not given."""

STD_FLOOR = 1e-4
"""Added to a standard deviation before dividing by it, as in TRL: scores that differ by rounding alone stay near 0."""


def advantages(
    name: str,
    options: Mapping[str, Any],
    scores_N: Sequence[float] | FloatArray,
    group_ids_N: Sequence[int] | IntArray,
    passed_N: Sequence[bool] | BoolArray,
) -> FloatArray:
    """Advantages [N] by the function called `name`. A score that is not finite gets NaN and is no part of any statistics.

    Raises ConfigError for a function of a user's own that fails or returns anything but a number for each sample.
    """
    scores, groups, passed = np.asarray(scores_N, np.float64), np.asarray(group_ids_N, np.int64), np.asarray(passed_N, np.bool_)
    if not scores.shape == groups.shape == passed.shape or scores.ndim != 1:
        raise ValueError(
            f"advantages: scores {scores.shape}, group ids {groups.shape} and passed {passed.shape} must be three vectors of one length"
        )
    finite = np.isfinite(scores)
    result = np.full(scores.shape, np.nan)
    if finite.any():
        found = bind(name, ADVANTAGES, options, "advantage")(scores[finite], groups[finite], passed[finite])
        result[finite] = _one_each(found, int(finite.sum()), name)
    return result


def _one_each(found: Any, wanted: int, name: str) -> FloatArray:
    try:
        values = np.asarray(found, np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"advantage {name!r} returned a {type(found).__name__}, expected {wanted} numbers, one for each sample") from None
    if values.shape != (wanted,):
        raise ConfigError(f"advantage {name!r} returned values of shape {values.shape}, expected ({wanted},): one for each sample")
    return values


def grpo(scores_N: FloatArray, group_ids_N: IntArray, *, divide_by_std: bool = True) -> FloatArray:
    """Score minus the mean of its group, divided by the group's standard deviation.

    The deviation is that of a sample (n - 1), as in TRL and verl. A group of one sample, or of equal scores, gets 0.
    Source: DeepSeekMath, section 4.1.2.
    """
    group_N = _places(group_ids_N)
    centred_N = _centred(scores_N, group_N)
    if not divide_by_std:
        return centred_N
    variance_G = np.bincount(group_N, centred_N**2) / np.maximum(np.bincount(group_N) - 1, 1)
    return centred_N / (np.sqrt(variance_G) + STD_FLOOR)[group_N]


def dr_grpo(scores_N: FloatArray, group_ids_N: IntArray) -> FloatArray:
    """Score minus the mean of its group: no division by the deviation, which favours prompts that are too easy or too hard.

    Belongs with aggregation constant_length. Source: Dr. GRPO (Liu et al. 2025), section 3.2.
    """
    return grpo(scores_N, group_ids_N, divide_by_std=False)


def rloo(scores_N: FloatArray, group_ids_N: IntArray) -> FloatArray:
    """Score minus the mean of the *other* samples of its group; 0 for a group of one. Source: RLOO (Ahmadian et al. 2024), eq. 8."""
    group_N = _places(group_ids_N)
    count_N = np.bincount(group_N)[group_N]
    return _centred(scores_N, group_N) * count_N / np.maximum(count_N - 1, 1)


def reinforce_pp(scores_N: FloatArray, group_ids_N: IntArray) -> FloatArray:
    """Score normalised over the whole batch: minus its mean, divided by its standard deviation. Groups do not matter.

    Each sample counts once, as in the paper's eq. 8; OpenRLHF's code counts it once per token, which lets long answers set the mean.
    Source: REINFORCE++ (Hu et al. 2025).
    """
    return _normalised(scores_N)


def reinforce_pp_baseline(scores_N: FloatArray, group_ids_N: IntArray) -> FloatArray:
    """Score minus the mean of its group, normalised over the whole batch. Source: REINFORCE++ with baseline (Hu et al. 2025), eq. 11."""
    return _normalised(_centred(scores_N, _places(group_ids_N)))


def pass_at_k(scores_N: FloatArray, group_ids_N: IntArray, passed_N: BoolArray, *, k: Annotated[int, Field(ge=1)] = DRAWN) -> FloatArray:
    """The advantage of a sample when the reward is whether one of k samples, drawn from the group without putting back, is right.

    With n samples, n_wrong of them not passed, and P = 1 - C(n_wrong, k) / C(n, k), s = sqrt(P (1 - P)):
    right (1 - P) / s, wrong (1 - P - C(n_wrong - 1, k - 1) / C(n - 1, k - 1)) / s; all 0 where s is 0.
    Scores are not read, so no penalty makes a right answer wrong. A group of which fewer than k samples were scored counts as pass@n; a k
    above `sampling.group_size` is refused before a run.
    Source: Pass@k Training (Chen et al. 2025), eq. 14 and 15; k = 1 is GRPO with the deviation of a population (n).
    """
    group_N = _places(group_ids_N)
    right_N = passed_N
    result = np.zeros_like(scores_N)
    for group in range(group_N.max() + 1):
        members = group_N == group
        n, wrong = int(members.sum()), int((members & ~right_N).sum())
        drawn = min(k, n)
        failed = _share_without(n, wrong, drawn)
        spread = np.sqrt(failed * (1 - failed))
        if spread > 0:
            still_failed = _share_without(n - 1, wrong - 1, drawn - 1)
            result[members & right_N] = failed / spread
            result[members & ~right_N] = (failed - still_failed) / spread
    return result


def _share_without(n: int, wrong: int, k: int) -> float:
    """C(wrong, k) / C(n, k): how often k drawn of n are all among the `wrong` ones. As a product, so that nothing overflows."""
    if wrong < k:
        return 0.0
    return float(np.prod([(wrong - i) / (n - i) for i in range(k)]))


def _normalised(values_N: FloatArray) -> FloatArray:
    deviation = float(values_N.std(ddof=1)) if len(values_N) > 1 else 0.0
    return _centred(values_N, np.zeros(len(values_N), np.int64)) / (deviation + STD_FLOOR)


def _places(group_ids_N: IntArray) -> IntArray:
    """Group ids as places 0..num_groups-1."""
    return np.unique(group_ids_N, return_inverse=True)[1].astype(np.int64)


def _centred(values_N: FloatArray, group_N: IntArray) -> FloatArray:
    """Values minus the mean of their group; exactly 0 where all values of a group are equal."""
    mean_G = np.bincount(group_N, values_N) / np.bincount(group_N)
    low_G, high_G = np.full(len(mean_G), np.inf), np.full(len(mean_G), -np.inf)
    np.minimum.at(low_G, group_N, values_N)
    np.maximum.at(high_G, group_N, values_N)
    return np.asarray(values_N - np.where(low_G == high_G, low_G, mean_G)[group_N])
