"""The numbers of an update, gathered token by token and made one over all ranks.

Means are over the tokens that went through the model, in all updates of the batch:
loss (aggregated as configured, mean over updates), grad_norm (before clipping, mean over updates), entropy (nats), ratio_mean, ratio_max,
ratio_min, clip_share, kl (k3 estimate of KL(behaviour || policy)), logprob_drift and logprob_drift_max (|policy - behaviour| before the
first update: sampler against trainer, plus staleness), tokens_trained, updates, updates_skipped (gradient not finite), skipped (samples).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learner.objectives import LOG_RATIO_LIMIT, TokenLoss
from learner.parallel import Group

_SUMS = ("loss", "tokens", "entropy", "ratio", "clipped", "kl", "drift", "first_tokens", "skipped")
_MAXIMA = ("ratio_max", "minus_ratio_min", "drift_max")


class Tally:
    """Sums and maxima on the device; read once, at the end of the iteration."""

    def __init__(self, device: torch.device) -> None:
        """Nothing counted yet."""
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self._maxima = torch.full((len(_MAXIMA),), -math.inf, dtype=torch.float64, device=device)
        self._norms: list[float] = []

    @torch.no_grad()
    def add_tokens(self, total: Tensor, loss: TokenLoss, policy_T: Tensor, behaviour_T: Tensor, entropy_T: Tensor, *, first: bool) -> None:
        """One micro-batch: its loss as aggregated, and what stands behind it. `first` marks the first update of the batch."""
        log_ratio_T = (policy_T - behaviour_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        ratio_T, drift_T = log_ratio_T.exp(), log_ratio_T.abs()
        zero, count = ratio_T.new_zeros(()), ratio_T.new_tensor(float(ratio_T.numel()))
        kl_T = ratio_T - 1 - log_ratio_T
        sums = [total, count, entropy_T.sum(), ratio_T.sum(), loss.clipped_T.sum().to(count.dtype), kl_T.sum()]
        sums += [drift_T.sum() if first else zero, count if first else zero, zero]
        maxima = torch.stack([ratio_T.max(), -ratio_T.min(), drift_T.max() if first else zero])
        self._sums += torch.stack(sums)
        self._maxima = torch.maximum(self._maxima, maxima)

    def add_update(self, norm: float) -> None:
        """One optimizer step with a gradient of this norm, the same on all ranks; left out if it is not finite."""
        self._norms.append(norm)

    def add_skipped(self, count: int) -> None:
        """Samples of this rank that were not trained on."""
        self._sums[_SUMS.index("skipped")] += count

    def values(self, group: Group) -> dict[str, float]:
        """The numbers over all ranks; a collective call. Those that need a token are left out when there was none."""
        group.sum(self._sums)
        group.maximum(self._maxima)
        sums = dict(zip(_SUMS, self._sums.tolist(), strict=True))
        maxima = dict(zip(_MAXIMA, self._maxima.tolist(), strict=True))
        taken = [norm for norm in self._norms if math.isfinite(norm)]
        values = {
            "skipped": sums["skipped"],
            "tokens_trained": sums["first_tokens"],
            "updates": float(len(taken)),
            "updates_skipped": float(len(self._norms) - len(taken)),
        }
        if taken:
            values["grad_norm"] = sum(taken) / len(taken)
        if sums["tokens"]:
            tokens = sums["tokens"]
            values |= {
                "loss": sums["loss"] / len(self._norms),
                "entropy": sums["entropy"] / tokens,
                "ratio_mean": sums["ratio"] / tokens,
                "ratio_max": maxima["ratio_max"],
                "ratio_min": -maxima["minus_ratio_min"],
                "clip_share": sums["clipped"] / tokens,
                "kl": sums["kl"] / tokens,
                "logprob_drift": sums["drift"] / sums["first_tokens"],
                "logprob_drift_max": maxima["drift_max"],
            }
        return values
