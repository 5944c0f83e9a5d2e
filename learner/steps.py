"""What the trainer calls a step: a batch goes in, the policy moves. This file is the interface and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from protocol.registry import resolve

if TYPE_CHECKING:
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
    """One rank's part of every update."""

    def train(self, samples: Sequence[TrainSample], iteration: int, total_iterations: int) -> StepMetrics:
        """Update the policy on one batch, the same `samples` on every rank."""

    def state_dict_for_publishing(self) -> dict[str, Tensor]:
        """Copies on the CPU of what generators load."""

    def training_state(self) -> dict[str, Tensor]:
        """Copies on the CPU of everything that the next update depends on."""

    def load_training_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `training_state`. Raises ValueError for tensors of another model."""


def build_step(settings: LearnerSettings, model_dir: Path, group: Group) -> TrainStep:
    """The step that the settings name."""
    step: TrainStep = resolve(settings.step, STEPS, "step")(settings, model_dir, group)
    return step
