"""The numbers of an iteration's updates, gathered token by token and made one over all ranks.

Means are over the tokens that went through the model, in all updates of the batch:
loss (aggregated as configured, mean over updates), grad_norm (before clipping, mean over updates), entropy (nats), ratio_mean, ratio_max,
ratio_min (policy against behaviour), clip_share, kl (k3 estimate of KL(behaviour || policy)), logprob_drift and logprob_drift_max
(|policy - behaviour| before the first update: sampler against trainer, plus staleness), tokens_trained, updates, updates_skipped (gradient
not finite), skipped (samples); with a correction: correction_mean, correction_max, correction_min (of the free weights), correction_share
(bounded ones); with a reference model: reference_kl.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learner.loss import Inputs, MicroLoss
from learner.objectives import LOG_RATIO_LIMIT
from learner.parallel import Group

_SUMS = (
    "loss",
    "tokens",
    "entropy",
    "ratio",
    "clipped",
    "kl",
    "drift",
    "first_tokens",
    "correction",
    "corrected",
    "reference_kl",
    "skipped",
)
_MAXIMA = ("ratio_max", "minus_ratio_min", "drift_max", "correction_max", "minus_correction_min")


RATIO_BINS, RATIO_TOP = 40, 2.0


class Tally:
    """Sums and maxima on the device; read once, at the end of the iteration."""

    def __init__(self, device: torch.device) -> None:
        """Nothing counted yet."""
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self._maxima = torch.full((len(_MAXIMA),), -math.inf, dtype=torch.float64, device=device)
        self._norms: list[float] = []
        self._ratios = torch.zeros(RATIO_BINS, dtype=torch.float64, device=device)
        self.ratio_counts: tuple[int, ...] = ()
        """How many ratios fell into each of RATIO_BINS equal parts of [0, RATIO_TOP] over all ranks, the last with all above; after `values`."""

    @torch.no_grad()
    def add_tokens(self, inputs: Inputs, loss: MicroLoss, *, first: bool) -> None:
        """One micro-batch. `first` marks the first update of the batch."""
        log_T = (inputs.policy_T - loss.behaviour_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        ratio_T, drift_T = log_T.exp(), log_T.abs()
        self._ratios += torch.histc(ratio_T.float().clamp(max=RATIO_TOP), RATIO_BINS, 0.0, RATIO_TOP)
        count = ratio_T.new_tensor(float(ratio_T.numel()))
        sums = {
            "loss": loss.total,
            "tokens": count,
            "entropy": inputs.entropy_T.sum(),
            "ratio": ratio_T.sum(),
            "clipped": loss.clipped_T.sum(),
            "kl": (ratio_T - 1 - log_T).sum(),
        }
        maxima = {"ratio_max": ratio_T.max(), "minus_ratio_min": -ratio_T.min()}
        if first:
            sums |= {"drift": drift_T.sum(), "first_tokens": count}
            maxima |= {"drift_max": drift_T.max()}
        if loss.correction_T is not None and loss.corrected_T is not None:
            sums |= {"correction": loss.correction_T.sum(), "corrected": loss.corrected_T.sum()}
            maxima |= {"correction_max": loss.correction_T.max(), "minus_correction_min": -loss.correction_T.min()}
        if loss.reference_kl_T is not None:
            sums |= {"reference_kl": loss.reference_kl_T.sum()}
        self._sums += _row(sums, _SUMS, self._sums, 0.0)
        self._maxima = torch.maximum(self._maxima, _row(maxima, _MAXIMA, self._maxima, -math.inf))

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
        group.sum(self._ratios)
        self.ratio_counts = tuple(int(count) for count in self._ratios.tolist())
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
        tokens = sums["tokens"]
        if tokens:
            values |= {
                "loss": sums["loss"] / len(self._norms),
                "entropy": sums["entropy"] / tokens,
                "ratio_mean": sums["ratio"] / tokens,
                "ratio_max": maxima["ratio_max"],
                "ratio_min": -maxima["minus_ratio_min"],
                "clip_share": sums["clipped"] / tokens,
                "kl": sums["kl"] / tokens,
                "logprob_drift": sums["drift"] / max(sums["first_tokens"], 1),
                "logprob_drift_max": maxima["drift_max"],
            }
        if math.isfinite(maxima["correction_max"]):
            values |= {
                "correction_mean": sums["correction"] / tokens,
                "correction_max": maxima["correction_max"],
                "correction_min": -maxima["minus_correction_min"],
                "correction_share": sums["corrected"] / tokens,
            }
        if sums["reference_kl"]:
            values["reference_kl"] = sums["reference_kl"] / tokens
        return values


def _row(found: dict[str, Tensor], names: tuple[str, ...], like: Tensor, missing: float) -> Tensor:
    absent = like.new_tensor(missing)
    return torch.stack([found[name].to(like.dtype) if name in found else absent for name in names])
