"""Several rewards for one sample, each with a weight.

The value is sum(weight * value) over the parts. A part that fails for a reason of ours is missing and not 0: by default the
sample is scored again as a whole, and `missing: renormalise` takes the weighted mean of the parts that are known instead, at the scale
of all weights. A part that is NaN or infinite is missing too: the sample has no score then, unless the others are renormalised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from actors.rewards import REWARDS, Reward, Sample, Score
from actors.rewards.options import parse_options
from protocol.errors import InfrastructureFault
from protocol.registry import resolve


class Part(BaseModel):
    """One of the rewards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reward: str
    """A name of REWARDS, or your own "my_pkg.mod:Class"."""
    weight: float = Field(default=1.0, gt=0)
    options: dict[str, Any] = Field(default_factory=dict)


class Options(BaseModel):
    """Options of `weighted` in the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parts: dict[str, Part] = Field(min_length=1)
    """By a name of your choice, under which the part's score is recorded. The first one decides `passed` and the status."""
    missing: Literal["fail", "renormalise"] = "fail"


class Weighted:
    """Scores a sample by each part in turn."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Raises ConfigError for bad options, UnknownName for a part that does not exist, and what the parts raise."""
        self._options = parse_options(Options, "weighted", options)
        self._rewards: dict[str, Reward] = {}
        try:
            for name, part in self._options.parts.items():
                self._rewards[name] = resolve(part.reward, REWARDS, "reward")(part.options)
        except BaseException:
            self.close()
            raise

    def score(self, sample: Sample) -> Score:
        """Raises DataError as the parts do, and InfrastructureFault when a part is missing that must not be, or all are."""
        scores: dict[str, Score] = {}
        faults: dict[str, str] = {}
        for name, reward in self._rewards.items():
            try:
                score = reward.score(sample)
            except InfrastructureFault as fault:
                faults[name] = str(fault)
                continue
            if score.value is None:
                faults[name] = f"{score.status} {score.detail}".strip()
            elif self._options.missing == "renormalise" and not math.isfinite(score.value):
                faults[name] = f"its value is {score.value}"
            else:
                scores[name] = score
        if faults and (self._options.missing == "fail" or not scores):
            raise InfrastructureFault("; ".join(f"part {name!r} is missing: {why}" for name, why in faults.items()))
        return self._total(scores)

    def _total(self, scores: Mapping[str, Score]) -> Score:
        weights = {name: part.weight for name, part in self._options.parts.items()}
        values = {name: score.value for name, score in scores.items() if score.value is not None}
        scale = sum(weights.values()) / sum(weights[name] for name in values)
        leading = scores[next(iter(values))]
        return Score(
            value=scale * sum(weights[name] * value for name, value in values.items()),
            status=leading.status,
            passed=leading.passed,
            detail=leading.detail,
            parts=values,
            metrics={f"{name}/{key}": number for name, score in scores.items() for key, number in score.metrics.items()},
        )

    def close(self) -> None:
        """Close every part."""
        for reward in self._rewards.values():
            reward.close()
