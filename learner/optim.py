"""The optimizer, its schedule, and its state as plain named tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from learner.settings import OptimizerSettings, ScheduleSettings
from protocol.errors import DataError


def learning_rate(peak: float, schedule: ScheduleSettings, iteration: int, total_iterations: int) -> float:
    """The rate of `iteration` (from 0) of `total_iterations`.

    Rises as (iteration + 1) / warmup_iterations to the peak, then goes to `final_fraction` of it at the last iteration. Iterations beyond
    the last keep the last rate.
    """
    if iteration < schedule.warmup_iterations:
        return peak * (iteration + 1) / schedule.warmup_iterations
    if schedule.name == "constant":
        return peak
    span = total_iterations - 1 - schedule.warmup_iterations
    progress = min((iteration - schedule.warmup_iterations) / span, 1.0) if span > 0 else 1.0
    left = (1 + math.cos(math.pi * progress)) / 2 if schedule.name == "cosine" else 1 - progress
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * left)


def build_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW in one fused kernel. Weight decay acts on matrices alone, not on norms and biases."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's state as "optimizer.<what>.<parameter>" -> tensor (live, no copies). Empty before the first step."""
    return {f"optimizer.{what}.{names[parameter]}": value for parameter, state in optimizer.state.items() for what, value in state.items()}


def empty_optimizer_tensors(names: Mapping[Tensor, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors to load "optimizer.<what>.<parameter>" of these shapes into, placed (and sharded) as their parameter is.

    Raises DataError for a tensor that belongs to no parameter or has neither its shape nor that of a single number.
    """
    known = {name: parameter for parameter, name in names.items()}
    found = {}
    for key, shape in shapes.items():
        _, _, name = key.split(".", 2)
        if name not in known:
            raise DataError(f"optimizer state {key!r} belongs to no parameter of this model")
        if tuple(shape) == tuple(known[name].shape):
            found[key] = torch.empty_like(known[name], requires_grad=False)
        elif not shape:
            found[key] = torch.empty((), device=known[name].device)
        else:
            raise DataError(f"optimizer state {key!r} has shape {list(shape)}, its parameter {list(known[name].shape)}")
    return found


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; takes the tensors over. Raises DataError for one that belongs to no parameter."""
    known = {name: parameter for parameter, name in names.items()}
    optimizer.state.clear()
    for key, value in tensors.items():
        _, what, name = key.split(".", 2)
        if name not in known:
            raise DataError(f"optimizer state {key!r} belongs to no parameter of this model")
        optimizer.state[known[name]][what] = value.detach()
