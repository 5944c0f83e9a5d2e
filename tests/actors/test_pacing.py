"""Pacing by its properties: never too early, never more than fit in the line, and never stuck while versions come."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.pacing import Pacer, PacingRule


@st.composite
def rules(draw: st.DrawFn) -> PacingRule:
    groups, bound = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    over_issue = draw(st.integers(0, groups))
    reorder = 0 if over_issue else draw(st.integers(0, bound * groups))
    return PacingRule(
        iterations=draw(st.integers(1, 6)), groups_per_iteration=groups, max_staleness=bound, reorder=reorder, over_issue=over_issue
    )


@settings(deadline=None)
@given(rules(), st.lists(st.one_of(st.just("issue"), st.just("give up"), st.integers(-1, 7)), max_size=80))
def test_no_interleaving_issues_a_group_too_early_or_too_many(rule: PacingRule, steps: list[str | int]) -> None:
    """News come in any order; each batch takes all of its groups, and of those that were given up none."""
    pacer, groups, newest, given_up = Pacer(rule), rule.groups_per_iteration, -1, 0
    issued = 0
    for step in steps:
        if isinstance(step, int):
            if step * groups > issued - given_up:
                continue  # that many groups were not even issued, so no learner can have published it
            pacer.publish(step, step * groups)
            newest = max(newest, step)
            assert pacer.published == newest, "late news of an older version must change nothing"
        elif step == "give up":
            if issued - given_up > max(newest, 0) * groups:
                pacer.give_up()
                given_up += 1
        else:
            iteration = pacer.next_iteration()
            if iteration is None:
                room = rule.room(newest) if newest >= 0 else 0
                assert newest < 0 or newest >= rule.iterations or issued - given_up - newest * groups >= room
                continue
            assert newest <= iteration < rule.iterations
            assert newest >= rule.min_version(iteration) >= iteration - rule.max_staleness
            if not rule.over_issue:  # it is trained before anyone who comes later, or after at most `reorder` of them
                assert iteration >= min(rule.iterations - 1, (issued - given_up + rule.reorder) // groups)
            pacer.issue()
            issued += 1
    assert issued - given_up <= rule.iterations * groups + rule.over_issue


@settings(deadline=None)
@given(rules(), st.randoms(use_true_random=False))
def test_as_long_as_versions_come_every_iteration_gets_its_groups(rule: PacingRule, random: Any) -> None:
    """The learner of this test publishes k + 1 as soon as the first groups of the line are there: nothing more is needed to go on."""
    pacer, groups = Pacer(rule), rule.groups_per_iteration
    pacer.publish(0, 0)
    labels: list[int] = []
    trained = 0
    for _ in range(10 * rule.iterations * groups + 10):
        iteration = pacer.next_iteration()
        publishable = trained < rule.iterations and len(labels) >= (trained + 1) * groups
        if iteration is not None and not (publishable and random.random() < 0.5):
            pacer.issue()
            labels.append(iteration)
        elif publishable:
            trained += 1
            pacer.publish(trained, trained * groups)
    assert trained == rule.iterations
    assert pacer.all_issued
    assert rule.iterations * groups <= len(labels) <= rule.iterations * groups + rule.over_issue
    assert labels == sorted(labels), "who comes later may be trained later"
    if not rule.reorder and not rule.over_issue:
        assert labels == [n // groups for n in range(rule.iterations * groups)]


def test_the_bound_is_the_papers_definition() -> None:
    """Iteration k trains at version k, so a group of k may be sampled from version k - S on."""
    for bound in range(4):
        rule = PacingRule(iterations=20, groups_per_iteration=1, max_staleness=bound)
        for iteration in range(8):
            for version in range(iteration + 1):
                joins = rule.latest_iteration(version, place=iteration - version)
                assert joins == (iteration if iteration - version <= bound else None)


def test_nothing_is_issued_before_the_first_version() -> None:
    for bound in (0, 1):
        assert Pacer(PacingRule(iterations=3, groups_per_iteration=2, max_staleness=bound)).next_iteration() is None


def test_late_outcomes_hold_back_and_never_let_through() -> None:
    """The news that a version is out may come before or after the news of what was given up: the place is only ever taken for too far back."""
    rule = PacingRule(iterations=9, groups_per_iteration=2, max_staleness=1)
    pacer = Pacer(rule)
    pacer.publish(0, 0)
    for _ in range(4):
        pacer.issue()
    assert pacer.next_iteration() is None
    pacer.give_up()
    assert pacer.next_iteration() == 1
    pacer.issue()
    pacer.publish(1, 1)  # batch 0 had one group, because the other was given up and nobody moved up
    assert pacer.next_iteration() == 2


def test_reordering_takes_its_room_from_the_lead() -> None:
    rule = PacingRule(iterations=9, groups_per_iteration=4, max_staleness=2, reorder=3)
    assert rule.room(0) == 12 - 3
    assert [rule.latest_iteration(0, place) for place in range(10)] == [0, 1, 1, 1, 1, 2, 2, 2, 2, None]
    assert rule.room(7) == 8, "at the end nothing comes later, so all that are left may be issued"


def test_over_issue_lengthens_the_line_also_at_the_end() -> None:
    rule = PacingRule(iterations=9, groups_per_iteration=4, max_staleness=1, over_issue=3)
    assert [rule.room(version) for version in (0, 7, 8)] == [8 + 3, 8 + 3, 4 + 3]
    assert [rule.latest_iteration(0, place) for place in (7, 8, 10, 11)] == [1, 1, 1, None], "the surplus is for no later iteration"
    assert rule.latest_iteration(9, 0) is None, "after the last iteration nothing is issued"
