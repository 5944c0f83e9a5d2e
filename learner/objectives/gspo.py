"""The clipped surrogate over the ratio of whole sequences."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from learner.objectives import TokenLoss, Tokens, cut, sample_sums
from learner.objectives.clipped import clipped_surrogate


def gspo(
    tokens: Tokens,
    *,
    clip_low: Annotated[float, Field(gt=0, le=1)] = 3e-4,
    clip_high: Annotated[float, Field(gt=0)] = 4e-4,
) -> TokenLoss:
    """The clipped surrogate with ratio = exp(mean over the sample's trainable tokens of the log-ratio), the same for all of its tokens.

    With aggregation sequence_mean it is the published objective. Source: GSPO (Zheng et al. 2025), eq. 5 and 7.
    """
    count_S = sample_sums(tokens.policy_T.new_ones(tokens.policy_T.shape), tokens.sample_T, tokens.num_samples)
    total_S = sample_sums(tokens.policy_T - tokens.anchor_T, tokens.sample_T, tokens.num_samples)
    ratio_S = cut(total_S / count_S.clamp(min=1)).exp()
    surrogate_T, bounded_T = clipped_surrogate(ratio_S[tokens.sample_T], tokens.advantages_T, clip_low=clip_low, clip_high=clip_high)
    return TokenLoss(loss_T=-surrogate_T, clipped_T=bounded_T)
