"""Objectives: what makes a loss of log-probs and advantages. This file is the interface and the table.

An objective is a function `(tokens: Tokens, *, options) -> TokenLoss`. It sees the trainable tokens of one micro-batch, laid flat, and
returns a loss for each; what they are divided by is no business of its own (`learner/packing.py`, aggregation), so that micro-batches
and ranks add up exactly. To add one: a new file beside this one and a line in OBJECTIVES; `tests/contracts/test_objectives.py` then
tests it. Objectives use tensor methods only and import torch for the type checker alone, so that options are checked without torch.
"""

# ruff: noqa: N815 (shapes stand in names)
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

OBJECTIVES = {
    "clipped": "learner.objectives.clipped:clipped",
}
"""Name in the configuration -> function."""

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are cut here before exp, as in verl: exp(20) is far outside every clip bound, and its product with an advantage is finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The T trainable tokens of one micro-batch. Only `policy_T` carries a gradient."""

    policy_T: Tensor
    """Log-probs under the policy that is trained."""
    anchor_T: Tensor
    """Log-probs that the ratio is taken against: those of the behaviour policy."""
    advantages_T: Tensor
    sample_T: Tensor
    """int64: which of the micro-batch's `num_samples` samples the token belongs to. A sample is never split over micro-batches."""
    num_samples: int

    def log_ratio(self) -> Tensor:
        """Log of policy / anchor, cut at LOG_RATIO_LIMIT."""
        return (self.policy_T - self.anchor_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """What an objective returns."""

    loss_T: Tensor
    """To be minimised, before the division by the number of tokens."""
    clipped_T: Tensor
    """bool: where a bound changed the loss."""
