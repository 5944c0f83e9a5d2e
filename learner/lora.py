"""LoRA (Hu et al. 2022) by peft: small matrices beside the frozen ones are all that is trained.

    output = x W^T + scale * (x A^T) B^T,   A [rank, in] random, B [out, rank] zero at first

Generators load W + scale * B A, so no engine needs to know; or A and B alone (`publish: adapter`), for engines that add them to the base model
themselves. The frozen model itself is the policy that training started from: a penalty for
leaving it needs no second model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from learner.sharding import whole
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from learner.settings import LoraSettings

ADAPTER = "default"
_SEED = 0
"""Of the first A of every adapter: the same on all ranks, whatever random numbers a rank has drawn before."""


def add_adapters(network: Any, settings: LoraSettings, *, half: bool) -> None:
    """Freeze the network and set adapters beside its linear layers, in place. With `half` the frozen matrices of linear layers become bfloat16.

    That changes no result under autocast, which would take them in bfloat16 anyway, and halves their memory. Raises ConfigError when peft is
    missing or no layer has one of the names.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # peft loads it if it is there; it misses kernels of 4 bits
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("learner.lora needs peft: pip install 'rlsys[lora]'") from None
    network.requires_grad_(False)
    targets: Any = settings.target_modules if isinstance(settings.target_modules, str) else list(settings.target_modules)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        try:
            inject_adapter_in_model(config, network, ADAPTER)
        except ValueError as error:
            kinds = sorted({name.rpartition(".")[2] for name, module in network.named_modules() if isinstance(module, nn.Linear)})
            reason = str(error).split(".")[0]
            raise ConfigError(
                f"learner.lora.target_modules {settings.target_modules}: {reason}; linear layers: {', '.join(kinds)}"
            ) from None
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name)
    if half:
        tables = {id(network.get_input_embeddings().weight)}
        for module in network.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad and id(module.weight) not in tables:
                module.weight.data = module.weight.data.to(torch.bfloat16)


@contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """The frozen model alone, for a forward pass without gradients."""
    layers = list(_layers(network).values())
    for layer in layers:
        layer._disable_adapters = True  # peft's own switch also touches requires_grad, which sharded parameters do not allow
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged_tensors(network: Any, tensors: dict[str, Tensor], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """`tensors` (all of the network) under the names of the model without adapters, with these added in. A collective call when sharded."""
    layers = _layers(network)
    for name in sorted(tensors):
        if ".lora_" in name:
            continue
        parent, _, kind = name.rpartition(".base_layer.")
        found = whole(tensors[name].detach())
        if parent and kind == "weight":
            found = found.to(torch.promote_types(found.dtype, torch.float32)) + _delta(layers[parent])
        name = f"{parent}.{kind}" if parent else name
        yield name, found if dtype is None or not found.is_floating_point() else found.to(dtype)


def _delta(layer: Any) -> Tensor:
    a, b = (whole(part[ADAPTER].weight.detach()) for part in (layer.lora_A, layer.lora_B))
    delta: Tensor = (b @ a) * layer.scaling[ADAPTER]
    return delta.T if layer.fan_in_fan_out else delta


def adapter_parts(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """`adapter_tensors`, whole and one after the other. A collective call when sharded."""
    for name, tensor in sorted(adapter_tensors(tensors).items()):
        yield name, whole(tensor.detach(), dtype)


def adapter_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapters alone, under the names of a peft directory."""
    return {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": value for name, value in tensors.items() if ".lora_" in name}


def adapter_config(settings: LoraSettings, base_model: str, tensors: Iterable[str]) -> dict[str, Any]:
    """`adapter_config.json` of a peft directory with these tensors. Layers are named, because engines other than peft know no `all-linear`."""
    kinds = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in tensors})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": kinds if settings.target_modules == "all-linear" else list(settings.target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def describe(settings: LoraSettings | None) -> str:
    """One line, for comparing a checkpoint with a run."""
    return "none" if settings is None else settings.in_words()


def _layers(network: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}
