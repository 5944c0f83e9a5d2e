"""A user's own advantage and objective by "package.module:function": options checked, trained with, their gradient that of the formula."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from learner.advantages import advantages
from learner.settings import LearnerSettings
from protocol.errors import ConfigError
from tests.contracts.test_objectives import random_tokens
from tests.learner.samples import random_samples
from tests.learner.test_step import make_step
from tests.my_recipe import soft_clip


def test_an_advantage_of_ones_own() -> None:
    found = advantages("tests.my_recipe:against_best", {"margin": 0.5}, [1.0, 0.0, 0.25, 0.75], [1, 1, 2, 2], [False] * 4)
    assert found.tolist() == [0.5, -0.5, 0.0, 0.5]
    with pytest.raises(ValidationError, match="margin: Input should be greater than or equal to 0"):
        LearnerSettings(advantage="tests.my_recipe:against_best", advantage_options={"margin": -1})


def test_an_objective_of_ones_own(model_dir: Path) -> None:
    tokens = random_tokens(0, 0.3)
    (slope,) = torch.autograd.grad(soft_clip(tokens).loss_T.sum(), tokens.policy_T)
    r = (tokens.policy_T - tokens.anchor_T).exp()
    gate = torch.sigmoid(4 * (r - 1))
    torch.testing.assert_close(slope, -4 * gate * (1 - gate) * r * tokens.advantages_T)
    values = (
        make_step(model_dir, objective="tests.my_recipe:soft_clip", objective_options={"steepness": 2.0})
        .train(random_samples(5), 0, 1)
        .values
    )
    assert values["updates"] == 1 and values["grad_norm"] > 0


BAD = "tests.learner.bad_recipes"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_too_few", r"returned values of shape \(1,\), expected \(2,\): one for each sample"),
        ("no_numbers", "returned a dict, expected 2 numbers, one for each sample"),
        ("breaks", r"failed with KeyError: 'a field that is not there' \(bad_recipes.py, line \d+\)"),
    ],
)
def test_an_advantage_that_is_wrong_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^advantage '{BAD}:{name}' {message}$"):
        advantages(f"{BAD}:{name}", {}, [1.0, 0.0], [0, 0], [True, False])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_number", r"returned loss_T of \(\), expected a tensor \(\d+,\): one value for each token"),
        ("bare_tensor", "returned a Tensor, expected a learner.objectives.TokenLoss"),
        ("detached", "returned a loss_T without a gradient"),
    ],
)
def test_an_objective_that_is_wrong_is_named(model_dir: Path, name: str, message: str) -> None:
    step = make_step(model_dir, objective=f"{BAD}:{name}")
    with pytest.raises(ConfigError, match=f"^objective '{BAD}:{name}' {message}"):
        step.train(random_samples(5), 0, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("half_an_optimizer", r"holds \S+ 0 times, expected every trained parameter once"),
        ("no_optimizer", "returned a SGD, expected a list"),
    ],
)
def test_an_optimizer_that_is_wrong_is_named(model_dir: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^optimizer '{BAD}:{name}' {message}"):
        make_step(model_dir, optimizer={"name": f"{BAD}:{name}"})


def test_an_objective_of_ones_own_sees_samples_without_an_advantage(model_dir: Path) -> None:
    """Those of the table have no gradient there and skip the pass."""
    samples = [dataclasses.replace(sample, advantage=0.0) for sample in random_samples(5)]
    own = make_step(model_dir, objective=f"{BAD}:likelihood_of_all").train(samples, 0, 1).values
    assert own["updates"] == 1 and own["grad_norm"] > 0 and own["tokens_trained"] == own["num_tokens"]
    assert make_step(model_dir).train(samples, 0, 1).values["updates"] == 0
