"""The shared layout: what it computes less, that nothing is lost, and when it is chosen."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.attention import BlockPlan, attend
from learner.model import CausalModel
from learner.packing import build, weigh
from learner.sharing import QUERIES, build_shared, plan_shared
from tests.learner.conftest import save_model
from tests.learner.samples import random_samples


@given(count=st.integers(1, 30), budget=st.integers(1, 300), ranks=st.integers(1, 4), seed=st.integers(0, 3))
def test_every_sample_stands_once_over_all_ranks(count: int, budget: int, ranks: int, seed: int) -> None:
    samples = random_samples(count, seed)
    useful = [i for i, s in enumerate(samples) if s.num_trainable]
    parts = [plan_shared(samples, useful, budget, ranks, rank) if useful else [] for rank in range(ranks)]
    assert sorted(i for part in parts for batch in part for unit in batch for i in unit) == useful
    for unit in (unit for part in parts for batch in part for unit in batch):
        assert len({samples[i].prompt_ids.tobytes() for i in unit}) == 1
    for batch in (batch for part in parts for batch in part):
        tokens = build_shared(weigh(samples, "token_mean"), batch).input_ids.size
        assert tokens <= budget or len(batch) == 1


def test_a_prompt_is_computed_once_for_its_group() -> None:
    samples = [dataclasses.replace(s, loss_mask=np.ones_like(s.loss_mask)) for s in random_samples(16, group_size=8)]
    (batch,) = plan_shared(samples, range(16), 10_000, 1, 0)
    prompts = sum(len(samples[i].prompt_ids) for i in (0, 8))
    inputs = sum(len(s.token_ids) - 1 for s in samples)
    assert len(batch) >= 2
    repeated = sum(len(samples[unit[0]].prompt_ids) for unit in batch)
    assert build_shared(weigh(samples, "token_mean"), batch).input_ids.size == repeated + inputs
    whole = [[i for unit in batch for i in unit if i // 8 == group] for group in (0, 1)]
    assert build_shared(weigh(samples, "token_mean"), whole).input_ids.size == prompts + inputs


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_log_probs_equal_one_by_one(tmp_path: Path, heads: tuple[int, int], share: bool) -> None:
    """Samples up to three times as long as one block has queries, prompts of one token, single-token completions."""
    directory = save_model(tmp_path, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    model = CausalModel(directory, device=torch.device("cpu"), dtype="float64")
    samples = [s for s in random_samples(40, longest=3 * QUERIES) if s.num_trainable]
    assert max(s.length for s in samples) > 2 * QUERIES
    weighted = weigh(samples, "token_mean")
    with torch.no_grad():
        for units in plan_shared(samples, range(len(samples)), 1200, 1, 0, share=share):
            batch = build_shared(weighted, units)
            found, entropies = model.token_logprobs(batch)
            for i, place in enumerate(batch.samples):
                expected, expected_entropies = model.token_logprobs(build(weighted, [[place]]))
                torch.testing.assert_close(found[torch.from_numpy(batch.sample_T == i)], expected, rtol=0, atol=1e-6)
                torch.testing.assert_close(entropies[torch.from_numpy(batch.sample_T == i)], expected_entropies, rtol=0, atol=1e-6)


def test_models_with_windows_or_caps_are_refused_or_laid_out_otherwise(model_dir: Path, tmp_path: Path) -> None:
    assert CausalModel(model_dir, device=torch.device("cpu"), dtype="float32").shares_prompts
    window = save_model(tmp_path, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert not CausalModel(window, device=torch.device("cpu"), dtype="float32").shares_prompts
    one = torch.zeros(1, 2, 1, 4)
    plan = BlockPlan([], 0, 2, 2, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="use layout 'sorted'"):
        attend(torch.nn.Identity(), one, one, one, None, scaling=1.0, block_plan=plan, sliding_window=4)
