"""The simulated step takes the time that its model says and publishes weights that change."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.checkpoint import load, snapshot, write
from learner.packing import TrainSample
from learner.parallel import SingleProcess
from learner.settings import LearnerSettings
from learner.simulated_options import Options
from learner.simulated_step import SimulatedStep
from protocol.errors import ConfigError, DataError


def sample(tokens: int, *, trained: bool = True) -> TrainSample:
    return TrainSample(
        group_id=0, index=0, prompt_ids=np.zeros(10, np.int32), token_ids=np.zeros(tokens, np.int32), behaviour_logprobs=np.zeros(tokens, np.float32),
        loss_mask=np.full(tokens, trained), advantage=1.0, temperature=1.0, positive=True,
    )  # fmt: skip


def build(**options: Any) -> SimulatedStep:
    settings = LearnerSettings(step="simulated", step_options={"tokens_per_s": 1000, "speed": 100, **options})
    return SimulatedStep(settings, Path("nowhere"), SingleProcess())


def test_the_time_of_a_step_is_that_of_its_tokens() -> None:
    model = Options(tokens_per_s=9000, devices=4, fixed_s=2)
    assert model.step_s(72_000) == pytest.approx(2 + 2)
    assert model.step_s(72_000, updates=3, ranks=2) == pytest.approx(2 + 3)


def test_a_step_waits_for_trainable_samples_alone() -> None:
    step, started = build(), time.monotonic()
    metrics = step.train([sample(4990), sample(990), sample(7000, trained=False)], 0, 1).values
    assert time.monotonic() - started >= 6.0 / 100  # 6,000 tokens at 1,000 per second, a hundred times faster
    assert (metrics["num_tokens"], metrics["tokens_trained"], metrics["num_samples"]) == (5980, 6000, 2)


def weights(step: SimulatedStep) -> torch.Tensor:
    return dict(step.published_tensors())["simulated.weights"].clone()


def test_weights_change_with_every_update_and_can_be_restored(tmp_path: Path) -> None:
    step = build(weight_bytes=128, speed=1e9)
    first = weights(step)
    step.train([sample(10)], 0, 2)
    second = weights(step)
    assert first.nbytes == 128 and not torch.equal(first, second)
    saved = write(snapshot(step, 1), tmp_path)
    step.train([sample(10)], 1, 2)
    assert saved is not None
    load(saved.path, step)
    assert torch.equal(weights(step), second)
    with pytest.raises(DataError, match="another model"):
        load(saved.path, build(weight_bytes=256))


def test_a_batch_without_a_trainable_token_is_no_update() -> None:
    step = build(fixed_s=1e6)
    before = weights(step)
    assert step.train([sample(5, trained=False)], 0, 1).values["updates"] == 0
    assert torch.equal(weights(step), before)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"simulated step.*no_such_option"):
        build(no_such_option=1)
