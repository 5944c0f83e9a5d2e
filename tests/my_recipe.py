"""An advantage and an objective of a user's own, as docs/objectives.md shows them."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from learner.advantages import FloatArray, IntArray
from learner.objectives import TokenLoss, Tokens, ratio


def against_best(scores_N: FloatArray, group_ids_N: IntArray, *, margin: Annotated[float, Field(ge=0)] = 0.0) -> FloatArray:
    """Score minus the best of its group, plus a margin."""
    best = {group: scores_N[group_ids_N == group].max() for group in np.unique(group_ids_N)}
    return scores_N - np.array([best[group] for group in group_ids_N]) + margin


def soft_clip(tokens: Tokens, *, steepness: Annotated[float, Field(gt=0)] = 4.0) -> TokenLoss:
    """-sigmoid(steepness * (ratio - 1)) * 4 / steepness * A: the gradient fades where the ratio leaves 1. Source: SAPO (Qwen 2025), eq. 2."""
    ratio_T = ratio(tokens.policy_T, tokens.anchor_T)
    gate_T = (steepness * (ratio_T - 1)).sigmoid()
    return TokenLoss(loss_T=-gate_T * 4 / steepness * tokens.advantages_T, clipped_T=(ratio_T - 1).abs() > 1 / steepness)
