"""Histograms count every value once, and the samples to read are the ones that tell most."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from learner.batcher import Group
from learner.showing import _counts, distributions, spreads, to_read
from tests.observed import trajectory


def group(number: int, scores: list[float | None]) -> Group:
    members = {i: trajectory(number, i, score=score, tokens=5 + 3 * i) for i, score in enumerate(scores)}
    return Group(number, len(scores), members)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.booleans())
def test_every_value_counts_once(values: list[float], whole: bool) -> None:
    numbers = np.array([round(v) for v in values] if whole else values, np.float64)
    edges, counts = _counts(numbers, whole=whole)
    assert counts.sum() == len(values)
    assert (np.diff(edges) > 0).all()
    assert len(edges) == len(counts) + 1 <= 32


def test_spreads_of_an_iteration() -> None:
    found = spreads([group(4, [0.0, 1.0, None]), group(5, [1.0, 1.0])], 2)
    _, counts = found["data/completion_lengths"]
    assert counts.sum() == 5
    assert found["reward/scores"][1].sum() == 4, "a missing score is no score"
    edges, counts = found["staleness/tokens"]
    assert counts.sum() == 5 + 8 + 11 + 5 + 8
    assert (edges[0], edges[-1]) == (-0.5, 1.5), "versions 1 and 2 at iteration 2"
    messages = distributions("learner-0@1", 2, 1.0, found)
    assert all(not m.fault() for m in messages)
    assert spreads([], 0) == {}


def test_the_best_and_the_worst_of_the_first_groups_are_read() -> None:
    groups = [group(7, [0.0, 1.0, 0.5]), group(6, [0.2, None, 0.1])]
    shown = [(t.group_id, t.index) for t in to_read(groups, 4)]
    assert shown == [(6, 0), (6, 2), (7, 1), (7, 0)]
    assert len(to_read(groups, 1)) == 1
    assert to_read([], 3) == ()
