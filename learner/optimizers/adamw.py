"""AdamW (Loshchilov and Hutter 2019), in one fused kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from learner.optimizers import Trained
from learner.settings import OptimizerSettings


def decay_groups(trained: Sequence[Trained], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay acts on matrices alone, not on norms and biases. A group without parameters is left out."""
    groups = [
        {"params": [one.parameter for one in trained if one.parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [one.parameter for one in trained if one.parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(trained: Sequence[Trained], settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """Two moments for each parameter, in its own dtype."""
    groups = decay_groups(trained, settings.weight_decay)
    return [torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)]
