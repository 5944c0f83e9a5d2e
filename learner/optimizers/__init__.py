"""Optimizers: what turns a gradient into an update. This file is the interface and the table.

An optimizer is a function `(trained: Sequence[Trained], settings: OptimizerSettings) -> list[torch.optim.Optimizer]` whose results together hold
every trained parameter once. To add one: a new file beside this one and a line in OPTIMIZERS, or no line for your own
"my_pkg.mod:function"; `tests/contracts/test_optimizers.py` tests every entry: it learns, goes on from a checkpoint to the same bits, and works
on sharded parameters or says why not. Imports no torch, so that names are checked without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from learner.settings import OptimizerSettings

OPTIMIZERS = {
    "adamw": "learner.optimizers.adamw:adamw",
    "muon": "learner.optimizers.muon:muon",
    "adamw_8bit": "learner.optimizers.low_memory:adamw_8bit",
    "paged_adamw": "learner.optimizers.low_memory:paged_adamw",
    "paged_adamw_8bit": "learner.optimizers.low_memory:paged_adamw_8bit",
}
"""Name in the configuration -> function."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A parameter that is trained."""

    name: str
    parameter: nn.Parameter
    embedding: bool
    """Whether it is the input embedding or the head: a table of tokens, not a map between hidden states."""


Build = Callable[[Sequence[Trained], "OptimizerSettings"], "list[Optimizer]"]
"""What a table entry is."""
