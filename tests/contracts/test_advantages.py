"""Every advantage function: the formula, sample by sample, and what all of them share."""

from __future__ import annotations

from itertools import combinations, pairwise
from statistics import fmean, pstdev, stdev
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner import advantages as module
from learner.advantages import ADVANTAGES, STD_FLOOR, FloatArray

Groups = dict[int, list[float]]


def grpo(groups: Groups, group: int, i: int) -> float:
    scores = groups[group]
    return 0.0 if len(scores) == 1 else (scores[i] - fmean(scores)) / (stdev(scores) + STD_FLOOR)


def dr_grpo(groups: Groups, group: int, i: int) -> float:
    return groups[group][i] - fmean(groups[group])


def rloo(groups: Groups, group: int, i: int) -> float:
    others = groups[group][:i] + groups[group][i + 1 :]
    return groups[group][i] - fmean(others) if others else 0.0


def reinforce_pp(groups: Groups, group: int, i: int) -> float:
    scores = [score for members in groups.values() for score in members]
    return (groups[group][i] - fmean(scores)) / (stdev(scores) + STD_FLOOR)


def reinforce_pp_baseline(groups: Groups, group: int, i: int) -> float:
    centred = [score - fmean(members) for members in groups.values() for score in members]
    return (groups[group][i] - fmean(groups[group]) - fmean(centred)) / (stdev(centred) + STD_FLOOR)


def pass_at_k(groups: Groups, group: int, i: int, k: int = 4) -> float:
    """By listing every draw of k: the mean standardised reward of the draws that hold the sample."""
    right = [score >= 1 for score in groups[group]]
    draws = list(combinations(range(len(right)), min(k, len(right))))
    rewards = [float(any(right[j] for j in draw)) for draw in draws]
    if pstdev(rewards) == 0:
        return 0.0
    mine = [reward for draw, reward in zip(draws, rewards, strict=True) if i in draw]
    return (fmean(mine) - fmean(rewards)) / pstdev(rewards)


FORMULAS = {f.__name__: f for f in (grpo, dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline, pass_at_k)}
GROUPS = {
    7: [1.0, 0.0, 0.0, 1.0, 0.0],
    3: [0.25, 1.0, 0.5, 0.0],
    9: [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    1: [0.5],
    4: [0.1, 0.1, 0.1],
    5: [1.0, 1.0, 1.0, 1.0],
}


def advantages(name: str, options: dict[str, Any], scores: list[float], ids: list[int]) -> FloatArray:
    """With every sample of a full score passed."""
    return module.advantages(name, options, scores, ids, [score >= 1 for score in scores])


def flat(groups: Groups) -> tuple[list[float], list[int], list[tuple[int, int]]]:
    """Scores and group ids with the groups interleaved, and the place of each in its group."""
    places = [(group, i) for i in range(max(map(len, groups.values()))) for group in groups if i < len(groups[group])]
    return [groups[g][i] for g, i in places], [g for g, _ in places], places


def test_every_entry_has_a_formula() -> None:
    assert FORMULAS.keys() == ADVANTAGES.keys()


@pytest.mark.parametrize("name", ADVANTAGES)
def test_equals_the_formula(name: str) -> None:
    scores, ids, places = flat(GROUPS)
    found = advantages(name, {}, scores, ids)
    assert found == pytest.approx([FORMULAS[name](GROUPS, g, i) for g, i in places], rel=1e-12, abs=1e-12)
    assert np.abs(found).max() > 0.1


@pytest.mark.parametrize("name", sorted(set(ADVANTAGES) - {"reinforce_pp"}))
@given(score=st.floats(-1e3, 1e3), size=st.integers(1, 9))
def test_a_group_of_equal_scores_gets_exactly_zero(name: str, score: float, size: int) -> None:
    assert advantages(name, {}, [score] * size, [5] * size).tolist() == [0.0] * size


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_score_that_is_not_finite_touches_no_other(name: str) -> None:
    scores, ids, _ = flat(GROUPS)
    expected = advantages(name, {}, scores, ids)
    found = advantages(name, {}, [*scores, float("nan"), float("inf")], [*ids, 7, 3])
    assert found[:-2].tolist() == expected.tolist() and np.isnan(found[-2:]).all()


@pytest.mark.parametrize("name", ADVANTAGES)
def test_higher_scores_never_get_lower_advantages_in_a_group(name: str) -> None:
    scores, ids, places = flat(GROUPS)
    found = dict(zip(places, advantages(name, {}, scores, ids), strict=True))
    for group, members in GROUPS.items():
        ordered = [found[group, i] for i in np.argsort(members, kind="stable")]
        assert all(a <= b + 1e-12 for a, b in pairwise(ordered))


@pytest.mark.parametrize("k", [1, 2, 3, 8, 20])
def test_pass_at_k_equals_every_draw_listed(k: int) -> None:
    scores, ids, places = flat(GROUPS)
    assert advantages("pass_at_k", {"k": k}, scores, ids) == pytest.approx([pass_at_k(GROUPS, g, i, k) for g, i in places], abs=1e-12)


def test_pass_at_k_goes_by_what_passed_whatever_became_of_its_score() -> None:
    """Two right of four, one of them with a penalty for length: both get the same, and the wrong ones the negative."""
    right = [True, True, False, False]
    assert module.advantages("pass_at_k", {"k": 2}, [1.0, 0.9, 0.0, -0.5], [0] * 4, right).tolist() == pytest.approx(
        advantages("pass_at_k", {"k": 2}, [1.0, 1.0, 0.0, 0.0], [0] * 4).tolist()
    )


def test_options_and_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"divide_by_sdt is none of them; did you mean divide_by_std"):
        advantages("grpo", {"divide_by_sdt": True}, [1.0], [0])
    with pytest.raises(ValueError, match=r"scores \(2,\), group ids \(1,\) and passed \(2,\)"):
        advantages("grpo", {}, [1.0, 2.0], [0])
    assert advantages("grpo", {}, [], []).shape == (0,)
