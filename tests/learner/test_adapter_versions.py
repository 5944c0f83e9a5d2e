"""Versions that hold adapters alone: from the learner's step over publisher and intake into the engine."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.engines import EngineOptions
from actors.engines.embedded import EmbeddedEngine
from actors.weights import WeightsIntake
from learner.parallel import SingleProcess
from learner.publisher import Publisher
from learner.settings import LearnerSettings
from learner.step import Step
from protocol.errors import WeightsError
from protocol.messages import Version, WeightsReady
from tests.learner.conftest import save_model
from tests.learner.samples import random_samples

IDS = np.array([5, 9, 2, 7, 11, 30, 4, 8], np.int32)
PROMPT = 3


class Scene:
    """A learner's step with adapters on some layers, and what publishes it both ways."""

    def __init__(self, directory: Path, dtype: str = "float32") -> None:
        self.model = save_model(directory / "model")
        settings = {
            "dtype": "float32", "device": "cpu", "optimizer": {"lr": 1e-2},
            "lora": {"rank": 2, "alpha": 3.0, "target_modules": ["q_proj", "v_proj", "down_proj"], "publish": "adapter"},
        }  # fmt: skip
        self.step = Step(LearnerSettings.model_validate(settings), self.model, SingleProcess())
        self.alone = Publisher(directory / "alone", self.model, dtype, adapters=self.step.settings.lora)
        self.merged = Publisher(directory / "merged", self.model, dtype)

    def publish(self, number: int) -> tuple[WeightsReady, WeightsReady]:
        dtype = self.alone.dtype
        canary = self.step.canary()
        alone = self.alone.publish(Version(number, 0), self.step.version_tensors(dtype), canary)
        return alone, self.merged.publish(Version(number, 0), self.step.published_tensors(dtype), canary)

    def engine(self, model: Path | None = None) -> EmbeddedEngine:
        return EmbeddedEngine(EngineOptions(model_path=model or self.model, max_context=128, slots=2))

    def expected(self) -> Any:
        return self.step.model.sequence_logprobs(IDS, PROMPT, half=False)


def test_the_engine_adds_adapters_to_the_base_as_the_learner_does(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    engine, other = scene.engine(), scene.engine()
    intake = WeightsIntake("generator-0@1", engine)
    seen = []
    for number in range(3):
        alone, merged = scene.publish(number)
        assert alone.num_bytes < merged.num_bytes / 2, (alone.num_bytes, merged.num_bytes)
        intake.announce(alone)
        loaded = intake.load(alone)
        assert loaded.error == "", "every tensor's hash and the version's canary hold"
        assert loaded.canary_error < 1e-3
        other.load_weights(Path(merged.directory), Version(number, 0))
        found = engine.score(IDS[:PROMPT], IDS[PROMPT:], 1.0)
        np.testing.assert_allclose(found, scene.expected(), atol=2e-5)
        np.testing.assert_allclose(found, other.score(IDS[:PROMPT], IDS[PROMPT:], 1.0), atol=2e-5)
        seen.append(found)
        scene.step.train(random_samples(9, number), number, 3)
    assert min(np.abs(a - b).max() for a, b in pairwise(seen)) > 1e-3, "the versions differ"
    engine.load_weights(Path(merged.directory), Version(9, 0))
    engine.load_weights(Path(alone.directory), Version(10, 0))
    np.testing.assert_allclose(engine.score(IDS[:PROMPT], IDS[PROMPT:], 1.0), seen[-1], atol=1e-6)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # read by peft itself
def test_a_version_is_a_directory_that_peft_loads(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.step.train(random_samples(9), 0, 1)
    alone, _ = scene.publish(1)
    manifest = json.loads((Path(alone.directory) / "manifest.json").read_text())
    assert manifest["base_model"] == str(scene.model)
    assert manifest["adds_to"]["scale"] == 1.5
    assert all(".lora_" in name for name in manifest["shards"]["adapter_model.safetensors"])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(scene.model), alone.directory)
    with torch.no_grad():
        logprobs = loaded(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].log_softmax(-1)
    found = [float(logprobs[i - 1, int(IDS[i])]) for i in range(PROMPT, len(IDS))]
    np.testing.assert_allclose(found, scene.expected(), atol=2e-5)


def test_what_does_not_fit_is_refused_and_the_old_version_stays(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.step.train(random_samples(9), 0, 1)
    alone, _ = scene.publish(1)
    engine = scene.engine()
    engine.load_weights(Path(alone.directory), Version(1, 0))
    before = engine.score(IDS[:PROMPT], IDS[PROMPT:], 1.0)
    stranger = save_model(tmp_path / "stranger", seed=7)
    with pytest.raises(WeightsError, match=r"add to another model than the one in .*stranger: their hashes differ"):
        scene.engine(stranger).load_weights(Path(alone.directory), Version(1, 0))
    path = Path(alone.directory) / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    for damaged, message in (
        ({**tensors, name: tensors[name][:-1].contiguous()}, r"make no change of model\.layers"),
        ({**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(2, 32)}, r"lm_head\.lora_A\.weight belongs to nothing"),
        ({n: t for n, t in tensors.items() if n != name}, "make no change of"),
    ):
        path.unlink()  # the engine may have the old one mapped
        save_file(damaged, path)
        with pytest.raises(WeightsError, match=message):
            engine.load_weights(Path(alone.directory), Version(2, 0))
        assert engine.version == Version(1, 0)
        np.testing.assert_array_equal(engine.score(IDS[:PROMPT], IDS[PROMPT:], 1.0), before)


def test_in_bfloat16_adapters_lose_less_than_a_merged_model(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "bfloat16")
    scene.step.train(random_samples(9), 0, 1)
    alone, merged = scene.publish(1)
    found = []
    for ready in (alone, merged):
        engine = scene.engine()
        engine.load_weights(Path(ready.directory), Version(1, 0))
        found.append(np.abs(engine.score(IDS[:PROMPT], IDS[PROMPT:], 1.0) - scene.expected()).max())
    assert found[0] < found[1], "rounding the adapters costs less than rounding all matrices"
