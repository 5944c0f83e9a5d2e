"""Engines that tests plug in by their path, as a user would."""

from __future__ import annotations

from actors.engines import EngineOptions
from actors.engines.simulated import SimulatedEngine
from protocol.errors import ConfigError


class OneDevice(SimulatedEngine):
    """There is one device, which the first has."""

    def __init__(self, options: EngineOptions) -> None:
        if options.index > 0:
            raise ConfigError(f"engine {options.index}: there is one device here")
        super().__init__(options)
