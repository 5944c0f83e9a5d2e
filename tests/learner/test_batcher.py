"""From trajectories to batches: any order of arrival gives the same batch, and every group ends for a stated reason."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batcher import Assembler, Batch, Batcher, Group
from learner.line import BatchRule
from learner.packing import TrainSample
from learner.settings import LearnerSettings
from protocol.errors import StalenessViolation
from protocol.messages import Trajectory
from tests.learner.trajectories import trajectory

SIZE = 3


def make_batcher(groups: int = 1, *, staleness: int = 1, size: int = SIZE, rule: dict[str, Any] | None = None, **changes: Any) -> Batcher:
    numbers = {"iterations": 9, "groups_per_iteration": groups, "max_staleness": staleness, **(rule or {})}
    return Batcher(LearnerSettings(**changes), BatchRule(**numbers), size)


def batch_of(*arrived: Trajectory, iteration: int = 0, **changes: Any) -> Batch:
    """The batch of trajectories that came in this order; nothing else stands before it in the line."""
    ids = {t.group_id for t in arrived}
    batcher, assembler = make_batcher(len(ids), **changes), Assembler(changes.get("size", SIZE), 1)
    batcher.restore(iteration, [number for number in range(max(ids)) if number not in ids], 0)
    for t in arrived:
        group = assembler.add(t)
        if group is not None:
            batcher.add(group)
    assert batcher.missing(iteration) == 0
    return batcher.take(iteration)


def plain(sample: TrainSample) -> dict[str, Any]:
    values = {spec.name: getattr(sample, spec.name) for spec in fields(sample)}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def group(number: int, *scores: float | None, **changes: Any) -> list[Trajectory]:
    return [trajectory(number, i, score, **changes) for i, score in enumerate(scores)]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_order_and_any_duplicates_give_the_same_batch(data: st.DataObject) -> None:
    scores = st.sampled_from([0.0, 0.5, 1.0, None])
    groups = data.draw(st.lists(st.tuples(scores, scores, scores), min_size=1, max_size=4))
    in_order = [t for number, of_group in enumerate(groups) for t in group(number, *of_group)]
    copies = [trajectory(t.group_id, t.index, 9.0, attempt=1, tokens=5) for t in data.draw(st.lists(st.sampled_from(in_order)))]
    arrived: list[Trajectory] = data.draw(st.permutations(in_order))
    for copy in copies:  # a re-sampled answer, with another score, somewhere after the first one
        first = next(i for i, t in enumerate(arrived) if (t.group_id, t.index) == (copy.group_id, copy.index))
        arrived.insert(data.draw(st.integers(first + 1, len(arrived))), copy)
    reference, batch = batch_of(*in_order), batch_of(*arrived)
    assert [plain(s) for s in batch.samples] == [plain(s) for s in reference.samples]
    assert batch.outcomes == reference.outcomes
    assert batch.metrics == pytest.approx(reference.metrics, nan_ok=True)
    assert len(batch.outcomes) == len(groups)


def test_the_first_of_a_place_counts_and_the_others_are_counted() -> None:
    assembler = Assembler(2, 1)
    assert assembler.add(trajectory(5, 0, 1.0)) is None
    assert assembler.holds(trajectory(5, 0, 0.0, attempt=3))
    assert assembler.add(trajectory(5, 0, 0.0, attempt=3)) is None
    assert assembler.open_groups == {5: 1}
    complete = assembler.add(trajectory(5, 1, 0.0))
    assert complete is not None
    assert [t.score for t in complete.trajectories] == [1.0, 0.0]
    assert assembler.add(trajectory(5, 1, 0.0)) is None, "a copy that comes after the group was complete opens no new one"
    assert (assembler.duplicates, assembler.open_groups) == (2, {})


def test_training_and_evaluation_groups_have_their_own_sizes() -> None:
    assembler = Assembler(2, 1)
    complete = assembler.add(trajectory(1 << 40, 0, 1.0, purpose="eval"))
    assert isinstance(complete, Group)
    assert assembler.add(trajectory(1, 0, 1.0)) is None


def whole(number: int, *scores: float | None, **changes: Any) -> Group:
    members = group(number, *scores, **changes)
    return Group(number, len(members), {t.index: t for t in members})


def test_a_batch_waits_for_the_head_of_the_line() -> None:
    batcher = make_batcher(2)
    for number in (1, 2, 3):
        assert batcher.add(whole(number, 0.0, 1.0, 1.0)) == []
    assert (batcher.missing(0), batcher.ready) == (2, [1, 2, 3]), "complete groups that the next batch may not take yet are known as such"
    with pytest.raises(ValueError, match="batch 0 lacks 2 groups"):
        batcher.take(0)
    batcher.add(whole(0, 0.0, 1.0, 1.0))
    assert [o.group_id for o in batcher.take(0).outcomes] == [0, 1]
    with pytest.raises(ValueError, match="iteration 1 is open, not 0"):
        batcher.missing(0)
    assert [o.group_id for o in batcher.take(1).outcomes] == [2, 3]
    assert batcher.groups_taken == 4


@pytest.mark.parametrize("zero_variance", ["drop", "keep"])
def test_the_share_of_groups_with_one_score_does_not_depend_on_what_becomes_of_them(zero_variance: str) -> None:
    """Two of three scored groups have one score; one is cut off as a whole, which is something else; of one nothing is known."""
    batcher = make_batcher(4, zero_variance=zero_variance)
    for number, scores in enumerate(((1.0, 1.0, 1.0), (0.0, 0.0, None), (None, None, None))):
        batcher.add(whole(number, *scores))
    batcher.add(whole(3, 0.0, 1.0, 1.0, finish_reason="length"))
    assert batcher.take(0).metrics["data/zero_variance_share"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("scores", "changes", "state", "reason", "num_samples"),
    [
        ((0.0, 1.0, 1.0), {}, "trained", "", 3),
        ((1.0, 1.0, 1.0), {}, "filtered", "zero variance", 3),
        ((1.0, 1.0, 1.0), {"zero_variance": "keep"}, "trained", "", 3),
        ((0.0, None, 1.0), {}, "trained", "", 2),
        ((1.0, None, 1.0), {}, "filtered", "zero variance", 2),
        ((0.0, None, None), {}, "failed", "1 of 3 samples have a score, at least 2 are needed", 1),
        ((0.0, None, 1.0), {"min_samples": 3}, "failed", "2 of 3 samples have a score, at least 3 are needed", 2),
        ((None, None, None), {"min_samples": 1}, "failed", "0 of 3 samples have a score, at least 1 are needed", 0),
    ],
)
def test_every_group_ends_for_a_stated_reason(
    scores: tuple[float | None, ...], changes: dict[str, Any], state: str, reason: str, num_samples: int
) -> None:
    batch = batch_of(*group(4, *scores), **changes)
    [outcome] = batch.outcomes
    assert (outcome.state, outcome.reason, outcome.num_samples) == (state, reason, num_samples)
    assert len(batch.samples) == (num_samples if state == "trained" else 0)
    known = [score for score in scores if score is not None]
    assert outcome.mean_score == (pytest.approx(sum(known) / len(known)) if known else None)
    assert outcome.num_passed == sum(score == 1.0 for score in known)


def test_lengths_alone_are_no_signal() -> None:
    alike = [trajectory(4, i, 1.0, tokens=3 + i) for i in range(3)]
    shaped = {"overlong": "keep", "overlong_penalty_tokens": 4}
    [outcome] = batch_of(*alike, **shaped).outcomes
    assert (outcome.state, outcome.reason) == ("filtered", "zero variance")
    mixed = [trajectory(4, i, float(i == 0), tokens=3 + 2 * i) for i in range(3)]
    found = [s.advantage for s in batch_of(*mixed, **shaped).samples]
    assert found[0] > found[1] > found[2], "in a group with a signal the penalty counts"


def test_pass_at_k_groups_agree_when_all_passed() -> None:
    graded = [trajectory(4, i, score, passed=True) for i, score in enumerate((1.0, 0.5, 0.75))]
    options = {"advantage": "pass_at_k", "advantage_options": {"k": 2}}
    assert batch_of(*graded, **options).outcomes[0].state == "filtered"
    assert batch_of(*graded).outcomes[0].state == "trained"


def test_samples_without_a_finite_score_are_counted_and_no_zero() -> None:
    broken = trajectory(4, 2, None, status="not_finite")
    batch = batch_of(*group(4, 0.0, 1.0), broken)
    assert [s.index for s in batch.samples] == [0, 1]
    assert (batch.metrics["reward/samples_not_finite"], batch.metrics["reward/samples_failed"]) == (1.0, 1.0)


def test_a_failed_score_is_no_zero_in_its_groups_advantages() -> None:
    """Scores 0 and 1 with one missing: the mean is 1/2, not 1/3; the sample's deviation is sqrt(1/2)."""
    batch = batch_of(*group(4, 0.0, None, 1.0))
    assert [s.index for s in batch.samples] == [0, 2]
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert [s.advantage for s in batch.samples] == pytest.approx([-expected, expected])


def test_completions_that_were_cut_off_leave_the_loss_but_not_the_statistics() -> None:
    cut = trajectory(4, 2, 1.0, finish_reason="length")
    masked = batch_of(*group(4, 0.0, 0.0), cut)
    assert [s.loss_mask.tolist() for s in masked.samples] == [[True] * 3, [True] * 3, [False] * 3]
    kept = batch_of(*group(4, 0.0, 0.0), cut, overlong="keep")
    assert all(s.loss_mask.all() for s in kept.samples)
    assert [s.advantage for s in masked.samples] == [s.advantage for s in kept.samples]
    everything_cut = [trajectory(4, i, float(i == 0), finish_reason="length") for i in range(3)]
    assert [(o.state, o.reason) for o in batch_of(*everything_cut).outcomes] == [("filtered", "every completion was cut off")]


def test_tokens_that_a_tool_wrote_stay_masked() -> None:
    mask = np.array([True, False, True])
    batch = batch_of(trajectory(4, 0, 1.0, loss_mask=mask), *group(4, 0.0, 0.0, 0.0)[1:])
    assert batch.samples[0].loss_mask.tolist() == [True, False, True]


def test_samples_carry_what_the_step_needs() -> None:
    t = trajectory(4, 1, 1.0, behaviour_logprobs=np.array([-0.25, -0.5, -2.0], np.float32))
    [first, second, _] = batch_of(*group(4, 0.0), t, trajectory(4, 2, 0.0)).samples
    assert (second.group_id, second.index, second.temperature, second.positive, first.positive) == (4, 1, 0.7, True, False)
    assert second.prompt_ids.tolist() == [1, 2]
    assert second.token_ids.tolist() == [3, 4, 5]
    assert second.behaviour_logprobs.tolist() == [-0.25, -0.5, -2.0]


def test_the_length_penalty_is_part_of_the_score() -> None:
    """DAPO, eq. 13 with 8 tokens at most and a cache of 4: 6 tokens cost 1/2, 8 tokens cost 1."""
    arrived = [trajectory(4, i, float(i < 2), tokens=n) for i, n in enumerate((4, 6, 8))]
    batch = batch_of(*arrived, overlong="keep", overlong_penalty_tokens=4, advantage="dr_grpo")
    assert [s.advantage for s in batch.samples] == pytest.approx([5 / 6, 1 / 3, -7 / 6])
    assert batch.outcomes[0].mean_score == pytest.approx(2 / 3), "the ledger keeps the reward's own score"


def test_parts_of_a_score_are_weighted() -> None:
    arrived = [trajectory(4, i, 9.0, parts={"tests": float(i), "style": 1.0}) for i in range(3)]
    batch = batch_of(*arrived, reward_weights={"tests": 2.0, "style": -1.0}, advantage="dr_grpo")
    assert [s.advantage for s in batch.samples] == pytest.approx([-2.0, 0.0, 2.0])
    with pytest.raises(ValueError, match=r"reward weights name \['tests'\] but the trajectory has the parts \['style', 'tests'\]"):
        batch_of(*arrived, reward_weights={"tests": 2.0})


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 5), st.integers(0, 3), st.integers(0, 8), st.integers(0, 3))
def test_a_token_outside_the_bound_ends_the_run(iteration: int, bound: int, first: int, rise: int) -> None:
    spans = [[first, 0, 1], [first + rise, 0, 3]] if rise else [[first, 0, 3]]
    arrived = [*group(4, 0.0, 1.0, iteration=iteration, spans=[[iteration, 0, 3]]), trajectory(4, 2, 1.0, iteration=iteration, spans=spans)]
    stale = first < iteration - bound or first + rise > iteration
    if not stale:
        assert batch_of(*arrived, iteration=iteration, staleness=bound).metrics["staleness/max"] == iteration - first
        return
    with pytest.raises(
        StalenessViolation, match=rf"sample 4/2 of iteration {iteration} has tokens of v{first}\.\.v{first + rise}, allowed"
    ):
        batch_of(*arrived, iteration=iteration, staleness=bound)


def test_metrics_are_those_computed_by_hand() -> None:
    """Iteration 2; group 1: scores 0, 1, 1 of 2, 3, 4 tokens; group 2: 1, 1 and none, of 5 tokens each, the last cut off and mixed."""
    first = [
        trajectory(1, i, score, tokens=n, iteration=2, scoring_s=float(i), spans=[[2, 0, n]])
        for i, (score, n) in enumerate([(0.0, 2), (1.0, 3), (1.0, 4)])
    ]
    second = [trajectory(2, i, 1.0, tokens=5, iteration=2, scoring_s=1.0, spans=[[1, 0, 5]]) for i in range(2)]
    second.append(trajectory(2, 2, None, tokens=5, iteration=2, scoring_s=1.0, spans=[[1, 0, 2], [2, 0, 5]], finish_reason="length"))
    assert batch_of(*first, *second, iteration=2).metrics == pytest.approx(
        {
            "reward/mean": 4 / 5,
            "reward/std": math.sqrt(4 / 5 - (4 / 5) ** 2),
            "reward/pass_rate": 4 / 6,
            "reward/samples_failed": 1,
            "reward/samples_not_finite": 0,
            "reward/scoring_s_mean": (0 + 1 + 2 + 3) / 6,
            "data/completion_tokens_mean": (2 + 3 + 4 + 15) / 6,
            "data/completion_tokens_max": 5,
            "data/truncated_share": 1 / 6,
            "data/tokens": 24,
            "data/groups_trained": 1,
            "data/groups_filtered": 1,
            "data/zero_variance_share": 1 / 2,
            "data/groups_rejected": 0,
            "data/groups_dropped": 0,
            "data/groups_failed": 0,
            "data/groups_superseded": 0,
            "data/groups_replaced": 0,
            "data/groups_early": 0,
            "data/groups_late": 0,
            "staleness/too_old_share": 0,
            "staleness/mean": (5 + 5 + 2) / 24,
            "staleness/max": 1,
            "staleness/mixed_share": 1 / 6,
        }
    )


def test_versions_of_an_outcome_span_all_its_samples() -> None:
    arrived = [*group(4, 0.0, 1.0, iteration=3, spans=[[3, 0, 3]]), trajectory(4, 2, 1.0, iteration=3, spans=[[2, 0, 1], [3, 0, 3]])]
    [outcome] = batch_of(*arrived, iteration=3).outcomes
    assert (outcome.oldest_version, outcome.newest_version, outcome.iteration, outcome.problem_id) == (2, 3, 3, "p4")
