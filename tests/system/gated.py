"""Stages of a simulated run that stand still until the test lets them go on, and a device that waits for a swap: what is to be seen lasts."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.engines import EngineLoad, EngineOptions, Sampled, SampleRequest
from actors.engines.simulated import SimulatedEngine
from actors.rewards import Sample, Score
from actors.rewards.simulated import Simulated
from learner.packing import TrainSample
from learner.simulated_step import SimulatedStep
from learner.step import StepMetrics
from protocol.messages import Version
from tests.system.rewards import wait_for_file

GATE = "RLSYS_TEST_GATE"
"""Environment variable: the file that opens the gate."""
HELD_ITERATION = 3
HELD_SAMPLE = 256
"""The first sample that waits, of those that a reward actor scores: iteration 4 has begun to be scored."""


class GatedStep(SimulatedStep):
    """Trains iteration 3 once the file is there."""

    def train(self, samples: Sequence[TrainSample], iteration: int, total_iterations: int) -> StepMetrics:
        if iteration == HELD_ITERATION:
            wait_for_file(os.environ[GATE])
        return super().train(samples, iteration, total_iterations)


class GatedReward(Simulated):
    """Scores sample 256 and all behind it once the file is there."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._count = itertools.count()

    def score(self, sample: Sample) -> Score:
        if next(self._count) >= HELD_SAMPLE:
            wait_for_file(os.environ[GATE])
        return super().score(sample)


class _Clock:
    """The machine's, but for the time in which it stands."""

    def __init__(self) -> None:
        self._seen, self.now = time.monotonic(), 0.0
        self.stands = False

    def __call__(self) -> float:
        seen = time.monotonic()
        self.now += 0.0 if self.stands else seen - self._seen
        self._seen = seen
        return self.now


class AwaitsSwap(SimulatedEngine):
    """Begins what is for iteration 1 after all of iteration 0, and stands still then until v1 is there: so it is swapped in while samples run."""

    groups_per_iteration = 8

    def __init__(self, options: EngineOptions) -> None:
        self._watch, self._later = _Clock(), list[SampleRequest]()
        super().__init__(options, self._watch)

    @property
    def load(self) -> EngineLoad:
        load = super().load
        return replace(load, waiting=load.waiting + sum(len(request.seeds) for request in self._later))

    def submit(self, request: SampleRequest) -> None:
        group = int(request.request_id.partition("/")[0])
        if self.version == Version(0) and group >= self.groups_per_iteration:
            self._later.append(request)
        else:
            super().submit(request)

    def step(self, timeout_s: float) -> list[Sampled]:
        ended = super().step(timeout_s)
        if self._later and not super().load.running:
            self._begin_later()
        return ended

    def load_weights(self, directory: Path, version: Version) -> float:
        if self._later:
            self._begin_later()
        paused = super().load_weights(directory, version)
        self._watch.stands = False
        return paused

    def _begin_later(self) -> None:
        later, self._later = self._later, []
        for request in later:
            super().submit(request)
        self._watch.now += 1e-3  # for some tokens of v0
        self._watch.stands = True
