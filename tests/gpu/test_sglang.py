"""A real SGLang server on a CUDA device: the same promises as on a CPU, in bfloat16, by every lane of weight updates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.engines import EngineOptions
from actors.engines.conformance import check_conformance
from actors.engines.environments import environment_dir, read_environment
from actors.engines.sglang import SGLangEngine
from protocol.canary import bound_of, canary_ids
from protocol.messages import Version
from tests.actors import tiny_models
from tests.actors.tiny_models import CONTEXT, drain, prompt, reference_logprobs, request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.sglang,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.skipif(
        read_environment(environment_dir("sglang", "cuda")) is None, reason="no environment: rlsys engines install sglang --device cuda"
    ),
]
BOUND = bound_of(["bfloat16"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Path]]:
    return [
        (model := tiny_models.build("qwen2", s, head_dim=64, hidden_size=256), tiny_models.save(model, tmp_path_factory.mktemp(f"g{s}")))
        for s in (0, 1)
    ]


@pytest.fixture(params=["disk", "tensor", "distributed"])
def engine(request: pytest.FixtureRequest, models: list[tuple[Any, Path]], tmp_path: Path) -> Iterator[SGLangEngine]:
    """An engine with a server of its own, and version 0."""
    built = SGLangEngine(
        EngineOptions(
            model_path=models[0][1], max_context=CONTEXT, slots=8, device="cuda", dtype="bfloat16", log_dir=tmp_path,
            extra={"lane": request.param, "stream_interval": 1, "memory_fraction": 0.3, "start_s": 600},
        )
    )  # fmt: skip
    try:
        built.load_weights(models[0][1], Version(0))
        yield built
    finally:
        built.close()


def test_tokens_over_swaps_belong_to_their_versions(engine: SGLangEngine, models: list[tuple[Any, Path]]) -> None:
    check_conformance(engine, canary_ids(tiny_models.VOCABULARY), "bfloat16")
    for number in (1, 2, 3):
        engine.submit(request(f"r{number}", prompt(7), (1, 2, 3, 4), max_tokens=50))
        engine.step(0.01)
        engine.load_weights(models[number % 2][1], Version(number))
        for sample in drain(engine).values():
            start = 0
            for version, _, end in sample.spans:
                expected = reference_logprobs(models[version % 2][0], prompt(7), sample.token_ids, 1.0)
                np.testing.assert_allclose(sample.logprobs[start:end], expected[start:end], atol=BOUND)
                start = end
