"""Scores before they become advantages."""

from __future__ import annotations

import pytest

from learner.shaping import overlong_penalty, shaped_score, weighted_score


@pytest.mark.parametrize(("tokens", "penalty"), [(0, 0), (75, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1), (130, -1)])
def test_overlong_penalty_is_dapo_eq_13(tokens: int, penalty: float) -> None:
    assert overlong_penalty(tokens, max_tokens=100, cache_tokens=20) == pytest.approx(penalty)


def test_weights_must_name_the_parts_exactly() -> None:
    assert weighted_score({"tests": 0.5, "format": 1.0}, {"format": 0.1, "tests": 2.0}) == pytest.approx(1.1)
    for weights in ({"tests": 1.0}, {"tests": 1.0, "format": 1.0, "style": 1.0}):
        with pytest.raises(ValueError, match=r"\['format', 'tests'\]"):
            weighted_score({"tests": 0.5, "format": 1.0}, weights)


def test_shaping_is_optional_and_adds_up() -> None:
    assert shaped_score(0.3, {"tests": 1.0}, 90, max_tokens=100, weights=None, penalty_tokens=None) == 0.3
    assert shaped_score(0.3, {"tests": 1.0}, 90, max_tokens=100, weights={"tests": 2.0}, penalty_tokens=20) == pytest.approx(1.5)
