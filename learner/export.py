"""From a checkpoint to a Hugging Face directory, without building a step: tensors go through one group at a time.

checkpoint --whole tensors, whatever number of ranks wrote it--> (adapters merged into the base model) --dtype--> shards, config, tokenizer
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from learner.checkpoint import difference, read_tensors
from learner.checkpoint_files import Checkpoint
from learner.lora import adapter_config, adapter_tensors, add_adapters, merged_tensors
from learner.optim import DTYPES
from learner.publisher import DTYPES as PUBLISHED
from learner.publisher import export_model
from learner.settings import LoraSettings
from protocol.errors import DataError, UserError

READ_BYTES = 1 << 30
"""Tensors of a checkpoint that are in memory at once, about."""
_MODEL = "model."


def export_checkpoint(checkpoint: Checkpoint, model_dir: Path, lora: LoraSettings | None, target: Path, dtype: str) -> None:
    """The policy of a checkpoint as a directory that `AutoModelForCausalLM.from_pretrained` loads; adapters are merged.

    Raises DataError with named differences when the checkpoint is not of the model in `model_dir`, UserError when the disk is full.
    """
    held = {name.removeprefix(_MODEL): shape for name, (shape, _) in checkpoint.tensors.items() if name.startswith(_MODEL)}
    if lora is not None:
        network = _with_adapters(checkpoint, model_dir, lora)
        tensors = merged_tensors(network, dict(network.named_parameters()), PUBLISHED[dtype])
        export_model(model_dir, target, tensors, PUBLISHED[dtype])
        return
    found = difference(held, _shapes(model_dir))
    if found:
        raise DataError(f"{checkpoint.path} and {model_dir}: {found}")
    export_model(model_dir, target, _whole_tensors(checkpoint, sorted(held)), PUBLISHED[dtype])


def export_directory(source: Path, target: Path, dtype: str) -> None:
    """A Hugging Face directory in another dtype. Raises DataError when it holds no safetensors."""
    paths = sorted(source.glob("*.safetensors"))
    if not paths:
        raise DataError(f"{source}: holds no *.safetensors")
    export_model(source, target, _tensors_of(paths), PUBLISHED[dtype])


def export_adapters(checkpoint: Checkpoint, model_dir: Path, lora: LoraSettings, target: Path, dtype: str) -> None:
    """The adapters alone as a peft directory, for engines that take them. Raises UserError when it cannot be written."""
    network = _with_adapters(checkpoint, model_dir, lora)
    tensors = {n: t.detach().to(PUBLISHED[dtype]).contiguous() for n, t in adapter_tensors(dict(network.named_parameters())).items()}
    aside = target.with_name(f".{target.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_file(tensors, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        (aside / "adapter_config.json").write_text(json.dumps(adapter_config(lora, str(model_dir), tensors), indent=1))
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{target}: the adapters cannot be written ({error})") from None


def _whole_tensors(checkpoint: Checkpoint, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    group: dict[str, torch.dtype] = {}
    size = 0
    for i, name in enumerate(names):
        shape, dtype = checkpoint.tensors[_MODEL + name]
        group[_MODEL + name] = DTYPES[dtype]
        size += torch.Size(shape).numel() * DTYPES[dtype].itemsize
        if size >= READ_BYTES or i == len(names) - 1:
            for key, tensor in read_tensors(checkpoint, group).items():
                yield key.removeprefix(_MODEL), tensor
            group, size = {}, 0


def _tensors_of(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from None


def _shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors, tied ones once, from its configuration alone."""
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
        with torch.device("meta"):
            network: Any = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"no configuration of a causal language model in {model_dir}: {error}") from error
    if config.tie_word_embeddings:
        network.tie_weights()
    persistent = {name: value for name, value in network.state_dict(keep_vars=True).items() if not isinstance(value, torch.nn.Parameter)}
    return {name: tuple(tensor.shape) for name, tensor in {**dict(network.named_parameters()), **persistent}.items()}


def _with_adapters(checkpoint: Checkpoint, model_dir: Path, lora: LoraSettings) -> Any:
    transformers_logging.disable_progress_bar()
    try:
        network: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"no causal language model can be read from {model_dir}: {error}") from error
    add_adapters(network, lora, half=False)
    adapters = {_MODEL + name: parameter for name, parameter in network.named_parameters() if ".lora_" in name}
    held = {name: shape for name, (shape, _) in checkpoint.tensors.items() if name.startswith(_MODEL)}
    found = difference(held, {name: tuple(parameter.shape) for name, parameter in adapters.items()})
    if found:
        raise DataError(f"{checkpoint.path} and {model_dir}: {found}")
    with torch.no_grad():
        for name, tensor in read_tensors(checkpoint, {name: p.dtype for name, p in adapters.items()}).items():
            adapters[name].copy_(tensor)
    return network
