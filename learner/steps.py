"""What the trainer calls a step: a batch goes in, the policy moves. This file is the interface and the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from protocol.canary import Canary
from protocol.registry import resolve

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from learner.packing import TrainSample
    from learner.parallel import Group
    from learner.settings import LearnerSettings
    from learner.step import StepMetrics

STEPS = {
    "gradient": "learner.step:Step",
    "simulated": "learner.simulated_step:SimulatedStep",
}
"""Name in the configuration -> class. The class is built as `Class(settings, model_dir, group)`, once on each rank."""

STEP_OPTIONS = {
    "simulated": "learner.simulated_options:Options",
}
"""Name -> pydantic model of `learner.step_options`, importable without torch. A step that is not here has none."""


class TrainStep(Protocol):
    """One rank's part of every update, and (the last four) what `learner/checkpoint.py` needs of it."""

    group: Group
    peak_lr: float
    """The learning rate that the schedule multiplies; the trainer sets it where a stage has another."""

    def train(self, samples: Sequence[TrainSample], iteration: int, total_iterations: int) -> StepMetrics:
        """Update the policy on one batch, the same `samples` on every rank."""

    def canary(self) -> Canary | None:
        """Log-probs of a fixed sequence under the present parameters, for generators to prove themselves by; None without a language model.

        Rank 0 asks before it publishes, the others before they help with that.
        """

    def published_tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The whole policy, one tensor after the other, in `dtype` if given; they may be live ones. On rank 0."""

    def version_tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """What generators load of a version: the same, or only what they lack (adapters)."""

    def help_publishing(self, dtype: torch.dtype | None = None, *, version: bool = False) -> None:
        """What the other ranks do while rank 0 goes through `published_tensors`, or `version_tensors` for a version.

        Returns when it is done, or at once if it needs no help.
        """

    def live_state(self) -> dict[str, Tensor]:
        """Everything that the next update depends on, without copies; a sharded tensor is a DTensor."""

    def state_to_fill(self, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Tensor]:
        """Tensors to load a state of these whole shapes and dtypes into. Raises DataError with named differences when it is of another model."""

    def adopt_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state_to_fill` gave, once it was filled."""

    def about(self) -> dict[str, str]:
        """What must agree between a state and the step that goes on from it."""


def build_step(settings: LearnerSettings, model_dir: Path, group: Group) -> TrainStep:
    """The step that the settings name."""
    step: TrainStep = resolve(settings.step, STEPS, "step")(settings, model_dir, group)
    return step
