"""Random models of a few thousand parameters, as transformers builds and saves them, and the slow way to their log-probs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from actors.engines import Engine, Sampled, SampleRequest, Sampling

VOCABULARY = 97
CONTEXT = 64
_FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 8}),
}


def build(family: str = "qwen3", seed: int = 0, **changes: Any) -> Any:
    """A float32 model whose every tensor is random, norms and biases too, so that none can be forgotten unseen."""
    config_class, model_class, settings = _FAMILIES[family]
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 128, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    model = model_class(config_class(**{**sizes, **settings, **changes})).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.25 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def save(model: Any, directory: Path) -> Path:
    """Write config.json and model.safetensors."""
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def reference_logprobs(
    model: Any, prompt: npt.NDArray[np.int32], tokens: npt.NDArray[np.int32], temperature: float
) -> npt.NDArray[np.float32]:
    """Log-probs [T] of `tokens` after `prompt`, from one full forward pass without a cache."""
    ids = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))
    logits = model(ids[None]).logits[0].double() / (temperature or 1.0)
    every = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return np.asarray(every.gather(1, ids[len(prompt) :, None])[:, 0].float().numpy(), np.float32)


def prompt(length: int, seed: int = 0) -> npt.NDArray[np.int32]:
    """A random prompt."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).astype(np.int32)


def request(name: str, prompt_ids: npt.NDArray[np.int32], seeds: tuple[int, ...], max_tokens: int = 12, **sampling: Any) -> SampleRequest:
    """A request in one line."""
    return SampleRequest(request_id=name, prompt_ids=prompt_ids, seeds=seeds, sampling=Sampling(max_tokens=max_tokens, **sampling))


def until_tokens(engine: Engine, name: str, count: int, deadline_s: float = 300.0) -> dict[tuple[str, int], Sampled]:
    """Step until a running sample of the request has `count` tokens, or any sample ended; returns those that did."""
    until, ended = time.monotonic() + deadline_s, {}
    while not ended and engine.load.progress.get(name, 0) < count:
        ended = {(s.request_id, s.position): s for s in engine.step(0.1)}
        assert time.monotonic() < until, f"{name} has not got {count} tokens within {deadline_s} s: {engine.load}"
    return ended


def in_flight(engine: Engine, name: str, seeds: tuple[int, ...], *, count: int, max_tokens: int) -> str:
    """Start a request on `prompt(7)` and return its name once it has `count` tokens and runs. On a busy machine one may end unseen: then another."""
    for attempt in range(20):
        engine.submit(request(f"{name}.{attempt}", prompt(7), seeds, max_tokens))
        if not until_tokens(engine, f"{name}.{attempt}", count):
            return f"{name}.{attempt}"
        drain(engine)
    raise AssertionError(f"no request was seen running with {count} of {max_tokens} tokens")


def drain(engine: Engine, deadline_s: float = 300.0) -> dict[tuple[str, int], Sampled]:
    """Step until nothing runs or waits; (request_id, position) -> completion, each exactly once."""
    until, ended = time.monotonic() + deadline_s, {}
    while True:
        for sample in engine.step(0.1):
            assert (sample.request_id, sample.position) not in ended
            ended[sample.request_id, sample.position] = sample
        if not engine.load.running and not engine.load.waiting:
            return ended | {(s.request_id, s.position): s for s in engine.step(0)}
        assert time.monotonic() < until, f"still busy after {deadline_s} s: {engine.load}"
