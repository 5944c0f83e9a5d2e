"""The terms beside the objective, against the slow reference and by their formulas."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.correction import correction_weights
from learner.packing import TrainSample
from learner.parallel import SingleProcess
from learner.regularisers import kl_estimate, next_entropy_coefficient
from learner.settings import CorrectionSettings, EntropySettings, KLEstimator, LearnerSettings
from learner.step import Step
from tests.learner.conftest import save_model
from tests.learner.reference import Reference, clipped_token
from tests.learner.samples import random_samples

OPTIMIZER = {"lr": 0.05, "eps": 0.5}


def make_step(model_dir: Path, **changes: Any) -> Step:
    base = {"dtype": "float64", "device": "cpu", "optimizer": OPTIMIZER, "correction": {"mode": "off"}, "tokens_per_microbatch": 128}
    return Step(LearnerSettings.model_validate(base | changes), model_dir, SingleProcess())


class WithTerms(Reference):
    """The reference with all terms, each sample's tokens by the definition: token mean only."""

    kl: float = 0.0
    estimator: KLEstimator = "k3"
    entropy: float = 0.0
    sft: float = 0.0
    correction: CorrectionSettings | None = None
    base: Reference

    def entropies(self, sample: TrainSample) -> Tensor:
        ids = torch.tensor(np.concatenate([sample.prompt_ids, sample.token_ids]).astype(np.int64))[None]
        logits = self.model(input_ids=ids).logits[0, len(sample.prompt_ids) - 1 : -1] / sample.temperature
        return torch.stack([-(row.softmax(-1) * row.log_softmax(-1)).sum() for row in logits])

    def loss(self, samples: Any) -> Tensor:
        total, count = torch.zeros((), dtype=torch.float64), sum(s.num_trainable for s in samples)
        positive = sum(s.num_trainable for s in samples if s.positive)
        for s in samples:
            policy, entropies = self.logprobs(s), self.entropies(s)
            with torch.no_grad():
                reference = self.base.logprobs(s)
            for t in np.flatnonzero(s.loss_mask):
                behaviour = float(s.behaviour_logprobs[t])
                if self.correction is None:
                    term = clipped_token(policy[t], behaviour, s.advantage)
                else:
                    proximal = policy[t].item()
                    weight = math.exp(proximal - behaviour)
                    if self.correction.mode == "mask":
                        weight = weight if self.correction.floor <= weight <= self.correction.cap else 0.0
                    term = min(weight, self.correction.cap) * clipped_token(policy[t], proximal, s.advantage)
                d = reference[t] - policy[t]
                term = term + self.kl * {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}[self.estimator] - self.entropy * entropies[t]
                total = total + term / count
                if s.positive:
                    total = total - self.sft * policy[t] / positive
        return total


def check(model_dir: Path, base_dir: Path, settings: dict[str, Any], **terms: Any) -> dict[str, float]:
    samples = [
        dataclasses.replace(s, positive=i % 3 == 0, advantage=0.0 if i % 3 == 1 else s.advantage) for i, s in enumerate(random_samples(11))
    ]
    reference = WithTerms(model_dir, **OPTIMIZER)
    reference.base = Reference(base_dir, **OPTIMIZER)
    for name, value in terms.items():
        setattr(reference, name, value)
    step = make_step(model_dir, **settings)
    values = step.train(samples, 0, 1).values
    reference.train(samples)
    # transformers takes norms in float32 whatever the model's dtype, so float64 agrees to about 1e-8
    assert values["loss"] == pytest.approx(reference.losses[0], rel=1e-7)
    assert values["grad_norm"] == pytest.approx(reference.norms[0], rel=1e-7)
    found = step.state_dict_for_publishing()
    for name, expected in reference.parameters().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-7, atol=1e-9)
    return values


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), seed=5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_to_a_reference(model_dir: Path, base_dir: Path, estimator: KLEstimator) -> None:
    kl = {"coefficient": 0.3, "estimator": estimator, "reference": str(base_dir)}
    values = check(model_dir, base_dir, {"kl": kl}, kl=0.3, estimator=estimator)
    assert values["reference_kl"] != 0


def test_the_reference_is_the_start_by_default_and_never_moves(model_dir: Path) -> None:
    step = make_step(model_dir, kl={"coefficient": 0.3}, updates_per_batch=3)
    first = step.train(random_samples(5), 0, 2).values
    assert first["reference_kl"] > 0
    second = step.train(random_samples(5, 1), 1, 2).values
    assert second["reference_kl"] > 0


def test_entropy_bonus(model_dir: Path, base_dir: Path) -> None:
    check(model_dir, base_dir, {"entropy": {"coefficient": 0.2}}, entropy=0.2)


def test_likelihood_of_positive_samples(model_dir: Path, base_dir: Path) -> None:
    check(model_dir, base_dir, {"sft_coefficient": 0.1}, sft=0.1)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_token_correction(model_dir: Path, base_dir: Path, mode: str) -> None:
    correction = CorrectionSettings.model_validate({"mode": mode, "cap": 3.0})
    values = check(model_dir, base_dir, {"correction": correction.model_dump()}, correction=correction)
    assert 0 < values["correction_share"] < 1 and values["correction_max"] > 3 and values["clip_share"] == 0


def test_all_terms_together(model_dir: Path, base_dir: Path) -> None:
    correction = CorrectionSettings(mode="truncate")
    settings = {
        "kl": {"coefficient": 0.3, "reference": str(base_dir)},
        "entropy": {"coefficient": 0.2},
        "sft_coefficient": 0.1,
        "correction": correction.model_dump(),
    }
    check(model_dir, base_dir, settings, kl=0.3, entropy=0.2, sft=0.1, correction=correction)


def test_a_correction_keeps_its_proximal_policy_through_all_updates(model_dir: Path) -> None:
    """The weights are of the policy before the first update, so more updates move the ratio and not the weights."""
    one, three = (
        make_step(model_dir, correction={"mode": "truncate"}, updates_per_batch=mu).train(random_samples(9), 0, 1).values for mu in (1, 3)
    )
    assert three["correction_mean"] == pytest.approx(one["correction_mean"], rel=1e-12)
    assert one["clip_share"] == 0 < three["clip_share"]


def test_levels_of_the_weight() -> None:
    proximal, behaviour = torch.tensor([-1.0, -2.0, -3.0, -1.0]), torch.tensor([-1.5, -2.5, -2.0, -1.0])
    sample = torch.tensor([0, 1, 0, 1])

    def weights(level: str, **options: Any) -> list[float]:
        settings = CorrectionSettings.model_validate({"level": level, "mode": "truncate", "cap": 100.0} | options)
        return correction_weights(proximal, behaviour, sample, 2, settings)[0].tolist()

    assert weights("token") == pytest.approx([math.exp(x) for x in (0.5, 0.5, -1.0, 0.0)])
    assert weights("sequence") == pytest.approx([math.exp(x) for x in (-0.5, 0.5, -0.5, 0.5)])
    assert weights("geometric") == pytest.approx([math.exp(x) for x in (-0.25, 0.25, -0.25, 0.25)])
    assert weights("token", mode="mask", cap=1.2, floor=0.5) == [0.0, 0.0, 0.0, 1.0]
    assert weights("token", cap=1.2)[:2] == pytest.approx([1.2, 1.2])


def test_auto_correction_turns_on_when_sampler_and_trainer_differ_and_stays(model_dir: Path) -> None:
    reference = Reference(model_dir, **OPTIMIZER)
    with torch.no_grad():
        near = [dataclasses.replace(s, behaviour_logprobs=reference.logprobs(s).numpy().astype(np.float32)) for s in random_samples(6)]
    step = make_step(model_dir, correction={"mode": "auto"}, optimizer={"lr": 1e-9})
    found = [step.train(samples, i, 5).values["corrected"] for i, samples in enumerate([near, near, random_samples(6), near])]
    assert found == [0.0, 0.0, 0.0, 1.0]
    resumed = make_step(model_dir, correction={"mode": "auto"})
    resumed.load_training_state(step.training_state())
    assert resumed.train(near, 4, 5).values["corrected"] == 1.0


def test_adaptive_entropy_follows_the_target(model_dir: Path) -> None:
    settings = EntropySettings(adaptive=True, target=0.2, delta=0.1)
    coefficients = [0.0]
    for entropy in (0.1, 0.1, 0.3, 0.3, 0.3):
        coefficients.append(next_entropy_coefficient(coefficients[-1], entropy, settings))
    assert coefficients == pytest.approx([0.0, 0.1, 0.2, 0.1, 0.0, 0.0])
    assert next_entropy_coefficient(0.5, 0.0, EntropySettings()) == 0.5
    step = make_step(model_dir, entropy={"adaptive": True, "target": 50.0, "delta": 0.25})
    values = [step.train(random_samples(5, i), i, 3).values["entropy_coefficient"] for i in range(3)]
    assert values == [0.0, 0.25, 0.5]
    resumed = make_step(model_dir, entropy={"adaptive": True, "target": 50.0, "delta": 0.25})
    resumed.load_training_state(step.training_state())
    assert resumed.train(random_samples(5), 3, 4).values["entropy_coefficient"] == 0.75


def test_kl_estimates_agree_on_average() -> None:
    """Drawn from the policy, all three estimate the same divergence (k2 for policies that are near)."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = ((torch.randn(20, generator=generator, dtype=torch.float64) * 0.2).log_softmax(-1) for _ in range(2))
    exact = float((policy.exp() * (policy - reference)).sum())
    drawn = torch.multinomial(policy.exp(), 400_000, replacement=True, generator=generator)
    for estimator in ("k1", "k2", "k3"):
        assert float(kl_estimate(policy[drawn], reference[drawn], estimator).mean()) == pytest.approx(exact, rel=0.1)
