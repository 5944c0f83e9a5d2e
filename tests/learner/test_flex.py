"""Attention of packed rows by blocks against the dense mask, on a CPU; the compiled kernel and its backward pass need a device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from learner import flex
from learner.model import CausalModel
from learner.packing import build, plan, weigh
from learner.parallel import SingleProcess
from learner.settings import LearnerSettings
from learner.step import Step
from tests.learner.samples import random_samples

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
CPU = torch.device("cpu")
LENGTHS = st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=6), min_size=1, max_size=3)


def positions(rows: list[list[int]]) -> np.ndarray:
    """As `packing.build` writes them: from 0 in every sample, 0 on padding."""
    result = np.zeros((len(rows), max(map(sum, rows))), np.int64)
    for place, row in zip(result, rows, strict=True):
        place[: sum(row)] = np.concatenate([np.arange(length) for length in row])
    return result


def dense(rows: list[list[int]]) -> torch.Tensor:
    """[R, 1, L, L] True where a query sees a key, written sample by sample; padding sees itself alone."""
    length = max(map(sum, rows))
    result = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1, 1)
    for mask, row in zip(result, rows, strict=True):
        start = 0
        for count in row:
            mask[0, start : start + count, start : start + count] = torch.ones(count, count).tril().bool()
            start += count
    return result


@given(rows=LENGTHS)
@settings(max_examples=60, deadline=None)
def test_blocks_are_those_that_the_dense_mask_has(rows: list[list[int]]) -> None:
    """None that a query needs is left out, none stands as full that has a border in it, and none is visited for nothing."""
    seen = dense(rows)
    blocks = flex.find_blocks(flex.documents(positions(rows)))
    length = seen.shape[-1]
    for row in range(len(rows)):
        for i in range(-(-length // flex.BLOCK)):
            partial = set(blocks.partial_RBB[row, i, : blocks.partial_counts_RB[row, i]].tolist())
            full = set(blocks.full_RBB[row, i, : blocks.full_counts_RB[row, i]].tolist())
            queries = slice(i * flex.BLOCK, (i + 1) * flex.BLOCK)
            parts = [seen[row, 0, queries, j * flex.BLOCK : (j + 1) * flex.BLOCK] for j in range(-(-length // flex.BLOCK))]
            assert partial | full == {j for j, part in enumerate(parts) if part.any()} and not partial & full
            assert full == {j for j, part in enumerate(parts) if part.numel() == flex.BLOCK**2 and part.all()}


def test_the_mask_is_torchs_own_of_the_same_rule() -> None:
    rows = [[200, 3, 90, 1], [130], [128, 128, 50]]
    ids = torch.from_numpy(flex.documents(positions(rows)))
    ours = flex.block_mask(positions(rows), CPU)
    length = ids.shape[1]
    theirs = create_block_mask(flex.sees(ids), len(rows), None, length, length, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense()) and ours.shape == theirs.shape
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.sparsity() > 30, "percent of the blocks are not touched"


def test_attention_equals_the_dense_mask() -> None:
    rows = [[40, 3, 57, 1], [97], [20, 30]]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, 101, 16, generator=generator) for heads in (4, 2, 2))
    mask = flex.block_mask(positions(rows), CPU)
    found, _ = flex.attend(torch.nn.Identity(), query, key, value, None, scaling=0.3, document_mask=mask)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense(rows), scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)
    wrong = flex_attention(query, key, value, scale=0.3, enable_gqa=True)
    assert (wrong - expected).abs().max() > 0.1, "the mask matters here"


def test_a_model_finds_the_same_log_probs_either_way(model_dir: Path) -> None:
    """float32 forward passes of whole packed micro-batches; torch has no backward pass of FlexAttention on a CPU."""
    model = CausalModel(model_dir, device=CPU, dtype="float32")
    assert model.packed_attention == "dense mask"
    samples = random_samples(23)
    useful = [i for i, sample in enumerate(samples) if sample.length]
    weighted = weigh(samples, "token_mean")
    for rows in plan([samples[i].length for i in useful], 256, "packed"):
        batch = build(weighted, [[useful[place] for place in row] for row in rows])
        assert batch.position_ids is not None
        with torch.no_grad():
            model.packed_attention = "dense mask"
            expected = model.token_logprobs(batch)
            model.packed_attention = "flex"
            found = model.token_logprobs(batch)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: the compiled kernel and its backward pass were not run")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_packed_rows_on_a_device_train_as_rows_of_one_sample(model_dir: Path, dtype: str, tolerance: float) -> None:
    """Losses and gradient norms of three updates, rows of a whole micro-batch against rows of one sample. float32 may multiply in TF32."""
    found = {}
    for layout in ("packed", "sorted"):
        chosen = {"device": "cuda", "dtype": dtype, "layout": layout, "tokens_per_microbatch": 512, "optimizer": {"lr": 1e-3}}
        step = Step(LearnerSettings.model_validate(chosen), model_dir, SingleProcess())
        assert step.model.packed_attention == "flex"
        found[layout] = [step.train(random_samples(count, count), i, 3).values for i, count in enumerate((17, 40, 9))]
    for packed, alone in zip(found["packed"], found["sorted"], strict=True):
        for name in ("loss", "grad_norm", "entropy"):
            assert packed[name] == pytest.approx(alone[name], rel=tolerance, abs=tolerance * 0.1)
