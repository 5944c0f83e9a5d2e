"""The clipped surrogate of PPO, GRPO and DAPO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from learner.objectives import TokenLoss, Tokens, ratio

if TYPE_CHECKING:
    from torch import Tensor


def clipped(
    tokens: Tokens,
    *,
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2,
    clip_high: Annotated[float, Field(gt=0)] = 0.28,
) -> TokenLoss:
    """-min(ratio * A, clamp(ratio, 1 - clip_low, 1 + clip_high) * A) for each token.

    clip_low == clip_high is PPO and GRPO; a larger clip_high is DAPO's clip-higher. Source: DAPO, eq. 8.
    """
    ratio_T = ratio(tokens.policy_T, tokens.anchor_T)
    surrogate_T, bounded_T = clipped_surrogate(ratio_T, tokens.advantages_T, clip_low=clip_low, clip_high=clip_high)
    return TokenLoss(loss_T=-surrogate_T, clipped_T=bounded_T)


def clipped_surrogate(ratio_T: Tensor, advantages_T: Tensor, *, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """min(ratio * A, clamp(ratio) * A) [T], and where the bound was the smaller one, so that the token has no gradient."""
    free_T = ratio_T * advantages_T
    bounded_T = ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T
    return free_T.minimum(bounded_T), bounded_T < free_T
