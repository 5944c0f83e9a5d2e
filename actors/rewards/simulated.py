"""A reward that judges nothing and takes the time that judging would: for measuring schedules without a sandbox.

`rewarders.count` x `rewarders.concurrency` samples are scored at once: that many sandboxes are simulated. Whether a sample passes depends
on its text alone.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field

from actors.rewards import Sample, Score
from actors.rewards.options import parse_options


class Options(BaseModel):
    """Options of `simulated` in the configuration. Times are those of the simulated sandbox; the run is faster by `speed`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    seconds: float = Field(default=0.0, ge=0)
    """Of one sample."""
    pass_share: float = Field(default=0.5, ge=0, le=1)
    """Share of samples that pass."""
    speed: float = Field(default=1.0, gt=0)
    """Simulated seconds in one second of the run; the same in every simulated part."""


class Simulated:
    """Waits, then passes or fails a sample by a hash of its text. Empty text fails."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Raises ConfigError for bad options."""
        self._options = parse_options(Options, "simulated", options)
        self._closed = threading.Event()

    def score(self, sample: Sample) -> Score:
        """1 or 0 after `seconds`."""
        if self._options.seconds:
            self._closed.wait(self._options.seconds / self._options.speed)
        share = xxhash.xxh3_64_intdigest(sample.completion.encode("utf-8", "surrogatepass")) / 2**64
        passed = bool(sample.completion) and share < self._options.pass_share
        return Score(value=float(passed), status="accepted" if passed else "wrong_answer", passed=passed)

    def close(self) -> None:
        """End all waits."""
        self._closed.set()
