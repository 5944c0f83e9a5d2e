"""Clipped importance weights on a plain policy gradient: every token keeps a gradient."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from learner.objectives import TokenLoss, Tokens, ratio


def cispo(
    tokens: Tokens,
    *,
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2,
    clip_high: Annotated[float, Field(gt=0)] = 0.28,
) -> TokenLoss:
    """-sg(clamp(ratio, 1 - clip_low, 1 + clip_high)) * A * log-prob, whatever the sign of A.

    Source: MiniMax-M1, eq. 4 and 5. Its code leaves the lower side open (clip_low = 1 here) with a large clip_high.
    """
    still_T = ratio(tokens.policy_T, tokens.anchor_T).detach()
    weight_T = still_T.clamp(1 - clip_low, 1 + clip_high)
    return TokenLoss(loss_T=-weight_T * tokens.advantages_T * tokens.policy_T, clipped_T=weight_T != still_T)
