"""Decoupled PPO: the trust region around a recent policy, the importance weight against the one that sampled."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from learner.objectives import TokenLoss, Tokens, ratio
from learner.objectives.clipped import clipped_surrogate


def decoupled(
    tokens: Tokens,
    *,
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2,
    clip_high: Annotated[float, Field(gt=0)] = 0.28,
    weight_cap: Annotated[float, Field(gt=0)] = 5.0,
) -> TokenLoss:
    """-(proximal / behaviour) * min(r * A, clamp(r) * A) with r = policy / proximal.

    A token whose weight is above `weight_cap` is left out, as in AReaL's code; the paper has no cap.
    Source: Hilton et al. 2021 (Batch size-invariance), eq. 6; AReaL, eq. 5.
    """
    weight_T = ratio(tokens.proximal_T, tokens.behaviour_T)
    surrogate_T, bounded_T = clipped_surrogate(
        ratio(tokens.policy_T, tokens.proximal_T), tokens.advantages_T, clip_low=clip_low, clip_high=clip_high
    )
    over_T = weight_T > weight_cap
    return TokenLoss(loss_T=-weight_T.masked_fill(over_T, 0.0) * surrogate_T, clipped_T=bounded_T | over_T)
