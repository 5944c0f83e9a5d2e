"""Pacing by its properties: never too early, exactly as many as asked, and never stuck while versions come."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.pacing import Pacer, may_issue

runs = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(0, 3))
"""iterations, groups per iteration, staleness bound"""


@settings(deadline=None)
@given(runs, st.lists(st.one_of(st.just("issue"), st.integers(-1, 7)), max_size=60))
def test_no_interleaving_issues_a_group_too_early_or_too_often(run: tuple[int, int, int], steps: list[str | int]) -> None:
    iterations, groups, bound = run
    pacer, newest = Pacer(iterations, groups, bound), -1
    issued: list[int] = []
    for step in steps:
        if isinstance(step, int):
            pacer.publish(step)
            newest = max(newest, step)
            assert pacer.published == newest, "late news of an older version must change nothing"
            continue
        iteration = pacer.next_iteration()
        if iteration is None:
            # held back only by the bound or by the end: the next iteration with a free place is beyond both
            following = len(issued) // groups
            assert following == iterations or newest < 0 or following - bound > newest
            continue
        assert newest >= iteration - bound
        assert newest >= pacer.min_version(iteration) >= iteration - bound
        pacer.issue(iteration)
        issued.append(iteration)
    assert issued == sorted(issued), "iterations are filled one after the other"
    assert all(issued.count(k) <= groups for k in set(issued))
    assert pacer.all_issued == (len(issued) == iterations * groups)


@settings(deadline=None)
@given(runs, st.randoms(use_true_random=False))
def test_as_long_as_versions_come_every_iteration_gets_exactly_its_groups(run: tuple[int, int, int], random: object) -> None:
    """The learner of this test publishes k + 1 as soon as every group of k was issued: nothing more is needed to go on."""
    iterations, groups, bound = run
    pacer = Pacer(iterations, groups, bound)
    issued: dict[int, int] = {}
    pacer.publish(0)
    trained = 0
    for _ in range(10 * iterations * groups + 10):
        iteration = pacer.next_iteration()
        publishable = issued.get(trained, 0) == groups
        if iteration is not None and not (publishable and random.random() < 0.5):  # type: ignore[attr-defined]
            pacer.issue(iteration)
            issued[iteration] = issued.get(iteration, 0) + 1
        elif publishable:
            trained += 1
            pacer.publish(trained)
    assert issued == dict.fromkeys(range(iterations), groups)
    assert pacer.all_issued
    assert trained == iterations


def test_the_bound_is_the_papers_definition() -> None:
    """Iteration k trains at version k, so a sample drawn at version v is k - v stale."""
    for bound in range(4):
        for iteration in range(8):
            for version in range(8):
                assert may_issue(iteration, version, bound) == (iteration - version <= bound)


def test_nothing_is_issued_before_the_first_version() -> None:
    assert Pacer(3, 2, 0).next_iteration() is None
    assert Pacer(3, 2, 1).next_iteration() is None, "-1 is no version, though the bound alone would let iteration 0 pass"
