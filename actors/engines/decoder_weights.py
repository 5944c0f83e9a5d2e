"""Weights of a decoder, fused for fast steps, and how a published directory is copied into them.

Queries, keys and values share one matrix, gate and up another. Within each query and key head the two halves that a rotation mixes
are interleaved, so that the rotation is one complex product; scores do not change, because both sides are permuted alike.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from actors.engines.architecture import Architecture
from protocol.errors import WeightsError
from protocol.manifest import ADAPTERS

PEFT = "base_model.model."
"""What peft puts before the names of a model's layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One block. C hidden, H heads, K key-value heads, D head size, I intermediate."""

    input_norm: Tensor
    """[C]"""
    qkv: Tensor
    """[(H + 2K) D, C]"""
    qkv_bias: Tensor | None
    head_norms: Tensor | None
    """[H + K, D]: the query norm H times, then the key norm K times."""
    output: Tensor
    """[C, H D]"""
    output_bias: Tensor | None
    mlp_norm: Tensor
    """[C]"""
    gate_up: Tensor
    """[2 I, C]"""
    gate_up_bias: Tensor | None
    down: Tensor
    """[C, I]"""
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a published tensor goes: a view of a fused tensor that holds the same numbers, maybe permuted, maybe repeated."""

    view: Tensor
    shape: tuple[int, ...]
    """As published."""
    source_shape: tuple[int, ...]
    """As published, reshaped so that it can be copied to `view`."""


class Weights:
    """All tensors of a decoder, allocated once; `load` overwrites them in place."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._tied = architecture.tied
        self._base: Path | None = None
        """The model whose tensors stand here, apart from those that adapters change; None when nothing is known."""
        self._targets: dict[str, _Target] = {}
        size = (architecture.vocabulary, architecture.hidden)
        self.embedding = self._tensor("model.embed_tokens.weight", *size)
        self.layers = [self._layer(f"model.layers.{i}.", architecture) for i in range(architecture.layers)]
        self.norm = self._tensor("model.norm.weight", architecture.hidden)
        self.head = self.embedding if architecture.tied else self._tensor("lm_head.weight", *size)

    def _empty(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def _name(self, name: str, view: Tensor, shape: tuple[int, ...], source_shape: tuple[int, ...] | None = None) -> None:
        self._targets[name] = _Target(view, shape, source_shape or shape)

    def _tensor(self, name: str, *shape: int) -> Tensor:
        tensor = self._empty(*shape)
        self._name(name, tensor, shape)
        return tensor

    def _stacked(self, names: list[str], rows: list[int], *columns: int) -> Tensor:
        """One tensor whose parts, of `rows` rows each, are published under `names`."""
        tensor = self._empty(sum(rows), *columns)
        for name, part in zip(names, torch.split(tensor, rows), strict=True):
            self._name(name, part, tuple(part.shape))
        return tensor

    def _qkv(self, prefix: str, kind: str, a: Architecture, *columns: int) -> Tensor:
        """The fused projection (or its bias, without `columns`), query and key rows interleaved within each head."""
        heads = {"q": a.heads, "k": a.kv_heads, "v": a.kv_heads}
        tensor = self._empty(sum(heads.values()) * a.head_dim, *columns)
        for (part, count), rows in zip(heads.items(), torch.split(tensor, [n * a.head_dim for n in heads.values()]), strict=True):
            name, shape = f"{prefix}self_attn.{part}_proj.{kind}", tuple(rows.shape)
            if part == "v":
                self._name(name, rows, shape)
            else:
                halves = (count, 2, a.head_dim // 2, *columns)
                self._name(name, rows.view(count, a.head_dim // 2, 2, *columns).transpose(1, 2), shape, halves)
        return tensor

    def _head_norms(self, prefix: str, a: Architecture) -> Tensor:
        tensor = self._empty(a.heads + a.kv_heads, a.head_dim)
        for part, rows in zip(("q", "k"), torch.split(tensor, [a.heads, a.kv_heads]), strict=True):
            view = rows.view(-1, a.head_dim // 2, 2).transpose(1, 2)
            self._name(f"{prefix}self_attn.{part}_norm.weight", view, (a.head_dim,), (1, 2, a.head_dim // 2))
        return tensor

    def _layer(self, prefix: str, a: Architecture) -> Layer:
        attended, pair = a.heads * a.head_dim, [f"{prefix}mlp.gate_proj.", f"{prefix}mlp.up_proj."]
        return Layer(
            input_norm=self._tensor(f"{prefix}input_layernorm.weight", a.hidden),
            qkv=self._qkv(prefix, "weight", a, a.hidden),
            qkv_bias=self._qkv(prefix, "bias", a) if a.qkv_bias else None,
            head_norms=self._head_norms(prefix, a) if a.head_norms else None,
            output=self._tensor(f"{prefix}self_attn.o_proj.weight", a.hidden, attended),
            output_bias=self._tensor(f"{prefix}self_attn.o_proj.bias", a.hidden) if a.output_bias else None,
            mlp_norm=self._tensor(f"{prefix}post_attention_layernorm.weight", a.hidden),
            gate_up=self._stacked([f"{name}weight" for name in pair], [a.intermediate] * 2, a.hidden),
            gate_up_bias=self._stacked([f"{name}bias" for name in pair], [a.intermediate] * 2) if a.mlp_bias else None,
            down=self._tensor(f"{prefix}mlp.down_proj.weight", a.hidden, a.intermediate),
            down_bias=self._tensor(f"{prefix}mlp.down_proj.bias", a.hidden) if a.mlp_bias else None,
        )

    def load(self, directory: Path) -> None:
        """Copy in `directory`/model.safetensors or its shards model-*.safetensors, named as in transformers' state dict.

        Names, shapes and dtypes are checked before the first byte is written, so a refused directory leaves the weights as they were.
        A tied output projection may be absent, and is not read.

        Raises WeightsError that names what is missing, unexpected or of another shape.
        """
        with ExitStack() as stack:
            tensors = _open(directory, stack)
            self._check(directory, tensors)
            self._base = None
            for name, target in self._targets.items():
                target.view.copy_(tensors[name].get_tensor(name).view(target.source_shape))

    def load_adapted(self, base: Path, directory: Path, scale: float) -> None:
        """Copy in the model of `base` with the adapters of `directory` added: W + `scale` * B A, computed in float32.

        What no adapter changes is copied the first time only. Everything is checked before the first byte is written.
        Raises WeightsError that names what does not fit.
        """
        with ExitStack() as stack:
            tensors, adapters = _open(base, stack), _open(directory, stack, (ADAPTERS,))
            self._check(base, tensors)
            pairs = self._pairs(directory, adapters)
            for name, target in self._targets.items():
                if name in pairs:
                    a, b = (adapters[part].get_tensor(part).float() for part in pairs[name])
                    found = tensors[name].get_tensor(name).float() + (b @ a) * scale
                    target.view.copy_(found.view(target.source_shape))
                elif self._base != base:
                    target.view.copy_(tensors[name].get_tensor(name).view(target.source_shape))
            self._base = base

    def _pairs(self, directory: Path, adapters: dict[str, Any]) -> dict[str, tuple[str, str]]:
        """Tensor of the model -> its A and B, every one of which fits and belongs to a tensor."""
        pairs = {
            name: (f"{stem}.lora_A.weight", f"{stem}.lora_B.weight")
            for name in self._targets
            if f"{(stem := PEFT + name.removesuffix('.weight'))}.lora_A.weight" in adapters
        }
        rest = adapters.keys() - {part for pair in pairs.values() for part in pair}
        findings = [f"{name} belongs to nothing in the model" for name in sorted(rest)[:4]]
        for name, (a, b) in pairs.items():
            shapes = [tuple(adapters[part].get_slice(part).get_shape()) if part in adapters else () for part in (a, b)]
            rows, columns = self._targets[name].shape
            if len(shapes[1]) != 2 or shapes[0] != (shapes[1][1], columns) or shapes[1][0] != rows:
                findings.append(f"{a} {list(shapes[0])} and {b} {list(shapes[1])} make no change of {name} {[rows, columns]}")
        if findings or not pairs:
            raise WeightsError(f"adapters in {directory} do not fit the model: {'; '.join(findings[:8]) or 'there are none'}")
        return pairs

    def _check(self, directory: Path, tensors: dict[str, Any]) -> None:
        ignored = {"lm_head.weight"} if self._tied else set()
        missing = sorted(self._targets.keys() - tensors.keys())
        unexpected = sorted(tensors.keys() - self._targets.keys() - ignored)
        findings = [f"{what} {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                    for what, names in (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
        for name in sorted(self._targets.keys() & tensors.keys()):
            header, shape = tensors[name].get_slice(name), self._targets[name].shape
            if tuple(header.get_shape()) != shape:
                findings.append(f"{name} has shape {list(header.get_shape())}, expected {list(shape)}")
            if header.get_dtype() not in ("F32", "BF16", "F16"):
                findings.append(f"{name} has dtype {header.get_dtype()}, expected F32, BF16 or F16")
        if findings:
            raise WeightsError(f"weights in {directory} do not fit the model: {'; '.join(findings[:8])}")


def _open(directory: Path, stack: ExitStack, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """Tensor name -> open safetensors file that holds it; of the files `names` if given, else of those of a whole model."""
    whole = directory / "model.safetensors"
    files = [directory / name for name in names] or ([whole] if whole.is_file() else sorted(directory.glob("model-*.safetensors")))
    if not files:
        raise WeightsError(f"weights directory {directory}: no model.safetensors and no model-*.safetensors")
    tensors: dict[str, Any] = {}
    for path in files:
        try:
            file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"weights file {path} cannot be read: {error}") from error
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            if name in tensors:
                raise WeightsError(f"weights in {directory}: {name} stands in two shards")
            tensors[name] = file
    return tensors
