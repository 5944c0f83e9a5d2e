"""A user's own advantage and objective by "package.module:function": options checked, trained with, their gradient that of the formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from learner.advantages import advantages
from learner.settings import LearnerSettings
from tests.contracts.test_objectives import random_tokens
from tests.learner.samples import random_samples
from tests.learner.test_step import make_step
from tests.my_recipe import soft_clip


def test_an_advantage_of_ones_own() -> None:
    found = advantages("tests.my_recipe:against_best", {"margin": 0.5}, [1.0, 0.0, 0.25, 0.75], [1, 1, 2, 2])
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
