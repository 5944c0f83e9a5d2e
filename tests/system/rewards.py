"""Rewards that tests plug in by their path, as a user would."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.rewards import Sample, Score
from protocol.errors import InfrastructureFault


def wait_for_file(path: str) -> None:
    """Hang until somebody makes it."""
    while not Path(path).exists():
        time.sleep(0.05)


class LengthReward:
    """Shorter is better: cheap, differs between samples, and any model can learn it."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options

    def score(self, sample: Sample) -> Score:
        value = 1.0 / (1.0 + len(sample.completion))
        return Score(value=value, status="accepted", passed=len(sample.completion) < 40)

    def close(self) -> None:
        """Nothing to end."""


class BrokenReward(LengthReward):
    """A user's reward with a bug in it."""

    def score(self, sample: Sample) -> Score:
        raise KeyError("answer")


class FaultyReward(LengthReward):
    """Machinery that fails for every problem whose id ends in an even digit."""

    def score(self, sample: Sample) -> Score:
        if int(sample.problem["id"][-1]) % 2 == 0:
            raise InfrastructureFault("the judge is on fire")
        return super().score(sample)


class OnceNotFinite(LengthReward):
    """NaN for the first sample that it sees."""

    seen = 0

    def score(self, sample: Sample) -> Score:
        self.seen += 1
        return Score(value=float("nan"), status="accepted") if self.seen == 1 else super().score(sample)


class SlowReward(LengthReward):
    """Takes its time, so that kills hit a run in the middle; until a file appears, if one is named."""

    def score(self, sample: Sample) -> Score:
        if not Path(self._options.get("until", "/nowhere")).exists():
            time.sleep(float(self._options["seconds"]))
        return super().score(sample)


class HangingReward(LengthReward):
    """Waits for a file that nobody writes."""

    def score(self, sample: Sample) -> Score:
        wait_for_file(self._options["file"])
        return super().score(sample)


class HangingThenBusyReward(LengthReward):
    """Waits for a file, and then computes without an end until there is another."""

    def score(self, sample: Sample) -> Score:
        wait_for_file(self._options["file"])
        while not Path(self._options["busy"]).exists():
            sum(range(20_000))
        return super().score(sample)


class HoldingReward(LengthReward):
    """The samples of some problems wait for a file each; all others are scored at once."""

    def score(self, sample: Sample) -> Score:
        if sample.problem["id"] in self._options["gates"]:
            wait_for_file(self._options["gates"][sample.problem["id"]])
        return super().score(sample)
