"""The clipped surrogate with a floor under tokens of negative advantage."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from learner.objectives import TokenLoss, Tokens, ratio
from learner.objectives.clipped import clipped_surrogate


def dual_clip(
    tokens: Tokens,
    *,
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2,
    clip_high: Annotated[float, Field(gt=0)] = 0.28,
    floor: Annotated[float, Field(gt=1)] = 3.0,
) -> TokenLoss:
    """The clipped surrogate, and for A < 0 never below `floor` * A: a token that the policy now likes far more loses no more than that.

    Source: Ye et al. 2020 (Mastering complex control in MOBA games), eq. 5; `floor` is its c.
    """
    ratio_T = ratio(tokens.policy_T, tokens.anchor_T)
    surrogate_T, bounded_T = clipped_surrogate(ratio_T, tokens.advantages_T, clip_low=clip_low, clip_high=clip_high)
    floor_T = floor * tokens.advantages_T
    floored_T = (tokens.advantages_T < 0) & (surrogate_T < floor_T)
    return TokenLoss(loss_T=-surrogate_T.where(~floored_T, floor_T), clipped_T=bounded_T | floored_T)
