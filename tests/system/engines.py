"""Engines that tests plug in by their path, as a user would."""

from __future__ import annotations

from dataclasses import replace

from actors.dispatcher import sample_seed
from actors.engines import EngineOptions, SampleRequest
from actors.engines.simulated import SimulatedEngine
from protocol.errors import ConfigError


class OneDevice(SimulatedEngine):
    """There is one device, which the first has."""

    def __init__(self, options: EngineOptions) -> None:
        if options.index > 0:
            raise ConfigError(f"engine {options.index}: there is one device here")
        super().__init__(options)


class FreshSeeds(SimulatedEngine):
    """What rlsys must never do: a sample that is drawn again after a death is another draw."""

    def submit(self, request: SampleRequest) -> None:
        attempt = int(request.request_id.partition("/")[2].partition("~")[0])
        if attempt:
            request = replace(request, seeds=tuple(sample_seed(seed, attempt, 0) for seed in request.seeds))
        super().submit(request)
