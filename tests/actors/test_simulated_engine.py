"""The simulated engine on a clock that is moved by hand. What it has in common with other engines is in tests/contracts/test_engines.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engines import EngineOptions, SampleRequest, Sampling
from actors.engines.lengths import LengthOptions, Lengths
from actors.engines.simulated import SimulatedEngine
from protocol.errors import ConfigError, WeightsError
from protocol.messages import Span, Version

SPEED = 10.0
RATES = {"tokens_per_s_sample": 100, "tokens_per_s": 400, "speed": SPEED}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50}))
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    return tmp_path


def build(model: Path, **extra: Any) -> tuple[SimulatedEngine, Clock]:
    clock = Clock()
    options = {**RATES, "lengths": {"mean": 200, "sigma": 0, "cap": 200}, **extra}
    engine = SimulatedEngine(EngineOptions(model_path=model, max_context=10_000, slots=8, extra=options), clock)
    engine.load_weights(model, Version(0))
    return engine, clock


def request(name: str, seeds: tuple[int, ...] = (1,), prompt: int = 5, **sampling: Any) -> SampleRequest:
    return SampleRequest(
        request_id=name,
        prompt_ids=np.ones(prompt, np.int32),
        seeds=seeds,
        sampling=Sampling(max_tokens=5000, stop_token_ids=(7,), **sampling),
    )


def test_a_sample_takes_its_tokens_over_the_rate_over_the_speed(model: Path) -> None:
    engine, clock = build(model)
    engine.submit(request("a"))
    assert engine.load.ready_in_s == pytest.approx(0.2)  # 200 tokens at 100 per second, ten times faster
    clock.now += 0.19
    assert engine.step(9.0) == [] and engine.load.ready_in_s == pytest.approx(0.01)
    clock.now += 0.011
    (sample,) = engine.step(9.0)
    assert len(sample.token_ids) == 200 and sample.finish_reason == "stop" and sample.token_ids[-1] == 7
    assert 7 not in sample.token_ids[:-1] and sample.token_ids.min() >= 0 and sample.token_ids.max() < 50
    assert sample.logprobs == pytest.approx(np.full(200, -math.log(50)))
    assert engine.load.ready_in_s == math.inf


def test_eight_samples_share_the_device(model: Path) -> None:
    engine, clock = build(model)
    engine.submit(request("a", tuple(range(8))))  # 8 at 400 per second: 50 each
    clock.now += 0.39
    assert not engine.step(0)
    clock.now += 0.02
    assert len(engine.step(0)) == 8


def test_lengths_are_those_of_the_seeds(model: Path) -> None:
    lengths = {"mean": 300, "sigma": 0.9, "cap": 2000}
    engine, clock = build(model, lengths=lengths)
    engine.submit(request("a", (11, 12, 13, 14, 15, 16, 17)))
    clock.now += 1000
    expected = [Lengths(LengthOptions.model_validate(lengths))(seed) for seed in range(11, 18)]
    assert [len(s.token_ids) for s in sorted(engine.step(0), key=lambda s: s.position)] == expected


def test_an_update_stalls_every_sample_and_names_the_version_of_later_tokens(model: Path) -> None:
    engine, clock = build(model, update_s=0.05, recompute_cache=True, prefill_tokens_per_s=1050)
    clock.now += 1
    engine.submit(request("a", prompt=5))
    clock.now += 0.1 + 5 / 1050 / SPEED  # the prompt's prefill, then 100 tokens
    paused = engine.load_weights(model, Version(1))
    assert paused == pytest.approx((0.05 + 105 / 1050) / SPEED)
    assert engine.load.ready_in_s == pytest.approx(0.1 + paused)
    clock.now += 0.11 + paused
    (sample,) = engine.step(0)
    assert sample.spans == (Span(0, 0, 100), Span(1, 0, 200))


def test_samples_that_end_while_weights_are_loaded_count_until_they_are_given_out(model: Path) -> None:
    engine, clock = build(model)
    engine.submit(request("a", (1, 2)))
    clock.now += 100
    engine.load_weights(model, Version(1))
    assert (engine.load.running, engine.load.waiting, engine.load.ready_in_s) == (2, 0, 0.0), "somebody has to come for them"
    assert len(engine.step(0)) == 2
    assert engine.load.running == 0


@pytest.mark.parametrize(
    ("extra", "why"),
    [({"speed": 0}, "speed"), ({"tokens_per_s": -1}, "tokens_per_s"), ({"x": 1}, "option x"), ({"lengths": {}}, "either mean")],
)
def test_options_must_be_known_and_make_sense(model: Path, extra: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=f"simulated engine.*{why}"):
        build(model, **extra)


def test_a_directory_without_weights_leaves_the_old_version_at_work(model: Path, tmp_path: Path) -> None:
    engine, clock = build(model)
    engine.submit(request("a"))
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=str(empty)):
        engine.load_weights(empty, Version(1))
    clock.now += 0.21
    assert [s.spans for s in engine.step(0)] == [(Span(0, 0, 200),)]


def test_a_model_without_a_vocabulary_is_refused(model: Path) -> None:
    (model / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="vocab_size"):
        build(model)
