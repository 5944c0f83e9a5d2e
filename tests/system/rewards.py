"""Rewards that tests plug in by their path, as a user would."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.rewards import Sample, Score
from actors.rewards.sandbox_service import SandboxService
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

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._seen = itertools.count()

    def score(self, sample: Sample) -> Score:
        return Score(value=float("nan"), status="accepted") if next(self._seen) == 0 else super().score(sample)


class SlowReward(LengthReward):
    """Takes its time, so that kills hit a run in the middle."""

    def score(self, sample: Sample) -> Score:
        time.sleep(float(self._options["seconds"]))
        return super().score(sample)


class CrawlingReward(LengthReward):
    """Takes `seconds`; and 5 s once all reward actors together have scored `count`, so that no machine is too slow for what shall happen meanwhile.

    From when on the file `until` is there it takes no time. It counts by the size of the file `until` + ".scored".
    """

    def score(self, sample: Sample) -> Score:
        until = Path(self._options["until"])
        with until.with_name(f"{until.name}.scored").open("ab") as scored:
            scored.write(b"!")
        end = time.monotonic() + (float(self._options["seconds"]) if scored_by(until) <= int(self._options["count"]) else 5.0)
        while time.monotonic() < end and not until.exists():
            time.sleep(0.02)
        return super().score(sample)


def scored_by(until: Path) -> int:
    return until.with_name(f"{until.name}.scored").stat().st_size


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


class HeldService(SandboxService):
    """A far sandbox host that judges `count` samples of this process; the others go there once there is a file `gate`, and meanwhile `gate`.held."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        options = dict(options)
        self._count, self._gate = itertools.count(1 - int(options.pop("count"))), str(options.pop("gate"))
        super().__init__(options)

    def score(self, sample: Sample) -> Score:
        if next(self._count) > 0:
            Path(f"{self._gate}.held").touch()
            wait_for_file(self._gate)
        return super().score(sample)
