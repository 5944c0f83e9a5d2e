"""A step that computes nothing and takes the time that training would: for measuring schedules without devices.

The weights that it publishes are real safetensors of `weight_bytes` that change with every update, so that publishing, verifying and
swapping are the production code.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from learner.checkpoint import difference
from learner.packing import TrainSample
from learner.parallel import Group
from learner.settings import LearnerSettings
from learner.simulated_options import Options
from learner.step import StepMetrics
from protocol.canary import Canary
from protocol.errors import ConfigError, DataError


class SimulatedStep:
    """Implements `learner.steps.TrainStep`. Raises ConfigError for options that it does not know or that make no sense."""

    def __init__(self, settings: LearnerSettings, model_dir: Path, group: Group) -> None:
        try:
            self._options = Options.model_validate(settings.step_options)
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"simulated step: option {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        torch.set_num_threads(settings.threads)
        self._settings, self.group = settings, group
        self.peak_lr = settings.optimizer.lr
        self._weights = torch.zeros(self._options.weight_bytes, dtype=torch.uint8)

    def train(self, samples: Sequence[TrainSample], iteration: int, total_iterations: int) -> StepMetrics:
        """Wait as long as training on `samples` would take. Samples without a trainable token cost nothing, as in a real step."""
        started = time.monotonic()
        useful = [sample for sample in samples if sample.loss_mask.any()]
        tokens = sum(len(s.prompt_ids) + len(s.token_ids) for s in useful)
        updates = self._settings.updates_per_batch if useful else 0
        if updates:
            self._wait(started, self._options.step_s(tokens, updates, self.group.size))
            self._weights[:8].view(torch.int64).add_(updates)
        return StepMetrics(
            values={
                "num_tokens": float(sum(int(s.loss_mask.sum()) for s in useful)),
                "num_samples": float(len(useful)),
                "tokens_trained": float(tokens * updates),
                "updates": float(updates),
                "updates_skipped": 0.0,
                "skipped": 0.0,
            },
            skipped=(),
        )

    def canary(self) -> Canary | None:
        """None: there is no language model."""
        return None

    def published_tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The weights, after `publish_s`."""
        self._wait(time.monotonic(), self._options.publish_s)
        yield "simulated.weights", self._weights

    def version_tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The same."""
        return self.published_tensors(dtype)

    def help_publishing(self, dtype: torch.dtype | None = None, *, version: bool = False) -> None:
        """Every rank has all."""

    def live_state(self) -> dict[str, Tensor]:
        """The weights; nothing else changes."""
        return {"simulated.weights": self._weights}

    def state_to_fill(self, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Tensor]:
        """The weights themselves. Raises DataError for tensors of another model."""
        found = difference({name: shape for name, (shape, _) in tensors.items()}, {"simulated.weights": tuple(self._weights.shape)})
        if found:
            raise DataError(found)
        return self.live_state()

    def adopt_state(self, tensors: Mapping[str, Tensor]) -> None:
        """They were filled in place."""

    def about(self) -> dict[str, str]:
        """A simulated state goes on in a simulated step alone."""
        return {"model": "simulated", "optimizer": "none"}

    def _wait(self, started_s: float, simulated_s: float) -> None:
        """Until `simulated_s` after `started_s` are over, on the clock of the run."""
        left = started_s + simulated_s / self._options.speed - time.monotonic()
        if left > 0:
            time.sleep(left)
