"""Objectives: what makes a loss of log-probs and advantages. This file is the interface and the table.

An objective is a function `(tokens: Tokens, *, options) -> TokenLoss`. It sees the trainable tokens of one micro-batch, laid flat, and
returns a loss for each; what they are divided by is no business of its own (`token_weights` in `learner/packing.py`), so that
micro-batches and ranks add up exactly. To add one: a new file beside this one and a line in OBJECTIVES, or no line for your own
"my_pkg.mod:function"; `tests/contracts/test_objectives.py` tests every entry. Objectives use tensor methods only and import torch for
the type checker alone, so that options are checked without torch.
"""

# ruff: noqa: N815 (shapes stand in names)
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

OBJECTIVES = {
    "clipped": "learner.objectives.clipped:clipped",
    "dual_clip": "learner.objectives.dual_clip:dual_clip",
    "gppo": "learner.objectives.gppo:gppo",
    "cispo": "learner.objectives.cispo:cispo",
    "gspo": "learner.objectives.gspo:gspo",
    "reinforce": "learner.objectives.reinforce:reinforce",
    "decoupled": "learner.objectives.decoupled:decoupled",
    "likelihood": "learner.objectives.likelihood:likelihood",
}
"""Name in the configuration -> function."""

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are cut here before exp: exp(20) is far outside every clip bound, and its product with an advantage is finite. Gradients go on
beyond it, so that what an objective promises for every token holds for those too (verl's clamp gives them none)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The T trainable tokens of one micro-batch. Only `policy_T` carries a gradient."""

    policy_T: Tensor
    """Log-probs under the policy that is trained."""
    anchor_T: Tensor
    """Log-probs that the ratio is taken against: the behaviour policy's, or the proximal policy's when a correction weighs the tokens."""
    behaviour_T: Tensor
    """Log-probs under the policy that sampled the tokens."""
    proximal_T: Tensor
    """Log-probs under the trainer's own policy before the first update on this batch."""
    advantages_T: Tensor
    sample_T: Tensor
    """int64: which of the micro-batch's `num_samples` samples the token belongs to. A sample is never split over micro-batches."""
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """What an objective returns."""

    loss_T: Tensor
    """To be minimised, before the division by the number of tokens."""
    clipped_T: Tensor
    """bool: where a bound changed the gradient."""


def ratio(policy_T: Tensor, anchor_T: Tensor) -> Tensor:
    """policy / anchor from their log-probs, the log-ratio cut at LOG_RATIO_LIMIT; d ratio / d policy_T is the ratio everywhere."""
    return cut(policy_T - anchor_T).exp()


def cut(log_ratio: Tensor) -> Tensor:
    """A log-ratio with its value bounded by LOG_RATIO_LIMIT and its gradient as it is."""
    return log_ratio + (log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT) - log_ratio).detach()


def sample_sums(values_T: Tensor, sample_T: Tensor, num_samples: int) -> Tensor:
    """Sum over the tokens of each sample [num_samples]."""
    return values_T.new_zeros(num_samples).index_add(0, sample_T, values_T)
