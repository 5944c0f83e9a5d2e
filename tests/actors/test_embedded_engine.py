"""The embedded engine: equality with transformers for every family, its scheduling, and what it refuses. See also tests/contracts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.engines import EngineOptions
from actors.engines.decoder import Decoder
from actors.engines.embedded import EmbeddedEngine
from actors.engines.invariance import Invariance, padded
from actors.engines.slots import Slots
from protocol.errors import ConfigError, DataError, InfrastructureFault, WeightsError
from protocol.messages import Span, Version
from tests.actors.tiny_models import CONTEXT, VOCABULARY, build, drain, prompt, reference_logprobs, request, save

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "llama": ("llama", {}),
    "llama with every bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3 with biases, untied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    "one head per key": ("qwen2", {"num_key_value_heads": 4}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "yarn rope": ("qwen2", {"rope_parameters": YARN}),
}


def start(directory: Path, *, slots: int = 4, weights: Path | None = None, **settings: Any) -> EmbeddedEngine:
    """An engine with version 0 loaded."""
    engine = EmbeddedEngine(EngineOptions(model_path=directory, max_context=CONTEXT, slots=slots, **settings))
    engine.load_weights(weights or directory, Version(0))
    return engine


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = build("qwen3")
    return model, save(model, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def updated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The next version of the same model."""
    model = build("qwen3", seed=1)
    return model, save(model, tmp_path_factory.mktemp("updated"))


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_and_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    model = build(family, **changes)
    engine = start(save(model, tmp_path))
    for i in range(6):  # prompts of 1 to 51 tokens, prefilled together
        engine.submit(request(f"sampled{i}", prompt(1 + 10 * i, i), (i, i + 100), temperature=1.0 + 0.1 * i))
        engine.submit(request(f"greedy{i}", prompt(1 + 10 * i, i), (0,), temperature=0.0))
    ended = drain(engine)
    for (request_id, _), sample in ended.items():
        i, greedy = int(request_id[-1]), request_id.startswith("greedy")
        expected = reference_logprobs(model, prompt(1 + 10 * i, i), sample.token_ids, 0.0 if greedy else 1.0 + 0.1 * i)
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-5, err_msg=request_id)
        if greedy:
            ids = torch.from_numpy(prompt(1 + 10 * i, i).astype(np.int64))[None]
            generated = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
            np.testing.assert_array_equal(sample.token_ids, generated[0, ids.shape[1] :].numpy())


def test_swaps_in_mid_sequence_recompute_the_cache(qwen3: tuple[Any, Path], updated: tuple[Any, Path]) -> None:
    """Samples of many lengths, running and waiting, across three swaps: each token's log-prob is that of its own version."""
    models = [qwen3, updated, qwen3, updated]
    engine = start(qwen3[1], slots=5, extra={"prefill_tokens": 30})
    for i in range(6):
        engine.submit(request(f"r{i}", prompt(1 + 6 * i, i), (i, i + 1), max_tokens=10 + 2 * i))
    ended = {}
    for version in range(1, 4):
        for _ in range(7):
            ended.update({(s.request_id, s.position): s for s in engine.step(0)})
        assert engine.load_weights(models[version][1], Version(version)) > 0
    ended.update(drain(engine))
    assert len(ended) == 12 and engine.load.swaps == 3
    assert max(len(sample.spans) for sample in ended.values()) >= 3
    for (request_id, _), sample in ended.items():
        i, begin = int(request_id[1:]), 0
        assert len(sample.token_ids) == 10 + 2 * i
        for span in sample.spans:
            assert span.end > begin
            expected = reference_logprobs(models[span.version][0], prompt(1 + 6 * i, i), sample.token_ids, 1.0)
            np.testing.assert_allclose(sample.logprobs[begin : span.end], expected[begin : span.end], atol=1e-5, err_msg=request_id)
            begin = span.end
        assert begin == len(sample.token_ids)


def test_a_swap_before_the_first_token_leaves_no_trace_of_the_old_version(qwen3: tuple[Any, Path], updated: tuple[Any, Path]) -> None:
    engine = start(qwen3[1])
    engine.submit(request("r", prompt(5), (1,)))
    assert engine.load_weights(updated[1], Version(1)) == 0.0  # nothing ran, so nothing stood still
    assert drain(engine)["r", 0].spans == (Span(1, 0, 12),)


def test_tokens_do_not_depend_on_slots_neighbours_or_batches(qwen3: tuple[Any, Path]) -> None:
    """The same requests through 1, 3 and 16 slots, in other orders and prefill batches, with filters on some."""
    requests = [
        request(
            f"r{i}",
            prompt(3 + 5 * i, i),
            (10 * i, 10 * i + 1, 10 * i + 2),
            6 + 3 * i,
            top_p=0.8 if i % 2 else 1.0,
            top_k=20 if i > 3 else 0,
        )
        for i in range(6)
    ]
    results = []
    for slots, order, prefill_tokens in ((1, 1, 512), (3, -1, 1), (16, 1, 64)):
        engine = start(qwen3[1], slots=slots, extra={"prefill_tokens": prefill_tokens})
        for item in requests[::order]:
            engine.submit(item)
        results.append(drain(engine))
    assert len(results[0]) == 18
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for key, sample in other.items():
            np.testing.assert_array_equal(sample.token_ids, results[0][key].token_ids)
            np.testing.assert_allclose(sample.logprobs, results[0][key].logprobs, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_invariant_samples_are_the_same_to_the_last_bit(qwen3: tuple[Any, Path], dtype: str) -> None:
    """Through other numbers of slots, in other orders, arriving at once or one after the other: other neighbours at every step."""
    requests = [
        request(f"r{i}", prompt(3 + 5 * i, i), tuple(range(10 * i, 10 * i + 4)), 30 - 3 * i, top_p=0.8 if i % 3 == 1 else 1.0)
        for i in range(8)
    ]
    results = []
    for slots, order, pause in ((5, 1, 0), (24, -1, 3), (40, 1, 2), (1, 1, 0)):
        engine = start(qwen3[1], slots=slots, dtype=dtype, extra={"batch_invariant": True})
        ended = {}
        for item in requests[::order]:
            engine.submit(item)
            for _ in range(pause):
                ended.update({(s.request_id, s.position): s for s in engine.step(0)})
        results.append(ended | drain(engine))
    assert len(results[0]) == 32
    assert len({s.token_ids.tobytes() for s in results[0].values()}) > 25
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for key, sample in other.items():
            assert sample.token_ids.tobytes() == results[0][key].token_ids.tobytes(), key
            assert sample.logprobs.tobytes() == results[0][key].logprobs.tobytes(), key


def test_the_width_of_a_tile_is_what_the_arithmetic_bears(qwen3: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that round by their place, or by how long the context is, are found out, and decoding goes on without them."""

    def exact(self: Decoder, ids: torch.Tensor, positions: torch.Tensor, context: int, first: int = 0) -> torch.Tensor:
        return torch.outer(torch.sin(ids.float() * 7 + positions), torch.ones(VOCABULARY))

    def by_place(self: Decoder, ids: torch.Tensor, positions: torch.Tensor, context: int, first: int = 0) -> torch.Tensor:
        return exact(self, ids, positions, context) * (1.0 + 1e-6 * (torch.arange(len(ids)) >= 4))[:, None]

    def by_context(self: Decoder, ids: torch.Tensor, positions: torch.Tensor, context: int, first: int = 0) -> torch.Tensor:
        return exact(self, ids, positions, context) * (1.0 + 1e-6 * (context < 128))

    for decode, width, shortest in ((exact, 16, 64), (by_place, 4, 64), (by_context, 16, 128)):
        monkeypatch.setattr(Decoder, "decode", decode)
        decoder = Decoder(qwen3[1], slots=padded(5), max_context=128, dtype=torch.float32, device=torch.device("cpu"))
        decoder.weights.load(qwen3[1])
        found = Invariance(decoder, 128)
        slots = Slots(5, 128)
        slots.start(request("r", prompt(3), (1,)), 0, 128)
        [(first, tile)] = found.tiles(slots.rows())
        assert (first, len(tile.places), found.width, found.context(tile)) == (0, width, width, shortest)


def test_members_of_a_group_share_one_prefill_and_start_as_slots_free_up(qwen3: tuple[Any, Path]) -> None:
    engine = start(qwen3[1], slots=3)
    engine.submit(request("group", prompt(20), tuple(range(8)), max_tokens=4))
    engine.step(0)
    assert (engine.load.running, engine.load.waiting) == (3, 5)
    assert len(drain(engine)) == 8
    assert engine.load.tokens_prefilled == 19  # once, and all but the token that the first step feeds


def test_a_freed_slot_is_taken_in_the_next_step(qwen3: tuple[Any, Path]) -> None:
    engine = start(qwen3[1], slots=2)
    engine.submit(request("short", prompt(3), (1,), max_tokens=2))
    engine.submit(request("long", prompt(3), (1,), max_tokens=20))
    engine.submit(request("next", prompt(3), (1,), max_tokens=20))
    engine.step(0)
    assert [s.request_id for s in engine.step(0)] == ["short"]
    engine.step(0)
    assert engine.load.progress == {"long": 3, "next": 1}


def test_abort_in_the_middle_moves_the_last_rows_and_keeps_their_samples_right(qwen3: tuple[Any, Path]) -> None:
    """What moves with a sample: cache, tokens, log-probs, settings and the stop token, which is one of its own at or after its tenth."""
    engine, stops = start(qwen3[1], slots=6), {}
    for i in range(6):
        engine.submit(request(f"free{i}", prompt(4 + i, i), (i,), max_tokens=20, temperature=1.0 + 0.1 * i))
    for (name, _), sample in drain(engine).items():
        ids = sample.token_ids.tolist()
        stops[int(name[-1])] = next((token, at + 1) for at, token in enumerate(ids) if at >= 9 and ids.index(token) == at)
    for i in range(6):
        engine.submit(request(f"r{i}", prompt(4 + i, i), (i,), max_tokens=20, temperature=1.0 + 0.1 * i, stop_token_ids=(stops[i][0],)))
    for _ in range(5):
        engine.step(0)
    for i in (0, 3, 4):
        engine.abort(f"r{i}")
    ended = drain(engine)
    for i in range(6):
        sample, aborted = ended[f"r{i}", 0], i in (0, 3, 4)
        assert (len(sample.token_ids), sample.finish_reason) == ((5, "abort") if aborted else (stops[i][1], "stop"))
        expected = reference_logprobs(qwen3[0], prompt(4 + i, i), sample.token_ids, 1.0 + 0.1 * i)
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-5)


def test_nothing_is_sampled_before_the_first_weights(qwen3: tuple[Any, Path]) -> None:
    engine = EmbeddedEngine(EngineOptions(model_path=qwen3[1], max_context=CONTEXT, slots=2))
    engine.submit(request("r", prompt(3), (1,)))
    engine.submit(request("gone", prompt(3), (1,)))
    engine.abort("gone")
    assert [s.request_id for s in engine.step(0)] == ["gone"] and engine.step(0) == []
    assert engine.version is None and engine.load.waiting == 1
    with pytest.raises(InfrastructureFault, match="no weights"):
        engine.score(prompt(3), prompt(3), 1.0)
    engine.load_weights(qwen3[1], Version(0))
    assert len(drain(engine)) == 1


@pytest.mark.parametrize(
    "changes",
    [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}],
    ids=lambda c: next(iter(c)),
)
def test_sampling_settings_out_of_range_are_refused(qwen3: tuple[Any, Path], changes: dict[str, Any]) -> None:
    engine = start(qwen3[1])
    with pytest.raises(ValueError, match=f"request bad.*{next(iter(changes))}"):
        engine.submit(request("bad", prompt(3), (1,), **changes))


def test_a_request_twice_or_without_samples_is_refused(qwen3: tuple[Any, Path]) -> None:
    engine = start(qwen3[1], slots=1)
    with pytest.raises(ValueError, match="no seeds"):
        engine.submit(request("r", prompt(3), ()))
    engine.submit(request("r", prompt(3), (1,)))
    for _ in range(2):  # waiting, then running
        with pytest.raises(ValueError, match="already"):
            engine.submit(request("r", prompt(3), (1,)))
        engine.step(0)


def test_score_refuses_what_does_not_fit(qwen3: tuple[Any, Path]) -> None:
    engine = start(qwen3[1])
    assert engine.score(prompt(3), np.zeros(0, np.int32), 1.0).shape == (0,)
    for before, after in ((prompt(CONTEXT), prompt(1)), (prompt(0), prompt(3)), (prompt(3), np.array([VOCABULARY], np.int32))):
        with pytest.raises(ValueError, match="score"):
            engine.score(before, after, 1.0)


def test_weights_that_are_not_numbers_are_a_fault_and_leave_no_trace(qwen3: tuple[Any, Path], tmp_path: Path) -> None:
    tensors = load_file(qwen3[1] / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    engine = start(qwen3[1])
    for name in ("long", "longer"):
        engine.submit(request(name, prompt(30), (1,), max_tokens=20))
    engine.step(0)
    engine.load_weights(tmp_path, Version(1))
    engine.abort("long")
    with pytest.raises(InfrastructureFault, match="token 1 of longer/0 under v1"):
        engine.step(0)
    engine.load_weights(qwen3[1], Version(2))
    engine.submit(request("short", prompt(3), (1,), max_tokens=5))  # beside a longer one, in a row that held what is not a number
    ended = drain(engine)
    assert ended["long", 0].finish_reason == "abort" and ended["longer", 0].spans == (Span(0, 0, 1), Span(2, 0, 20))
    for name, length in (("short", 3), ("longer", 30)):
        sample = ended[name, 0]
        np.testing.assert_allclose(sample.logprobs, reference_logprobs(qwen3[0], prompt(length), sample.token_ids, 1.0), atol=1e-5)


def test_shards_and_an_absent_or_present_tied_head_load_alike(qwen3: tuple[Any, Path], tmp_path: Path) -> None:
    tensors = load_file(qwen3[1] / "model.safetensors")
    assert "lm_head.weight" not in tensors
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, tmp_path / "model-00001-of-00002.safetensors")
    rest = {name: tensors[name] for name in names[1::2]} | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(rest, tmp_path / "model-00002-of-00002.safetensors")
    results = []
    for weights in (qwen3[1], tmp_path):
        engine = start(qwen3[1], weights=weights)
        engine.submit(request("r", prompt(5), (1,)))
        results.append(drain(engine)["r", 0].logprobs)
    np.testing.assert_array_equal(results[0], results[1])


def test_weights_that_do_not_fit_are_named_and_change_nothing(qwen3: tuple[Any, Path], tmp_path: Path) -> None:
    engine, tensors = start(qwen3[1]), load_file(qwen3[1] / "model.safetensors")
    before = engine.score(prompt(5), prompt(5, 1), 1.0)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.zeros(31)
    tensors["model.embed_tokens.weight"] = torch.zeros(VOCABULARY, 32, dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        engine.load_weights(tmp_path, Version(1))
    for finding in (
        "missing model.layers.1.mlp.up_proj.weight",
        "unexpected model.layers.7.mlp.up_proj.weight",
        "model.norm.weight has shape [31], expected [32]",
        "dtype I32",
    ):  # fmt: skip
        assert finding in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(WeightsError, match="cannot be read"):
        engine.load_weights(tmp_path, Version(1))
    np.testing.assert_array_equal(engine.score(prompt(5), prompt(5, 1), 1.0), before)
    assert engine.version == Version(0)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mixtral"},
        {"model_type": "no_such_model"},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": ["sliding_attention"] * 2},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
    ids=["moe", "unknown", "sliding window", "activation", "rope", "quantised"],
)
def test_models_that_it_would_compute_wrongly_are_refused(qwen3: tuple[Any, Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    config = json.loads((qwen3[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError, match="supports dense llama, qwen2, qwen3 models"):
        EmbeddedEngine(EngineOptions(model_path=tmp_path, max_context=CONTEXT))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float16"}, "dtype 'float16'"),
        ({"device": "tpu9"}, "device 'tpu9'"),
        ({"device": "meta"}, "expected cpu or cuda"),
        ({"slots": 0}, "0 slots"),
        ({"max_context": 129}, "129 is more than the 128 positions"),
        ({"extra": {"page_size": 16}}, "option page_size"),
        ({"extra": {"prefill_tokens": 0}}, "option prefill_tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_cannot_run_are_refused(qwen3: tuple[Any, Path], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EmbeddedEngine(EngineOptions(**{"model_path": qwen3[1], "max_context": CONTEXT, **settings}))


def test_a_directory_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        EmbeddedEngine(EngineOptions(model_path=tmp_path, max_context=CONTEXT))


def test_bfloat16_stays_near_float32(qwen3: tuple[Any, Path]) -> None:
    """Eight bits of mantissa: far from 1e-5, but a wrong cast or scale would be off by units."""
    engine = start(qwen3[1], dtype="bfloat16")
    engine.submit(request("r", prompt(9), tuple(range(6)), max_tokens=20))
    for sample in drain(engine).values():
        expected = reference_logprobs(qwen3[0], prompt(9), sample.token_ids, 1.0)
        assert np.abs(sample.logprobs - expected).mean() < 0.1
        np.testing.assert_allclose(engine.score(prompt(9), sample.token_ids, 1.0), sample.logprobs, atol=0.3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_a_cuda_device_gives_the_same_logprobs_across_a_swap(name: str, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    models = [build(family, seed, **changes) for seed in (0, 1)]
    directories = [save(model, tmp_path / str(i)) for i, model in enumerate(models)]
    engine = start(directories[0], device="cuda")
    for i in range(3):
        engine.submit(request(f"r{i}", prompt(2 + 9 * i, i), (i, i + 1), max_tokens=20, top_p=0.9))
    for _ in range(6):
        assert not engine.step(0)
    engine.load_weights(directories[1], Version(1))
    for (request_id, _), sample in drain(engine).items():
        i = int(request_id[1:])
        cut = sample.spans[0].end if sample.spans[0].version == 0 else 0
        old, new = (reference_logprobs(model, prompt(2 + 9 * i, i), sample.token_ids, 1.0) for model in models)
        np.testing.assert_allclose(sample.logprobs, np.concatenate([old[:cut], new[cut:]]), atol=1e-4)  # sums in another order
