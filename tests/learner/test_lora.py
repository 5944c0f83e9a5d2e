"""Adapters: only they move, generators get them merged, and the frozen model is the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from learner.checkpoint import load, snapshot, write
from learner.lora import adapter_config, adapter_tensors
from learner.parallel import SingleProcess
from learner.publisher import export_model
from learner.settings import LearnerSettings
from learner.step import Step
from protocol.errors import ConfigError, DataError
from tests.learner.samples import random_samples

LORA = {"rank": 4, "alpha": 8.0}


def make_step(model_dir: Path, **changes: Any) -> Step:
    settings = {"dtype": "float64", "device": "cpu", "optimizer": {"lr": 1e-2}, "lora": LORA} | changes
    return Step(LearnerSettings.model_validate(settings), model_dir, SingleProcess())


def train(step: Step, count: int = 3) -> list[dict[str, float]]:
    return [step.train(random_samples(9, i), i, count).values for i in range(count)]


def logits(model: Any) -> torch.Tensor:
    model.config._attn_implementation = "sdpa"  # the step leaves that of its layout
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[5, 9, 2, 7]])).logits
    return found


def test_only_adapters_move_and_generators_get_them_merged(tmp_path: Path, model_dir: Path) -> None:
    step = make_step(model_dir)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    assert torch.equal(logits(step.model.network), logits(base))
    train(step)
    originals = dict(base.named_parameters())
    for name, tensor in step.model.named_tensors().items():
        if "base_layer" in name:
            assert torch.equal(tensor, originals[name.replace(".base_layer", "")])
    published = dict(step.published_tensors())
    assert published.keys() == originals.keys()
    moved = {name for name in published if not torch.equal(published[name], originals[name])}
    assert moved == {name for name in originals if ".layers." in name and name.endswith("_proj.weight")}
    export_model(model_dir, tmp_path / "merged", published.items(), torch.float64)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    torch.testing.assert_close(logits(merged), logits(step.model.network), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits(merged), logits(base), rtol=1e-2)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # read by peft itself
def test_adapters_alone_load_in_peft(tmp_path: Path, model_dir: Path) -> None:
    step = make_step(model_dir)
    train(step)
    assert step.settings.lora is not None
    tensors = {name: tensor.detach().contiguous() for name, tensor in adapter_tensors(step.model.named_tensors()).items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config(step.settings.lora, str(model_dir), tensors)))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64), str(tmp_path))
    torch.testing.assert_close(logits(loaded), logits(step.model.network), rtol=1e-6, atol=1e-6)


def test_a_checkpoint_holds_adapters_alone_and_goes_on_to_the_same_bits(tmp_path: Path, model_dir: Path) -> None:
    whole, again = make_step(model_dir), make_step(model_dir)
    train(whole)
    saved = write(snapshot(whole, 3), tmp_path)
    assert saved is not None
    kinds = {name.split(".")[0] for name in saved.tensors}
    assert kinds == {"model", "optimizer", "control", "rng"}
    assert all(".lora_" in name for name in saved.tensors if name.startswith(("model.", "optimizer.")))
    load(saved.path, again)
    assert again.train(random_samples(9, 7), 3, 4).values == whole.train(random_samples(9, 7), 3, 4).values
    with pytest.raises(DataError, match="the checkpoint's adapters is rank 4, alpha 8 on all-linear, this run's is none"):
        load(saved.path, make_step(model_dir, lora=None))


def test_the_frozen_model_is_the_reference(model_dir: Path) -> None:
    """The same numbers as with a second model in memory."""
    without, second = (make_step(model_dir, kl={"coefficient": 0.3, "reference": reference}) for reference in (None, str(model_dir)))
    assert without._reference is None and second._reference is not None
    found, expected = train(without), train(second)
    assert found == expected and found[-1]["reference_kl"] > 0


def test_frozen_matrices_in_bfloat16_change_no_result(model_dir: Path) -> None:
    step = make_step(model_dir, dtype="bfloat16", gradient_checkpointing=True)
    frozen = step.model.network.model.layers[0].mlp.up_proj.base_layer.weight
    assert step.canary().dtype == "bfloat16"
    assert frozen.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in step._parameters)
    plain = make_step(model_dir, dtype="bfloat16")
    for module in plain.model.network.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.float()
    for values, expected in zip(train(step), train(plain), strict=True):
        assert values == pytest.approx(expected, rel=1e-6)


def test_layers_that_are_not_there_are_named(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"target_modules .*nowhere.*linear layers: .*down_proj.*q_proj"):
        make_step(model_dir, lora={"target_modules": ["nowhere"]})
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        LearnerSettings.model_validate({"lora": {"rank": 0}})
