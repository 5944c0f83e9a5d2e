"""The plain likelihood, weighed by the advantage: what supervised fine-tuning trains with."""

from __future__ import annotations

from learner.objectives import TokenLoss, Tokens


def likelihood(tokens: Tokens) -> TokenLoss:
    """-A * log-prob, without any ratio: cross entropy where A is 1 (`rlsys sft`), the policy gradient on samples of the policy itself.

    Source: REINFORCE (Williams 1992), eq. 11. It takes samples as if the policy that is trained had written them.
    """
    loss_T = -tokens.advantages_T * tokens.policy_T
    return TokenLoss(loss_T=loss_T, clipped_T=loss_T != loss_T)
