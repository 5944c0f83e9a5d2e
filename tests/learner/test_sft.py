"""Supervised fine-tuning: the loss against one token at a time, the schedule, the groups of the optimizers, and that it learns."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from learner.sft import Example, SftOptions, batches_of_similar_length, build_optimizers, collate, completion_loss, finetune, lr_factor


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_model(seed: int = 0, vocab_size: int = 24, tied: bool = True) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config)


def random_examples(count: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)

    def draw(most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, 24) for _ in range(rng.randint(1, most)))

    return [Example(draw(9), draw(7)) for _ in range(count)]


def test_the_loss_is_the_mean_over_completion_tokens_alone() -> None:
    model, examples = small_model().eval(), random_examples(5)
    with torch.no_grad():
        batched = completion_loss(model, *collate(examples, pad_id=0)).item()
        losses = []
        for example in examples:
            for position, token in enumerate(example.completion_ids):
                before = torch.tensor([example.prompt_ids + example.completion_ids[:position]])
                losses.append(-model(before).logits[0, -1].log_softmax(-1)[token].item())
    assert batched == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_padding_does_not_change_the_loss() -> None:
    model, examples = small_model().eval(), random_examples(4)
    with torch.no_grad():
        losses = [completion_loss(model, *collate(examples, pad_id=pad_id)).item() for pad_id in (0, 17)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_an_example_without_a_completion_is_refused() -> None:
    with pytest.raises(ValueError, match="no completion"):
        collate([Example((1, 2), (3,)), Example((1, 2), ())])


def test_the_rate_rises_linearly_and_falls_to_its_final_fraction() -> None:
    factors = [lr_factor(step, 100, 10, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == pytest.approx(1.0, abs=0.02)
    assert factors[:10] == sorted(factors[:10])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[100] == pytest.approx(0.1)
    assert factors[50] == pytest.approx(0.55), "halfway the cosine is 0"


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_optimizer(tied: bool) -> None:
    model = small_model(tied=tied)
    muon, adamw = build_optimizers(model, SftOptions())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon, by_adamw = ([names[id(p)] for group in opt.param_groups for p in group["params"]] for opt in (muon, adamw))
    assert sorted(by_muon + by_adamw) == sorted(names.values())
    assert len(by_muon) == 2 * 7, "q, k, v, o, gate, up and down of two layers"
    assert not [name for name in by_muon if "embed" in name or "norm" in name or "lm_head" in name]


def test_batches_hold_every_example_once_and_little_padding() -> None:
    examples = random_examples(101)
    batches = list(batches_of_similar_length(examples, 4, 5, random.Random(1)))
    assert sorted(map(id, examples)) == sorted(id(example) for batch in batches for example in batch)
    assert sorted(map(len, batches)) == [1] + [4] * 25

    def padded(all_batches: list[list[Example]]) -> int:
        return sum(len(batch) * max(example.num_tokens for example in batch) for batch in all_batches)

    in_order = [examples[first : first + 4] for first in range(0, len(examples), 4)]
    assert padded(batches) < 0.85 * padded(in_order)


def test_it_learns_a_cipher_and_does_so_the_same_way_twice() -> None:
    rng = random.Random(3)
    examples = [Example((22, letter), (letter + 10, 23)) for letter in (rng.randrange(1, 10) for _ in range(16 * 40))]
    batches = [examples[first : first + 16] for first in range(0, len(examples), 16)]
    seen: list[tuple[int, float]] = []
    model, again = small_model(seed=5), small_model(seed=5)
    options = SftOptions(warmup_steps=5, adamw_lr=3e-2)
    losses = finetune(model, batches, options, lambda step, loss: seen.append((step, loss)))
    assert seen == list(enumerate(losses, start=1))
    assert losses[0] > 2.5
    assert max(losses[-5:]) < 0.3
    assert finetune(again, batches, options) == losses
    assert all(torch.equal(ours, other) for ours, other in zip(model.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        guesses = [int(model(torch.tensor([[22, letter]])).logits[0, -1].argmax()) for letter in range(1, 10)]
    assert guesses == [letter + 10 for letter in range(1, 10)]


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    model = small_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        finetune(model, [random_examples(4)], SftOptions())
