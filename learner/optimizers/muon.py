"""Muon: hidden matrices move by the orthogonalised momentum of their gradient; AdamW takes embeddings, head, norms and biases."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from learner.optimizers import Trained
from learner.optimizers.adamw import adamw
from learner.settings import OptimizerSettings


def muon(trained: Sequence[Trained], settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """One moment for hidden matrices. Its update is scaled to the size of AdamW's, so both can share rate and decay. A model trained from
    nothing gains from a lower rate of its table of tokens (`adamw_lr`); the schedule keeps the proportion of the two.

    Source: Jordan et al., Muon; the scale is Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4. The orthogonalisation runs in
    bfloat16, so results agree over numbers of ranks to about three digits of an update, not to the last.
    """
    hidden = [one for one in trained if one.parameter.ndim == 2 and not one.embedding]
    rest = [one for one in trained if one.parameter.ndim != 2 or one.embedding]
    parts: list[torch.optim.Optimizer] = []
    if hidden:
        parts.append(
            torch.optim.Muon(
                [one.parameter for one in hidden],
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                momentum=0.95 if settings.momentum is None else settings.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    own = settings if settings.adamw_lr is None else settings.model_copy(update={"lr": settings.adamw_lr})
    return parts + (adamw(rest, own) if rest else [])
