"""Loggers: where the numbers of a run go. This file is the interface and the table.

To add one: a new file beside this one and a line in LOGGERS, or no line for a class of your own: `observe.loggers: ["my_pkg.mod:Class"]`.
Each runs in the dashboard's process; one that breaks is reported and left out, and the run goes on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from protocol.errors import ConfigError
from protocol.registry import resolve

LOGGERS = {
    "tensorboard": "rlsys.loggers.tensorboard:TensorBoardLogger",
    "wandb": "rlsys.loggers.wandb:WandbLogger",
    "trackio": "rlsys.loggers.wandb:TrackioLogger",
    "mlflow": "rlsys.loggers.mlflow:MlflowLogger",
}
"""Name in `observe.loggers` -> class. The class is built as `Class(run: LoggedRun)`. All but the first need an extra: `pip install rlsys[wandb]`."""


PACKAGES = {"wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
"""Name -> the package that it cannot do without; the extra is called like the logger."""


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError for a logger that does not exist or whose package is not there. Imports none of these packages."""
    for name in names:
        package = PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(f"observe.loggers: {package} is not installed; pip install 'rlsys[{name}]'")
        if package is None and name not in LOGGERS:
            resolve(name, LOGGERS, "logger")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedRun:
    """What a logger is built from."""

    name: str
    run_dir: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration as plain data."""

    def parameters(self) -> dict[str, float | str | bool]:
        """The configuration as flat names, `learner.optimizer.lr`, with values that every logger can hold."""
        flat: dict[str, float | str | bool] = {}

        def walk(prefix: str, value: Any) -> None:
            if isinstance(value, Mapping):
                for key, inner in value.items():
                    walk(f"{prefix}.{key}" if prefix else str(key), inner)
            elif value is not None:
                flat[prefix] = value if isinstance(value, bool | int | float) else str(value)

        walk("", self.config)
        return flat


class Logger(Protocol):
    """Takes what is logged. Called by one thread."""

    def scalars(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """The numbers of one iteration, under the names of docs/metrics.md. NaN means that there is none."""

    def histogram(self, step: int, time_s: float, name: str, edges: Sequence[float], counts: Sequence[int]) -> None:
        """How often values fell between neighbouring edges; one edge more than counts."""

    def text(self, step: int, time_s: float, name: str, markdown: str) -> None:
        """Something to read."""

    def close(self) -> None:
        """Write what is left."""
