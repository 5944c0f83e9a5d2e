"""Log-probs and entropies of chosen tokens from hidden states, without holding [tokens, vocabulary] when that is large."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def head_logprobs(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, temperature_T: Tensor, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the target [T], and the entropy of the softmax [T], in float32 or better."""
    logits_TV = nn.functional.linear(hidden_TD, weight_VD, bias_V)
    precise = torch.promote_types(logits_TV.dtype, torch.float32)
    logits_TV = logits_TV.to(precise) / temperature_T[:, None].to(precise)
    logprobs_TV = logits_TV.log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    return logprobs_TV.gather(-1, targets_T[:, None])[:, 0], entropy_T
