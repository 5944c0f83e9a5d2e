"""The plain policy gradient with truncated importance weights."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from learner.objectives import TokenLoss, Tokens, ratio


def reinforce(tokens: Tokens, *, cap: Annotated[float, Field(gt=0)] = 2.0) -> TokenLoss:
    """-sg(min(ratio, cap)) * A * log-prob.

    Source: the truncated importance sampling of IMPALA, eq. 4 (its rho with rho-bar = `cap`), without a value function.
    """
    still_T = ratio(tokens.policy_T, tokens.anchor_T).detach()
    return TokenLoss(loss_T=-still_T.clamp(max=cap) * tokens.advantages_T * tokens.policy_T, clipped_T=still_T > cap)
