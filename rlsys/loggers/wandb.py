"""Weights & Biases, and Trackio, which speaks the same calls: `pip install rlsys[wandb]` or `rlsys[trackio]`.

Where data goes is the libraries' own affair: WANDB_MODE=offline keeps it in the run directory, Trackio keeps it on this machine.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from protocol.errors import ConfigError
from rlsys.loggers import LoggedRun


class WandbLogger:
    """One run of the project "rlsys"; its files go into the run directory. Set WANDB_PROJECT for another project."""

    library = "wandb"

    def __init__(self, run: LoggedRun) -> None:
        try:
            self._library: Any = importlib.import_module(self.library)
        except ImportError:
            raise ConfigError(f"observe.loggers: {self.library} is not installed; pip install 'rlsys[{self.library}]'") from None
        self._run: Any = self._begin(run)

    def _begin(self, run: LoggedRun) -> Any:
        return self._library.init(
            project=os.environ.get("WANDB_PROJECT", "rlsys"), name=run.run_dir.name, dir=str(run.run_dir), config=dict(run.parameters())
        )

    def scalars(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """One row; evaluations come under the version, so that steps may repeat."""
        self._run.log({**values, "iteration": step})

    def histogram(self, step: int, time_s: float, name: str, edges: Sequence[float], counts: Sequence[int]) -> None:
        """As the library's own histogram."""
        self._run.log({name: self._library.Histogram(np_histogram=(list(counts), list(edges))), "iteration": step})

    def text(self, step: int, time_s: float, name: str, markdown: str) -> None:
        """As a table of one cell."""
        self._run.log({name: self._library.Table(columns=["text"], data=[[markdown]]), "iteration": step})

    def close(self) -> None:
        """Wait until what was logged has been written."""
        self._run.finish()


class TrackioLogger(WandbLogger):
    """Trackio has no histograms; those are left out."""

    library = "trackio"

    def _begin(self, run: LoggedRun) -> Any:
        return self._library.init(project=os.environ.get("TRACKIO_PROJECT", "rlsys"), name=run.run_dir.name, config=dict(run.parameters()))

    def histogram(self, step: int, time_s: float, name: str, edges: Sequence[float], counts: Sequence[int]) -> None:
        """Nothing."""

    def text(self, step: int, time_s: float, name: str, markdown: str) -> None:
        """As text."""
        self._run.log({name: markdown, "iteration": step})
