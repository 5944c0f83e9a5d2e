"""AdamW with less memory, by bitsandbytes: moments in 8 bits, or in pages that move to host memory when the GPU runs out.

Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"; paging: QLoRA (Dettmers et al. 2023).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from learner.optimizers import Trained
from learner.optimizers.adamw import decay_groups
from learner.settings import OptimizerSettings
from protocol.errors import ConfigError


def adamw_8bit(trained: Sequence[Trained], settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """Two moments of one byte for each number (tensors below 4,096 numbers: float32). On CPU and CUDA."""
    return _build("AdamW8bit", trained, settings)


def paged_adamw(trained: Sequence[Trained], settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """AdamW whose moments the driver moves between GPU and host as they are used. CUDA only."""
    return _build("PagedAdamW", trained, settings)


def paged_adamw_8bit(trained: Sequence[Trained], settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """Both. CUDA only."""
    return _build("PagedAdamW8bit", trained, settings)


def _build(kind: str, trained: Sequence[Trained], settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    name = settings.name
    if any(isinstance(one.parameter, DTensor) for one in trained):
        raise ConfigError(
            f"optimizer {name!r} quantises blocks of whole tensors, so it cannot work on sharded ones, nor can its state be cut anew: "
            "set learner.sharding to none, or take adamw, whose state sharding makes as many times smaller as there are ranks"
        )
    if kind.startswith("Paged") and any(one.parameter.device.type != "cuda" for one in trained):
        raise ConfigError(f"optimizer {name!r} pages GPU memory and the learner runs on a CPU: take adamw or adamw_8bit")
    if any(one.parameter.dtype == torch.float64 for one in trained):
        raise ConfigError(f"optimizer {name!r} computes in float32: learner.dtype float64 needs adamw")
    try:
        optimizers: Any = importlib.import_module("bitsandbytes.optim")
    except ImportError:
        raise ConfigError(f"optimizer {name!r} needs bitsandbytes: pip install 'rlsys[low-memory]'") from None
    found: torch.optim.Optimizer = getattr(optimizers, kind)(
        decay_groups(trained, settings.weight_decay), lr=settings.lr, betas=settings.betas, eps=settings.eps
    )
    return [found]
