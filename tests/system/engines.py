"""Engines that tests plug in by their path."""

from __future__ import annotations

from dataclasses import replace

from actors.dispatcher import sample_seed
from actors.engines import SampleRequest
from actors.engines.simulated import SimulatedEngine


class FreshSeeds(SimulatedEngine):
    """What rlsys must never do: a sample that is drawn again after a death is another draw."""

    def submit(self, request: SampleRequest) -> None:
        attempt = int(request.request_id.partition("/")[2].partition("~")[0])
        if attempt:
            request = replace(request, seeds=tuple(sample_seed(seed, attempt, 0) for seed in request.seeds))
        super().submit(request)
