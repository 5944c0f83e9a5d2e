"""The step against a slow reference, for every split into micro-batches and every layout."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.objectives import TokenLoss, Tokens
from learner.parallel import SingleProcess
from learner.settings import LearnerSettings
from learner.step import Step
from protocol.canary import PROMPT_TOKENS
from protocol.errors import DataError, Diverged
from tests.learner.reference import Reference
from tests.learner.samples import random_samples

OPTIMIZER = {"lr": 0.05, "eps": 0.5}
"""A large eps makes AdamW's step follow the size of the gradient; with a small one it would hide wrong scales."""


def settings(**changes: Any) -> LearnerSettings:
    return LearnerSettings.model_validate(
        {"dtype": "float64", "device": "cpu", "optimizer": OPTIMIZER, "correction": {"mode": "off"}} | changes
    )


def make_step(model_dir: Path, **changes: Any) -> Step:
    return Step(settings(**changes), model_dir, SingleProcess())


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant_length"])
@pytest.mark.parametrize(
    ("layout", "budget"), [("sorted", 64), ("packed", 64), ("packed", 2048), ("sorted", 1), ("shared", 4096), ("shared", 40)]
)
def test_two_updates_equal_the_reference(model_dir: Path, aggregation: str, layout: str, budget: int) -> None:
    tolerance = 1e-7 if layout == "shared" else 1e-9  # other products round otherwise, and transformers takes norms in float32
    length = 24 if aggregation == "constant_length" else None
    step = make_step(model_dir, layout=layout, tokens_per_microbatch=budget, aggregation=aggregation, aggregation_length=length)
    reference = Reference(model_dir, **OPTIMIZER, aggregation=aggregation, length=24)
    for iteration in range(2):
        samples = random_samples(13, seed=iteration)
        metrics = step.train(samples, iteration, 2).values
        reference.train(samples)
        assert metrics["loss"] == pytest.approx(reference.losses[-1], rel=tolerance)
        assert metrics["grad_norm"] == pytest.approx(reference.norms[-1], rel=tolerance)
    found = step.state_dict_for_publishing()
    for name, expected in reference.parameters().items():
        torch.testing.assert_close(found[name], expected, rtol=tolerance, atol=tolerance / 10)


def test_metrics_equal_the_formulas(model_dir: Path) -> None:
    samples = random_samples(13)
    reference = Reference(model_dir, **OPTIMIZER)
    with torch.no_grad():
        log_ratio = torch.cat([(reference.logprobs(s) - torch.tensor(s.behaviour_logprobs))[torch.tensor(s.loss_mask)] for s in samples])
    advantage = torch.cat([torch.full((s.num_trainable,), s.advantage) for s in samples])
    ratio = log_ratio.exp()
    values = make_step(model_dir).train(samples, 0, 1).values
    clipped = ((ratio > 1.28) & (advantage > 0)) | ((ratio < 0.8) & (advantage < 0))
    assert values["tokens_trained"] == values["num_tokens"] == len(ratio)
    expected = {
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "ratio_min": ratio.min(),
        "kl": (ratio - 1 - log_ratio).mean(),
        "clip_share": clipped.double().mean(),
        "logprob_drift": log_ratio.abs().mean(),
        "logprob_drift_max": log_ratio.abs().max(),
        "lr": OPTIMIZER["lr"],
    }
    assert {name: values[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-6)


def test_entropy_is_that_of_the_tempered_distribution(model_dir: Path) -> None:
    sample = random_samples(1, temperature=1.7)[0]
    reference = Reference(model_dir, **OPTIMIZER)
    ids = torch.tensor(np.concatenate([sample.prompt_ids, sample.token_ids]).astype(np.int64))[None]
    with torch.no_grad():
        p = (reference.model(input_ids=ids).logits[0, len(sample.prompt_ids) - 1 : -1] / 1.7).softmax(-1)
    assert make_step(model_dir).train([sample], 0, 1).values["entropy"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-9)


def test_zero_advantage_samples_cost_nothing_but_count_in_the_mean(model_dir: Path) -> None:
    samples = random_samples(13)
    samples = [dataclasses.replace(s, advantage=0.0) if i % 2 else s for i, s in enumerate(samples)]
    step, reference = make_step(model_dir), Reference(model_dir, **OPTIMIZER)
    values = step.train(samples, 0, 1).values
    reference.train(samples)
    assert values["grad_norm"] == pytest.approx(reference.norms[-1], rel=1e-7)
    assert values["tokens_trained"] == sum(s.num_trainable for s in samples[::2]) < values["num_tokens"]


def test_a_batch_without_a_trainable_token_takes_no_step(model_dir: Path) -> None:
    step = make_step(model_dir)
    step.train(random_samples(5), 0, 3)
    before = step.training_state()
    nothing = [dataclasses.replace(s, loss_mask=np.zeros_like(s.loss_mask)) for s in random_samples(5)]
    values = step.train(nothing, 1, 3).values
    assert values["updates"] == values["num_tokens"] == 0 and "loss" not in values
    step.train([], 2, 3)
    after = step.training_state()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_several_updates_of_a_batch_reach_the_clip(model_dir: Path) -> None:
    samples = [s for s in random_samples(8) if s.num_trainable]
    reference = Reference(model_dir, **OPTIMIZER)
    with torch.no_grad():
        samples = [dataclasses.replace(s, behaviour_logprobs=reference.logprobs(s).numpy().astype(np.float32)) for s in samples]
    one, four = (make_step(model_dir, updates_per_batch=mu).train(samples, 0, 1).values for mu in (1, 4))
    assert one["clip_share"] == 0 and one["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert four["updates"] == 4 and four["clip_share"] > 0.05
    for _ in range(4):
        reference.train(samples)
    assert four["loss"] == pytest.approx(np.mean(reference.losses), rel=1e-6, abs=1e-9)


def test_state_resumes_to_the_same_bits(model_dir: Path) -> None:
    whole, first, second = (make_step(model_dir) for _ in range(3))
    whole.train(random_samples(9, 0), 0, 2)
    first.train(random_samples(9, 0), 0, 2)
    second.load_training_state(first.training_state())
    whole.train(random_samples(9, 1), 1, 2)
    second.train(random_samples(9, 1), 1, 2)
    expected, found = whole.training_state(), second.training_state()
    assert expected.keys() == found.keys() and any(name.startswith("optimizer.exp_avg_sq.") for name in found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(DataError, match=r"model\.model\.norm\.weight"):
        second.load_training_state({k: v for k, v in expected.items() if k != "model.model.norm.weight"})


def test_published_names_are_those_of_the_model_with_tied_weights_once(model_dir: Path) -> None:
    step = make_step(model_dir)
    published = step.state_dict_for_publishing()
    assert "model.embed_tokens.weight" in published and "lm_head.weight" not in published
    published["model.norm.weight"].zero_()
    assert step.state_dict_for_publishing()["model.norm.weight"].any()


def test_samples_that_are_not_finite_are_named_and_left_out(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = random_samples(9)
    logprobs = samples[2].behaviour_logprobs.copy()
    logprobs[0] = -np.inf
    bad = [dataclasses.replace(samples[1], advantage=float("nan")), dataclasses.replace(samples[2], behaviour_logprobs=logprobs)]
    step, clean = make_step(model_dir), make_step(model_dir)
    with caplog.at_level(logging.WARNING):
        metrics = step.train([samples[0], *bad, *samples[3:]], 0, 1)
    assert [(s.group_id, s.index, s.reason) for s in metrics.skipped] == [
        (100, 1, "advantage nan"),
        (100, 2, "behaviour log-prob -inf at token 0"),
    ]
    assert metrics.values["skipped"] == 2 and "100/2" in caplog.text
    assert metrics.values["grad_norm"] == clean.train([samples[0], *samples[3:]], 0, 1).values["grad_norm"]


@pytest.mark.parametrize("layout", ["sorted", "packed", "shared"])
def test_a_sample_whose_log_probs_break_is_left_out_of_its_micro_batch(model_dir: Path, layout: str) -> None:
    """A NaN in one row of the embedding breaks the samples that contain the token, and no other."""
    samples = [s for s in random_samples(9) if s.num_trainable]
    token = 42
    samples = [
        dataclasses.replace(
            s, token_ids=np.where(s.token_ids == token, 0, s.token_ids), prompt_ids=np.where(s.prompt_ids == token, 0, s.prompt_ids)
        )
        for s in samples
    ]
    samples[3] = dataclasses.replace(samples[3], prompt_ids=np.array([token], np.int32))
    step = make_step(model_dir, dtype="float32", layout=layout)
    untied = step.model.trunk.get_input_embeddings()
    weight = untied.weight.detach().clone()
    step.model.head.weight = torch.nn.Parameter(weight)  # untied; not trained, so the step leaves it alone
    with torch.no_grad():
        untied.weight[token] = float("nan")
    metrics = step.train(samples, 0, 1)
    assert [(s.group_id, s.index) for s in metrics.skipped] == [(samples[3].group_id, samples[3].index)]
    assert metrics.values["updates"] == 1 and np.isfinite(metrics.values["grad_norm"])


def explosive(tokens: Tokens) -> TokenLoss:
    """An objective whose gradient is infinite where the advantage is 7."""
    factor = tokens.advantages_T.where(tokens.advantages_T != 7, float("inf"))
    return TokenLoss(loss_T=-factor * tokens.policy_T, clipped_T=tokens.advantages_T > 1e9)


def test_a_gradient_that_is_not_finite_takes_no_step_and_names_its_sample(model_dir: Path) -> None:
    samples = random_samples(9)
    samples[3] = dataclasses.replace(samples[3], advantage=7.0)
    step = make_step(model_dir, objective="tests.learner.test_step:explosive")
    before = step.state_dict_for_publishing()
    metrics = step.train(samples, 0, 2)
    assert [(s.group_id, s.index) for s in metrics.skipped] == [(samples[3].group_id, samples[3].index)]
    assert metrics.values["updates"] == 0 and metrics.values["updates_skipped"] == 1 and "grad_norm" not in metrics.values
    assert all(torch.equal(before[name], tensor) for name, tensor in step.state_dict_for_publishing().items())
    assert step.train(random_samples(9), 1, 2).values["updates"] == 1


def test_the_run_ends_after_so_many_batches_of_which_nothing_is_finite(model_dir: Path) -> None:
    step = make_step(model_dir, objective="tests.learner.test_step:explosive", max_bad_steps=3)
    good = random_samples(5)
    bad = [dataclasses.replace(s, advantage=7.0) for s in good]
    unknown = [dataclasses.replace(s, advantage=float("nan")) for s in good]
    nothing = [dataclasses.replace(s, loss_mask=np.zeros_like(s.loss_mask)) for s in good]
    for n, batch in enumerate([bad, unknown, good, bad, nothing, unknown]):
        assert step.train(batch, n, 9).values["updates"] == (1 if batch is good else 0)
    with pytest.raises(Diverged, match=r"3 batches in a row, to iteration 6, .*\(sample 100/0: advantage nan; .*max_bad_steps is 3"):
        step.train(unknown, 6, 9)


def test_bfloat16_stays_near_float64(model_dir: Path) -> None:
    samples = random_samples(13)
    exact, rough = make_step(model_dir).train(samples, 0, 1).values, make_step(model_dir, dtype="bfloat16").train(samples, 0, 1).values
    assert rough["loss"] == pytest.approx(exact["loss"], rel=0.05) and rough["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.05)
    assert rough["loss"] != exact["loss"]


def test_gradient_checkpointing_changes_nothing(model_dir: Path) -> None:
    samples = random_samples(9)
    plain, saving = (make_step(model_dir, gradient_checkpointing=flag) for flag in (False, True))
    assert plain.train(samples, 0, 1).values == pytest.approx(saving.train(samples, 0, 1).values, rel=1e-12)
    assert saving.model.network.training and any(getattr(m, "gradient_checkpointing", False) for m in saving.model.network.modules())


def test_the_canary_is_a_plain_float32_forward_pass_of_the_present_parameters(model_dir: Path) -> None:
    step = make_step(model_dir, dtype="bfloat16")
    for iteration in range(2):
        canary = step.canary()
        with torch.no_grad():
            ids = torch.from_numpy(canary.ids).long()
            step.model.network.config._attn_implementation = "sdpa"
            every = step.model.network(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        expected = every[PROMPT_TOKENS - 1 : -1].gather(1, ids[PROMPT_TOKENS:, None])[:, 0]
        assert canary.dtype == "float32" and len(canary.logprobs) == len(canary.ids) - PROMPT_TOKENS
        np.testing.assert_allclose(canary.logprobs, expected.numpy(), atol=1e-6)
        before = canary.logprobs
        step.train(random_samples(13, seed=iteration), iteration, 2)
        assert np.abs(step.canary().logprobs - before).max() > 1e-4, "it follows the parameters"
