"""Gradient-preserving clipping: clipped tokens keep a bounded gradient."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from learner.objectives import TokenLoss, Tokens, ratio


def gppo(
    tokens: Tokens,
    *,
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2,
    clip_high: Annotated[float, Field(gt=0)] = 0.28,
) -> TokenLoss:
    """-bound / sg(ratio) * ratio * A where the clipped surrogate would have no gradient, -ratio * A elsewhere.

    The bound is 1 - clip_low for A < 0 and ratio below it, 1 + clip_high for A > 0 and ratio above it; it weighs the token's gradient.
    Source: Klear-Reasoner, eq. 5, with beta_1 = beta_2 = 1.
    """
    ratio_T = ratio(tokens.policy_T, tokens.anchor_T)
    advantages_T, still_T = tokens.advantages_T, ratio_T.detach()
    low_T = (advantages_T < 0) & (still_T < 1 - clip_low)
    high_T = (advantages_T > 0) & (still_T > 1 + clip_high)
    weight_T = still_T.where(~low_T, 1 - clip_low).where(~high_T, 1 + clip_high)
    return TokenLoss(loss_T=-(weight_T / still_T) * ratio_T * advantages_T, clipped_T=low_T | high_T)
