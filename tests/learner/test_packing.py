"""Micro-batches: every trainable token exactly once, inside the budget, the same for any number of ranks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.packing import PACK_TOKENS, Layout, admit, assign, build, emptiest, padded_tokens, plan, token_weights, weigh
from tests.learner.samples import random_samples

LENGTHS = st.lists(st.integers(0, 60), max_size=40)
LAYOUTS = st.sampled_from(["sorted", "packed"])


@given(lengths=LENGTHS, budget=st.integers(1, 400), layout=LAYOUTS)
def test_every_sample_stands_once_and_budgets_hold(lengths: list[int], budget: int, layout: Layout) -> None:
    batches = plan(lengths, budget, layout)
    assert sorted(i for rows in batches for row in rows for i in row) == [i for i, length in enumerate(lengths) if length]
    for rows in batches:
        assert padded_tokens(rows, lengths) <= max(budget, *lengths)


@given(lengths=LENGTHS, ranks=st.integers(1, 5))
def test_ranks_share_everything_evenly(lengths: list[int], ranks: int) -> None:
    shares = assign(lengths, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_packing_wastes_less_than_sorting_when_lengths_differ() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 64).tolist()
    waste = {name: sum(padded_tokens(rows, lengths) for rows in plan(lengths, 8192, name)) / sum(lengths) for name in ("sorted", "packed")}
    assert waste["packed"] < 1.1 < waste["sorted"]
    assert emptiest(lengths, 8192) == "packed" and emptiest([60] * 64, 4096) == "sorted"
    assert all(sum(lengths[i] for i in row) <= PACK_TOKENS for rows in plan(lengths, 8192, "packed") for row in rows)


@pytest.mark.parametrize("layout", ["sorted", "packed"])
def test_arrays_hold_the_samples(layout: Layout) -> None:
    samples, _ = admit(random_samples(23))
    lengths = [s.length for s in samples]
    weighted = weigh(samples, "sequence_mean")
    seen: dict[int, list[int]] = {}
    for rows in plan(lengths, 128, layout):
        batch = build(weighted, rows)
        for t, (hidden, target) in enumerate(zip(batch.hidden_T, batch.targets_T, strict=True)):
            place = batch.samples[batch.sample_T[t]]
            sample = samples[place]
            nth = len(seen.setdefault(place, []))
            position = np.flatnonzero(sample.loss_mask)[nth]
            row, column = divmod(hidden, batch.input_ids.shape[1])
            context = np.concatenate([sample.prompt_ids, sample.token_ids])[: len(sample.prompt_ids) + position]
            assert batch.input_ids[row, column - len(context) + 1 : column + 1].tolist() == context.tolist()
            if batch.position_ids is not None:
                assert batch.position_ids[row, column] == len(context) - 1
            assert target == sample.token_ids[position] and batch.behaviour_T[t] == sample.behaviour_logprobs[position]
            assert batch.advantages_T[t] == sample.advantage and batch.temperature_T[t] == sample.temperature
            assert batch.weights_T[t] == weighted.objective_N[place]
            seen[place].append(t)
    assert {place: len(tokens) for place, tokens in seen.items()} == {i: s.num_trainable for i, s in enumerate(samples) if s.num_trainable}


def test_tokens_after_the_last_trainable_one_are_left_out() -> None:
    sample = random_samples(1)[0]
    mask = np.zeros_like(sample.loss_mask)
    mask[[0, 2]] = True
    assert dataclasses.replace(sample, loss_mask=mask).length == len(sample.prompt_ids) + 2
    assert dataclasses.replace(sample, loss_mask=np.zeros_like(mask)).length == 0


def test_weights_are_the_definitions() -> None:
    samples = random_samples(8)
    counts = [s.num_trainable for s in samples]
    used = [n for n in counts if n]
    assert token_weights(samples, "token_mean") == pytest.approx([1 / sum(counts)] * 8)
    found = token_weights(samples, "sequence_mean")
    assert [w * n for w, n in zip(found, counts, strict=True) if n] == pytest.approx([1 / len(used)] * len(used))
    assert token_weights(samples, "constant_length", 50) == pytest.approx([1 / (50 * len(used))] * 8)
    with pytest.raises(ValueError, match="constant_length"):
        token_weights(samples, "constant_length")


def test_samples_that_do_not_fit_together_are_named() -> None:
    sample = random_samples(1)[0]
    count = len(sample.token_ids)
    for changes, message in [
        ({"behaviour_logprobs": np.zeros(count + 1, np.float32)}, rf"sample 100/0: {count} token_ids but {count + 1} behaviour_logprobs"),
        ({"prompt_ids": np.zeros(0, np.int32)}, "sample 100/0: the prompt is empty"),
        ({"temperature": 0.0}, r"sample 100/0: temperature 0.0, expected above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            admit([dataclasses.replace(sample, **changes)])


def test_a_masked_log_prob_may_be_anything() -> None:
    sample = random_samples(1)[0]
    logprobs, mask = sample.behaviour_logprobs.copy(), sample.loss_mask.copy()
    logprobs[1], mask[1] = np.nan, False
    assert admit([dataclasses.replace(sample, behaviour_logprobs=logprobs, loss_mask=mask)])[1] == []
