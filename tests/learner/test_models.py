"""Families of transformers: log-probs of every layout equal those of the plain model, or the model is refused with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from learner.model import CausalModel
from learner.packing import build, plan, weigh
from learner.sharing import build_shared, plan_shared
from protocol.errors import DataError
from tests.learner.samples import VOCABULARY, random_samples

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "qwen2 (biases of q, k, v)": ("Qwen2", {"tie_word_embeddings": False}, True),
    "qwen3 (norms of heads, tied)": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}, True),
    "llama": ("Llama", {"head_dim": 8}, True),
    "llama with attention biases": ("Llama", {"head_dim": 8, "attention_bias": True, "mlp_bias": True}, True),
    "mistral (window)": ("Mistral", {"head_dim": 8, "sliding_window": 6}, False),
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": None}, True),
    "gemma (scaled embeddings, tied)": ("Gemma", {"head_dim": 8}, True),
    "gemma2 (windows, caps of attention and logits)": (
        "Gemma2", {"head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}, False,
    ),
    "gemma3 (windows, two kinds of positions)": ("Gemma3", {"head_dim": 8, "sliding_window": 6}, False),
    "phi (bias of the head, parallel blocks)": ("Phi", {}, True),
    "phi3 (joined projections)": ("Phi3", {}, True),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save(directory: Path, family: str, changes: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, name)(**{**SIZES, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that none can be forgotten unseen
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_equal_those_of_transformers(tmp_path: Path, name: str) -> None:
    family, changes, shares = FAMILIES[name]
    directory = save(tmp_path, family, changes)
    model = CausalModel(directory, device=torch.device("cpu"), dtype="float64")
    plain = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager").eval()
    samples = [s for s in random_samples(9) if s.num_trainable]
    weighted, lengths = weigh(samples, "token_mean"), [s.length for s in samples]
    batches = [build(weighted, rows) for layout in ("sorted", "packed") for rows in plan(lengths, 4096, layout)]  # type: ignore[arg-type]
    assert model.shares_prompts == shares
    if shares:
        batches += [build_shared(weighted, units) for units in plan_shared(samples, range(len(samples)), 4096, 1, 0)]
    expected = []
    with torch.no_grad():
        for sample in samples:
            ids = torch.tensor(np.concatenate([sample.prompt_ids, sample.token_ids]).astype(np.int64))[None]
            logits = plain(input_ids=ids).logits[0, len(sample.prompt_ids) - 1 : -1].double() / sample.temperature
            picked = logits.log_softmax(-1).gather(-1, ids[0, len(sample.prompt_ids) :, None])[:, 0]
            expected.append(picked[torch.from_numpy(sample.loss_mask)])
        for batch in batches:
            found, _ = model.token_logprobs(batch)
            torch.testing.assert_close(found, torch.cat([expected[i] for i in batch.samples]), rtol=1e-5, atol=1e-5)


def test_a_model_that_scales_its_logits_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, "Granite", {"logits_scaling": 4.0})
    with pytest.raises(DataError, match="changes its logits after the head"):
        CausalModel(directory, device=torch.device("cpu"), dtype="float32")
