"""Log-probs and entropies of chosen tokens from hidden states, without holding [tokens, vocabulary] when that is large.

With z = hidden W^T / temperature and p = softmax(z):
    log-prob = z[target] - logsumexp(z)          d log-prob / dz = onehot(target) - p
    entropy = logsumexp(z) - sum p z             d entropy / dz = -p (log p + entropy)
The naive way is autograd over all of z, which holds about four tensors [tokens, vocabulary] in float32. The chunked way holds one in the dtype
of the products, works through it in pieces that stay in the cache, and is the faster one from a vocabulary of a few hundred on. Where even
that one is too large, z is computed a piece at a time and again in the backward pass: memory for one piece, one product in four more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NAIVE_VOCABULARY = 256
"""Largest vocabulary for which the naive way is taken, that of bytes: beyond it was never the faster one (`benchmarks/logprob.py`)."""

KEPT_BYTES = 2**28
"""Logits of a micro-batch up to this size are kept for the backward pass, in the dtype of the products; beyond it they are computed again."""

CACHED_LOGITS = 2**19
"""Logits of one chunk where they are kept: 2 MiB in float32, which stays in a core's cache."""

CHUNK_LOGITS = 2**23
"""Logits of one chunk where they are computed again: 32 MiB in float32, so that products are large enough."""


def head_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    temperature_T: Tensor,
    *,
    cap: float | None = None,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the target [T], and the entropy of the softmax [T], in float32 or better.

    Under autocast the products are taken in its dtype, everything else in float32. A head with a bias or a soft cap takes the naive way.
    """
    if weight_VD.shape[0] <= NAIVE_VOCABULARY or bias_V is not None or cap is not None:
        return naive_logprobs(hidden_TD, weight_VD, bias_V, targets_T, temperature_T, cap=cap, entropy_gradient=entropy_gradient)
    return chunked_logprobs(hidden_TD, weight_VD, targets_T, temperature_T, entropy_gradient=entropy_gradient)


def capped_logits(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap), where there is a cap. Source: Gemma 2, section 2."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def naive_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    temperature_T: Tensor,
    *,
    cap: float | None = None,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """The formulas as they stand."""
    logits_TV = nn.functional.linear(hidden_TD, weight_VD, bias_V)
    precise = torch.promote_types(logits_TV.dtype, torch.float32)
    logits_TV = capped_logits(logits_TV.to(precise), cap) / temperature_T[:, None].to(precise)
    logprobs_TV = logits_TV.log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    return logprobs_TV.gather(-1, targets_T[:, None])[:, 0], entropy_T


def chunked_logprobs(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature_T: Tensor, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """The same, a chunk of tokens at a time; logits are kept for the backward pass up to KEPT_BYTES."""
    device = hidden_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
    with torch.autocast(device, enabled=False):
        precise = torch.promote_types(dtype, torch.float32)
        scaled_TD = hidden_TD.to(precise) / temperature_T[:, None].to(precise)
        logprobs_T, entropy_T = _Chunked.apply(scaled_TD.to(dtype), weight_VD.to(dtype), targets_T)  # type: ignore[no-untyped-call]
    return logprobs_T, entropy_T if entropy_gradient else entropy_T.detach()


class _Chunked(torch.autograd.Function):
    """Hidden states (over the temperature) and weights arrive in the dtype of the products; all else is in float32 or better."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        precise = torch.promote_types(hidden_TD.dtype, torch.float32)
        chosen_T, entropy_T = (hidden_TD.new_empty(hidden_TD.shape[0], dtype=precise) for _ in range(2))
        kept_TV = hidden_TD @ weight_VD.T if _keeps(hidden_TD, weight_VD) else None
        for part in _chunks(hidden_TD, weight_VD):
            logits = hidden_TD[part] @ weight_VD.T if kept_TV is None else kept_TV[part]
            logprobs = logits.log_softmax(-1, dtype=precise)
            chosen_T[part] = logprobs.gather(-1, targets_T[part, None])[:, 0]
            entropy_T[part] = logprobs.exp().mul_(logprobs).sum(-1).neg_()
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, entropy_T, kept_TV)
        return chosen_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_TD, weight_VD, targets_T, entropy_T, kept_TV = ctx.saved_tensors
        through_entropy = bool(gradients[1].any())

        def slope(logits: Tensor, part: slice) -> Tensor:
            per_logprob = gradients[0][part, None]
            if through_entropy:
                logprobs = logits.log_softmax(-1, dtype=entropy_T.dtype)
                found = logprobs.exp().neg_()
                found *= logprobs.add_(entropy_T[part, None]).mul_(gradients[1][part, None]).add_(per_logprob)
            else:
                found = logits.softmax(-1, dtype=entropy_T.dtype).mul_(-per_logprob)
            return found.scatter_add_(-1, targets_T[part, None], per_logprob).to(hidden_TD.dtype)

        if kept_TV is not None:
            slope_TV = torch.empty_like(kept_TV)
            for part in _chunks(hidden_TD, weight_VD):
                slope_TV[part] = slope(kept_TV[part], part)
            return slope_TV @ weight_VD, slope_TV.T @ hidden_TD, None
        hidden_gradient_TD = torch.empty_like(hidden_TD)
        weight_gradient_VD = torch.zeros_like(weight_VD, dtype=entropy_T.dtype)
        for part in _chunks(hidden_TD, weight_VD):
            slope_CV = slope(hidden_TD[part] @ weight_VD.T, part)
            hidden_gradient_TD[part] = slope_CV @ weight_VD
            weight_gradient_VD += slope_CV.T @ hidden_TD[part]
        return hidden_gradient_TD, weight_gradient_VD.to(weight_VD.dtype), None


def _keeps(hidden_TD: Tensor, weight_VD: Tensor) -> bool:
    return hidden_TD.shape[0] * weight_VD.shape[0] * hidden_TD.element_size() <= KEPT_BYTES


def _chunks(hidden_TD: Tensor, weight_VD: Tensor) -> list[slice]:
    logits = CACHED_LOGITS if _keeps(hidden_TD, weight_VD) else CHUNK_LOGITS
    size = max(1, logits // weight_VD.shape[0])
    return [slice(start, start + size) for start in range(0, hidden_TD.shape[0], size)]
