"""How long simulated completions are: a log-normal with a cap, or lengths that were recorded, and now and then a straggler. Pure.

The length of a sample depends on its seed alone, so that every schedule and every attempt draws the same.
"""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from protocol.errors import DataError

_NORMAL = NormalDist()


class LengthOptions(BaseModel):
    """Tokens of a completion. Give `mean`, `sigma` and `cap`, or `file`, or `values`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    mean: float | None = Field(None, gt=0, description="mean tokens of what is sampled, that is after the cap")
    sigma: float = Field(0.9, ge=0, description="standard deviation of the logarithm before the cap; 0 makes all alike")
    cap: int | None = Field(None, ge=1, description="longest; as a rule sampling.max_tokens")
    file: Path | None = Field(None, description="recorded lengths instead: a JSON list, or one whole number a line")
    values: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(None, min_length=1, description="recorded lengths, written out")
    straggler_share: float = Field(0.0, ge=0, lt=1, description="share of samples that are stragglers")
    straggler_tokens: int | None = Field(None, ge=1, description="tokens of a straggler; the cap does not cut it")

    def cut(self, most: int) -> LengthOptions:
        """The same lengths when sampling ends at `most` tokens: what is longer is cut, so the mean falls."""
        changes: dict[str, object] = {}
        if self.mean is not None and (self.cap is None or self.cap > most):
            mean = capped_mean(location(self.mean, self.sigma, self.cap), self.sigma, most)
            changes = {"cap": most, "mean": mean if self.sigma == 0 else min(mean, math.nextafter(most, 0.0))}
        elif self.mean is None:
            recorded = self.values if self.file is None else _read(self.file)
            changes = {"file": None, "values": tuple(min(length, most) for length in recorded or ())}
        if self.straggler_tokens is not None:
            changes["straggler_tokens"] = min(self.straggler_tokens, most)
        return LengthOptions.model_validate({**self.model_dump(), **changes})

    @model_validator(mode="after")
    def _one_source(self) -> LengthOptions:
        if [self.mean, self.file, self.values].count(None) != 2:
            raise ValueError("give either mean (with sigma and cap), file or values")
        if self.mean is not None and self.cap is not None and self.mean >= self.cap and not (self.sigma == 0 and self.mean == self.cap):
            raise ValueError(f"mean {self.mean:g} must lie below cap {self.cap}: it is the mean after the cap")
        if (self.straggler_share > 0) != (self.straggler_tokens is not None):
            raise ValueError("straggler_share and straggler_tokens belong together: give both or neither")
        return self


class Lengths:
    """`lengths(seed)` is the number of tokens of a sample. Raises DataError for a file that does not hold lengths."""

    def __init__(self, options: LengthOptions) -> None:
        self.options = options
        self._recorded = sorted(_read(options.file) if options.file is not None else options.values or ())
        self._mu = 0.0
        if options.mean is not None:
            self._mu = location(options.mean, options.sigma, options.cap)

    def __call__(self, seed: int) -> int:
        """Tokens of the sample with this seed, at least 1."""
        options = self.options
        if options.straggler_tokens is not None and uniform(seed, 1) < options.straggler_share:
            return options.straggler_tokens
        return self.quantile(uniform(seed, 0))

    def is_straggler(self, seed: int) -> bool:
        """Whether the sample with this seed is one."""
        return self.options.straggler_tokens is not None and uniform(seed, 1) < self.options.straggler_share

    def quantile(self, share: float) -> int:
        """The length below which `share` of the samples lie, stragglers aside."""
        if self._recorded:
            return self._recorded[min(len(self._recorded) - 1, int(share * len(self._recorded)))]
        drawn = math.exp(self._mu + self.options.sigma * _NORMAL.inv_cdf(min(max(share, 1e-12), 1 - 1e-12)))
        return max(1, round(min(drawn, self.options.cap or drawn)))

    @cached_property
    def mean(self) -> float:
        """Expected tokens of a sample, stragglers included."""
        options = self.options
        plain = sum(self._recorded) / len(self._recorded) if self._recorded else float(options.mean or 0.0)
        return (1 - options.straggler_share) * plain + options.straggler_share * (options.straggler_tokens or 0)


def uniform(seed: int, stream: int) -> float:
    """A number in (0, 1) from (seed, stream), by the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (seed + (stream + 1) * 0x9E3779B97F4A7C15) & 0xFFFF_FFFF_FFFF_FFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFF_FFFF_FFFF_FFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFF_FFFF_FFFF_FFFF
    return (((x ^ (x >> 31)) >> 11) + 0.5) / (1 << 53)


def capped_mean(mu: float, sigma: float, cap: float | None) -> float:
    """E[min(X, cap)] for ln X ~ N(mu, sigma^2)."""
    free = math.exp(mu + sigma * sigma / 2)
    if cap is None:
        return free
    if sigma == 0:
        return min(free, cap)
    place = (math.log(cap) - mu) / sigma
    return free * _NORMAL.cdf(place - sigma) + cap * (1 - _NORMAL.cdf(place))


def location(mean: float, sigma: float, cap: float | None) -> float:
    """The mu with which the mean after the cap is `mean`, by bisection."""
    low = high = math.log(mean) - sigma * sigma / 2
    while cap is not None and capped_mean(high, sigma, cap) < mean * (1 - 1e-12) and high < 100:
        high += 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if capped_mean(middle, sigma, cap) < mean else (low, middle)
    return high


def _read(path: Path) -> list[int]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if text.lstrip().startswith("[") else [int(line) for line in text.split()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a list of lengths ({error}); expected a JSON list or one whole number a line") from None
    if not values or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values):
        raise DataError(f"{path}: expected at least one length, all whole numbers above 0")
    return list(values)
