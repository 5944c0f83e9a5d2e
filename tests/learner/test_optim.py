"""The schedule's values, and the optimizer's groups and state."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from learner.optim import Updater, learning_rate
from learner.optimizers import Trained
from learner.settings import OptimizerSettings, ScheduleSettings
from protocol.errors import DataError


def rates(total: int, **settings: object) -> list[float]:
    schedule = ScheduleSettings.model_validate(settings)
    return [learning_rate(2.0, schedule, iteration, total) for iteration in range(total)]


def test_constant_with_warmup() -> None:
    assert rates(6, warmup_iterations=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates(3) == [2.0, 2.0, 2.0]


def test_linear_and_cosine_end_at_their_final_fraction() -> None:
    assert rates(6, name="linear", warmup_iterations=1, final_fraction=0.1) == pytest.approx([2.0, 2.0, 1.55, 1.1, 0.65, 0.2])
    expected = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2) for p in (0, 0.25, 0.5, 0.75, 1)]
    assert rates(5, name="cosine", final_fraction=0.1) == pytest.approx(expected)
    assert learning_rate(2.0, ScheduleSettings(name="cosine", final_fraction=0.1), 9, 5) == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear"])
def test_short_runs_have_a_rate(name: str) -> None:
    for total in (1, 2, 3):
        assert all(0 <= rate <= 2 and math.isfinite(rate) for rate in rates(total, name=name, warmup_iterations=2))


def updater(layer: nn.Module, **settings: object) -> Updater:
    trained = [Trained(name, parameter, False) for name, parameter in layer.named_parameters()]
    return Updater(trained, OptimizerSettings.model_validate(settings))


def test_only_matrices_decay() -> None:
    layer = nn.Linear(3, 2)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    updater(layer, lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(layer.weight.detach(), before["weight"] * 0.95)
    assert torch.equal(layer.bias.detach(), before["bias"])


def test_muon_takes_hidden_matrices_and_the_rest_keeps_its_own_rate() -> None:
    network = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 8))
    trained = [Trained(name, p, name in ("0.weight", "3.weight")) for name, p in network.named_parameters()]
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    found = Updater(trained, OptimizerSettings(name="muon", lr=0.1, adamw_lr=0.02))
    found.set_rate(0.05)
    found.step()
    assert {key.split(".", 2)[2] for key in found.state()} == set(before), "every parameter has one optimizer"
    assert {key for key in found.state() if "momentum" in key} == {"optimizer.momentum_buffer.1.weight"}
    for name, parameter in network.named_parameters():
        if name != "1.weight":  # Adam's first step is the rate, whatever the gradient
            torch.testing.assert_close(parameter.detach(), before[name] - 0.01)


def test_state_of_a_foreign_parameter_is_refused() -> None:
    found = updater(nn.Linear(3, 2))
    assert found.state() == {}
    with pytest.raises(DataError, match=r"optimizer\.exp_avg\.head\.weight"):
        found.state_to_fill({"optimizer.exp_avg.head.weight": ((1,), "float32")})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adam"}, "did you mean 'adamw'"),
        ({"momentum": 0.9}, "momentum belongs to optimizer 'muon'"),
        ({"adamw_lr": 0.9}, "adamw_lr is the second rate of optimizer 'muon'"),
        ({"options": {"a": 1}}, "options are for an optimizer of your own"),
        ({"name": "adamw_8bit", "offload": True}, "choose one of the two"),
        ({"betas": (0.9, 1.0)}, "never forgets"),
    ],
)
def test_settings_that_mean_nothing_are_explained(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OptimizerSettings.model_validate(settings)
