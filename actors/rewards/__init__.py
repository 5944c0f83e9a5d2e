"""Rewards: what turns a completion into a score. This file is the interface and the table.

To add one: a new file beside this one and a line in REWARDS, or no line for your own "my_pkg.mod:Class".
`tests/contracts/test_rewards.py` tests every entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

REWARDS = {
    "math_answer": "actors.rewards.math_answer:MathAnswer",
    "sandbox_service": "actors.rewards.sandbox_service:SandboxService",
    "simulated": "actors.rewards.simulated:Simulated",
    "unit_tests": "actors.rewards.unit_tests:UnitTests",
    "weighted": "actors.rewards.weighted:Weighted",
}
"""Name in the configuration -> class. The class is built as `Class(options: Mapping[str, Any])`, once in each reward actor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The number, and how it was obtained.

    `value` None means that nothing is known (missing, never 0). `passed` is what counts for pass@1.
    """

    value: float | None
    status: str
    """accepted, wrong_answer, runtime_error, time_limit, memory_limit, output_limit, compile_error, unparseable, ..."""
    passed: bool = False
    detail: str = ""
    """One line for people."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    """Where several functions make the score: the value of each, before weighting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What a reward sees: the problem as the dataset has it, and the text that the policy wrote."""

    problem: Mapping[str, Any]
    completion: str
    truncated: bool


class Reward(Protocol):
    """Scores samples. `score` is called from several threads at once.

    It raises InfrastructureFault when our own machinery broke (the sample is scored again) and DataError for a problem that cannot be judged
    (the run goes on without it and counts it); text that a model wrote must never make it raise.
    """

    def score(self, sample: Sample) -> Score:
        """The score of one sample; blocks until it is known. Bounded in time by the reward's own limits."""

    def close(self) -> None:
        """End every process that the reward started."""
