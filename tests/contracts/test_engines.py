"""What every engine of the table must do, checked on a tiny real model against transformers' own forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engines import ENGINES, Engine, EngineOptions, Sampled
from protocol.errors import WeightsError
from protocol.messages import Span, Version
from protocol.registry import resolve
from tests.actors.tiny_models import CONTEXT, VOCABULARY, build, drain, in_flight, prompt, reference_logprobs, request, save, until_tokens

MARKS: dict[str, list[pytest.MarkDecorator]] = {"sglang": [pytest.mark.sglang]}
"""Engines that need more than the CI machine has, and the marker that says so."""
EXTRA: dict[str, dict[str, object]] = {
    "simulated": {"tokens_per_s_sample": 100, "tokens_per_s": 400, "lengths": {"mean": 900, "sigma": 0}},
}
"""Options that an engine cannot do without."""
MANY = 400
"""Samples, a hundred times more than there are slots: even an engine that nobody stops has most of them still to do many seconds later."""
ROUNDING = 3e-5
"""In nats: ten times what float32 sums in another order differ by here, which the processor decides; other weights differ by 0.01 and more."""
NO_MODEL = {"simulated"}
"""Engines whose tokens do not come from the model: what is said of log-probs and of the place of a stop token does not hold for them."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Path]]:
    """Two versions of one model and their directories."""
    return [(model := build("qwen3", seed), save(model, tmp_path_factory.mktemp(f"v{seed}"))) for seed in (0, 1)]


@pytest.fixture(params=[pytest.param(name, marks=MARKS.get(name, [])) for name in ENGINES])
def engine(request: pytest.FixtureRequest, models: list[tuple[Any, Path]]) -> Iterator[Engine]:
    """An engine with version 0 loaded."""
    name = request.param
    extra = {"url": request.getfixturevalue("sglang_url")} if name == "sglang" else EXTRA.get(name, {})
    options = EngineOptions(model_path=models[0][1], max_context=CONTEXT, slots=4, extra=extra)
    built: Engine = resolve(name, ENGINES, "engine")(options)
    try:
        assert built.version is None
        built.load_weights(models[0][1], Version(0))
        yield built
    finally:
        built.close()


@pytest.fixture
def model_engine(engine: Engine, request: pytest.FixtureRequest) -> Engine:
    """An engine that samples from the model."""
    if request.node.callspec.params["engine"] in NO_MODEL:
        pytest.skip("samples nothing from the model")
    return engine


def test_logprobs_are_those_of_a_full_forward_pass(model_engine: Engine, models: list[tuple[Any, Path]]) -> None:
    engine = model_engine
    for i, temperature in enumerate((1.0, 0.7, 1.6)):
        engine.submit(request(f"r{i}", prompt(5 + i, i), (1, 2, 3), temperature=temperature, top_p=0.9 if i else 1.0))
    ended = drain(engine)
    assert len(ended) == 9
    for (name, _), sample in ended.items():
        i = int(name[1:])
        expected = reference_logprobs(models[0][0], prompt(5 + i, i), sample.token_ids, (1.0, 0.7, 1.6)[i])
        np.testing.assert_allclose(sample.logprobs, expected, atol=ROUNDING)
        assert sample.token_ids.dtype == np.int32 and sample.logprobs.dtype == np.float32
        assert sample.spans == (Span(0, 0, 12),) and sample.finish_reason == "length"


def test_tokens_across_a_swap_belong_to_the_version_that_their_span_names(model_engine: Engine, models: list[tuple[Any, Path]]) -> None:
    """A server goes on while the swap is on its way to it; where that came after the samples' ends, another is tried. One of the two samples
    may not have begun yet."""
    engine = model_engine
    for swaps, number in enumerate(range(3, 23), 1):
        before = engine.version
        in_flight(engine, f"r{number}", (1, 2), count=5, max_tokens=40)
        engine.load_weights(models[(number - 2) % 2][1], Version(number, 1))
        assert before is not None and engine.version == Version(number, 1) and engine.load.swaps == swaps
        ended = drain(engine).values()
        assert max(sample.spans[0].end for sample in ended if sample.spans[0][:2] == before) >= 5, "seen before the swap"
        for sample in ended:
            first = sample.spans[0].end if sample.spans[0][:2] == before else 0
            assert sample.spans in ((Span(*before, 40),), (Span(*before, first), Span(number, 1, 40)), (Span(number, 1, 40),))
            of = [(number - 3) % 2, (number - 2) % 2]
            old, new = (reference_logprobs(models[version][0], prompt(7), sample.token_ids, 1.0) for version in of)
            np.testing.assert_allclose(sample.logprobs[:first], old[:first], atol=ROUNDING)
            np.testing.assert_allclose(sample.logprobs[first:], new[first:], atol=ROUNDING)
        if all(len(sample.spans) == 2 for sample in ended):
            assert len(ended) == 2 and all(0 < sample.spans[0].end < 40 for sample in ended)
            return
    raise AssertionError("no swap came while samples ran")


def test_a_seed_fixes_the_sample(engine: Engine) -> None:
    engine.submit(request("alone", prompt(6), (11,)))
    alone = drain(engine)["alone", 0]
    for i in range(3):
        engine.submit(request(f"other{i}", prompt(3 + i, 9), (i, i + 1, i + 2), max_tokens=5 + i))
    engine.submit(request("again", prompt(6), (12, 11)))
    ended = drain(engine)
    np.testing.assert_array_equal(alone.token_ids, ended["again", 1].token_ids)
    assert not np.array_equal(alone.token_ids, ended["again", 0].token_ids)


def test_a_stop_token_ends_a_sample_and_is_part_of_it(model_engine: Engine) -> None:
    engine = model_engine
    engine.submit(request("free", prompt(6), (5,), max_tokens=30))
    free = drain(engine)["free", 0].token_ids
    stop = int(free[4])
    engine.submit(request("stopped", prompt(6), (5,), max_tokens=30, stop_token_ids=(stop, VOCABULARY - 1)))
    sample = drain(engine)["stopped", 0]
    end = int(np.flatnonzero(np.isin(free, (stop, VOCABULARY - 1)))[0]) + 1
    np.testing.assert_array_equal(sample.token_ids, free[:end])
    assert sample.finish_reason == "stop" and sample.spans[-1].end == end == len(sample.logprobs)


def test_the_context_ends_a_sample(engine: Engine) -> None:
    engine.submit(request("r", prompt(CONTEXT - 3), (1,), max_tokens=100))
    sample = drain(engine)["r", 0]
    assert len(sample.token_ids) == 3 and sample.finish_reason == "length"


def test_abort_returns_what_was_sampled_and_leaves_others_alone(engine: Engine) -> None:
    """A server goes on while the abort is on its way to it, so a few may end by themselves; what waits for a slot cannot. Where the abort came
    after the ends of all that ran, and before the next had a token, another is tried."""
    for attempt in range(10):
        kept, name = f"kept{attempt}", f"ended{attempt}"
        engine.submit(request(kept, prompt(4, 1), (1,), max_tokens=20))
        engine.submit(request(name, prompt(5), tuple(range(MANY)), max_tokens=50))
        before: dict[tuple[str, int], Sampled] = {}
        while more := until_tokens(engine, name, 3):  # those ended: until others run
            before |= more
        engine.abort(name)
        engine.abort("never heard of")
        ended = before | drain(engine)
        samples = [ended.pop((name, i)) for i in range(MANY)]
        aborted = [s for s in samples if s.finish_reason == "abort"]
        assert {s.finish_reason for s in samples} <= {"abort", "length"} and len(aborted) >= 20
        assert max(len(s.token_ids) for s in samples) >= 3 and min(len(s.token_ids) for s in aborted) == 0
        assert all((s.spans[-1].end if s.spans else 0) == len(s.token_ids) == len(s.logprobs) for s in aborted)
        assert list(ended) == [(kept, 0)] and len(ended[kept, 0].token_ids) == 20
        if any(s.token_ids.size for s in aborted):
            return
    raise AssertionError("no abort came while samples ran")


def test_score_agrees_with_sampling(engine: Engine) -> None:
    engine.submit(request("r", prompt(9), (1,), temperature=0.8))
    sample = drain(engine)["r", 0]
    np.testing.assert_allclose(engine.score(prompt(9), sample.token_ids, 0.8), sample.logprobs, atol=ROUNDING)


def test_load_counts_samples_and_tokens(engine: Engine) -> None:
    before = engine.load
    assert (before.running, before.waiting, before.capacity, before.progress) == (0, 0, 4, {})
    engine.submit(request("r", prompt(9), tuple(range(7)), max_tokens=6))
    assert engine.load.running + engine.load.waiting == 7
    drain(engine)
    assert engine.load.tokens_sampled - before.tokens_sampled == 7 * 6
    assert engine.load.tokens_prefilled > before.tokens_prefilled


@pytest.mark.parametrize("ids", [[1, VOCABULARY, 2], [-1], [], list(range(CONTEXT))], ids=["above", "below", "empty", "no room"])
def test_a_prompt_that_cannot_be_sampled_is_refused(engine: Engine, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="request bad"):
        engine.submit(request("bad", np.array(ids, np.int32), (1,)))
    assert engine.load.waiting == 0


def test_a_wrong_directory_leaves_the_old_version_at_work(model_engine: Engine, models: list[tuple[Any, Path]], tmp_path: Path) -> None:
    engine = model_engine
    engine.submit(request("r", prompt(5), (1,), max_tokens=40))
    ended = until_tokens(engine, "r", 2)
    with pytest.raises(WeightsError, match=str(tmp_path)):
        engine.load_weights(tmp_path, Version(1))
    assert engine.version == Version(0)
    sample = (ended | drain(engine))["r", 0]
    assert len(sample.token_ids) == 40
    np.testing.assert_allclose(sample.logprobs, reference_logprobs(models[0][0], prompt(5), sample.token_ids, 1.0), atol=ROUNDING)
