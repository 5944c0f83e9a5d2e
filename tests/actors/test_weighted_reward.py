"""Several rewards at once: the sum, the missing part, the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from actors.rewards import Sample, Score
from actors.rewards.weighted import Weighted
from protocol.errors import ConfigError, InfrastructureFault, UnknownName

ME = "tests.actors.test_weighted_reward"


class Length:
    """A user's own reward: the length of the text in units of `per`."""

    closed = 0

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._per = float(options.get("per", 1))

    def score(self, sample: Sample) -> Score:
        return Score(
            value=len(sample.completion) / self._per, status="accepted", passed=True, metrics={"length": float(len(sample.completion))}
        )

    def close(self) -> None:
        Length.closed += 1


class Broken(Length):
    """Its machinery is down."""

    def score(self, sample: Sample) -> Score:
        raise InfrastructureFault("no cell")


class Unknown(Length):
    """Finds nothing out."""

    def score(self, sample: Sample) -> Score:
        return Score(value=None, status="failed", detail="nothing known")


SAMPLE = Sample(problem={"id": "p"}, completion="abcd", truncated=False)


def parts(**kinds: tuple[str, float]) -> dict[str, Any]:
    return {name: {"reward": f"{ME}:{kind}", "weight": weight} for name, (kind, weight) in kinds.items()}


def test_the_sum_of_weighted_values() -> None:
    options = {"parts": parts(a=("Length", 2.0), b=("Length", 0.5))}
    options["parts"]["b"]["options"] = {"per": 4}
    score = Weighted(options).score(SAMPLE)
    assert score.value == pytest.approx(2.0 * 4 + 0.5 * 1)
    assert score.parts == {"a": 4.0, "b": 1.0} and score.metrics == {"a/length": 4.0, "b/length": 4.0}
    assert score.passed and score.status == "accepted"


@pytest.mark.parametrize("kind", ["Broken", "Unknown"])
def test_a_missing_part_is_never_zero(kind: str) -> None:
    options = {"parts": parts(a=("Length", 3.0), b=(kind, 1.0))}
    with pytest.raises(InfrastructureFault, match="part 'b' is missing"):
        Weighted(options).score(SAMPLE)
    score = Weighted(options | {"missing": "renormalise"}).score(SAMPLE)
    assert score.value == pytest.approx(4.0 * 4) and score.parts == {"a": 4.0}
    with pytest.raises(InfrastructureFault):
        Weighted({"parts": parts(b=(kind, 1.0)), "missing": "renormalise"}).score(SAMPLE)


def test_bad_options() -> None:
    for options, word in (
        ({}, "parts"),
        ({"parts": {}}, "parts"),
        ({"parts": {"a": {"reward": "x", "weight": 0}}}, "parts.a.weight"),
        ({"parts": parts(a=("Length", 1.0)), "mising": "fail"}, "mising"),
    ):
        with pytest.raises(ConfigError, match=word):
            Weighted(options)
    before = Length.closed
    with pytest.raises(UnknownName):
        Weighted({"parts": {**parts(a=("Length", 1.0)), "b": {"reward": "no_such_reward"}}})
    assert Length.closed == before + 1


def test_close_reaches_every_part() -> None:
    before = Length.closed
    Weighted({"parts": parts(a=("Length", 1.0), b=("Length", 1.0))}).close()
    assert Length.closed == before + 2
