"""Functions of a user's own that are wrong in one way each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from learner.advantages import FloatArray, IntArray
from learner.objectives import TokenLoss, Tokens

if TYPE_CHECKING:
    from nowhere import Nothing  # type: ignore[import-not-found]


def three_arguments(scores_N: FloatArray, group_ids_N: IntArray, scale: float) -> FloatArray:
    """More than is given."""
    return scores_N * scale


def one_too_few(scores_N: FloatArray, group_ids_N: IntArray) -> FloatArray:
    """A number is missing."""
    return scores_N[1:]


def no_numbers(scores_N: FloatArray, group_ids_N: IntArray) -> Any:
    """Not even numbers."""
    return {"advantage": scores_N}


def breaks(scores_N: FloatArray, group_ids_N: IntArray) -> FloatArray:
    """Raises."""
    raise KeyError("a field that is not there")


def without_annotations(tokens: Tokens, *, beta=1.0) -> TokenLoss:  # type: ignore[no-untyped-def]
    """Its option may be anything."""
    return likelihood_of_all(tokens)


def annotated_with_nothing(tokens: Tokens, *, beta: Nothing = 1.0) -> TokenLoss:
    """Its option's annotation is not there when it runs."""
    return likelihood_of_all(tokens)


def likelihood_of_all(tokens: Tokens) -> TokenLoss:
    """Sound: learns every token, whatever its advantage."""
    return TokenLoss(loss_T=-tokens.policy_T, clipped_T=torch.zeros_like(tokens.policy_T))


def one_number(tokens: Tokens) -> TokenLoss:
    """A mean, where a loss for each token is wanted."""
    return TokenLoss(loss_T=-(tokens.policy_T * tokens.advantages_T).mean(), clipped_T=tokens.policy_T > 0)


def bare_tensor(tokens: Tokens) -> Any:
    """No TokenLoss."""
    return -tokens.policy_T * tokens.advantages_T


def detached(tokens: Tokens) -> TokenLoss:
    """Nothing can be learned from it."""
    return TokenLoss(loss_T=-tokens.policy_T.detach() * tokens.advantages_T, clipped_T=tokens.policy_T > 0)


def half_an_optimizer(trained: Any, settings: Any) -> Any:
    """Leaves a parameter out."""
    return [torch.optim.SGD([one.parameter for one in trained[1:]], lr=settings.lr)]


def no_optimizer(trained: Any, settings: Any) -> Any:
    """Not in a list."""
    return torch.optim.SGD([one.parameter for one in trained], lr=settings.lr)
