"""MLflow: `pip install rlsys[mlflow]`. The server is the library's own setting, MLFLOW_TRACKING_URI; by default a folder here."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from protocol.errors import ConfigError
from rlsys.loggers import LoggedRun


class MlflowLogger:
    """One MLflow run of the experiment "rlsys". Histograms are left out: MLflow has none."""

    def __init__(self, run: LoggedRun) -> None:
        try:
            self._mlflow: Any = importlib.import_module("mlflow")
        except ImportError:
            raise ConfigError("observe.loggers: mlflow is not installed; pip install 'rlsys[mlflow]'") from None
        self._mlflow.set_experiment("rlsys")
        self._mlflow.start_run(run_name=run.run_dir.name)
        self._mlflow.log_params({name: str(value)[:500] for name, value in run.parameters().items()})

    def scalars(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """Numbers that are finite."""
        self._mlflow.log_metrics({name: value for name, value in values.items() if math.isfinite(value)}, step=step)

    def histogram(self, step: int, time_s: float, name: str, edges: Sequence[float], counts: Sequence[int]) -> None:
        """Nothing."""

    def text(self, step: int, time_s: float, name: str, markdown: str) -> None:
        """As a file."""
        self._mlflow.log_text(markdown, f"{name}/{step:06d}.md")

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()
