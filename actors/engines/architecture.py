"""What the embedded engine needs to know of a model: sizes, biases and rotary frequencies, read from its transformers configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from protocol.errors import ConfigError, DataError

FAMILIES = ("llama", "qwen2", "qwen3")
ROPES = ("default", "linear", "llama3", "yarn")
_SUPPORTED = (
    f"The embedded engine supports dense {', '.join(FAMILIES)} models with full attention, SiLU, unquantised weights "
    f"and rotary embeddings of type {', '.join(ROPES)} over whole heads"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Sizes of a Qwen2, Qwen3 or Llama decoder."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    tied: bool
    """The output projection is the embedding."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norms: bool
    """Queries and keys are normalised head by head (Qwen3)."""
    frequencies: Tensor
    """[head_dim / 2] rotary frequencies, float32."""
    rotary_scale: float
    """Factor on cosine and sine (YaRN's attention factor, else 1)."""


def read_architecture(directory: Path, max_context: int) -> Architecture:
    """The architecture in `directory`/config.json.

    Raises DataError when there is none, ConfigError for a model that is not supported or has fewer positions than `max_context`.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise DataError(f"model directory {directory}: no config.json")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"{path}: transformers cannot read it ({str(error).splitlines()[0]}). {_SUPPORTED}.") from error
    rope = dict(getattr(config, "rope_parameters", None) or {})
    _require_supported(config, rope, path)
    positions = max(config.max_position_embeddings, int(rope.get("factor", 1) * rope.get("original_max_position_embeddings", 0)))
    if max_context > positions:
        raise ConfigError(f"max_context {max_context} is more than the {positions} positions of {path}")
    qwen2 = config.model_type == "qwen2"
    attention_bias = bool(getattr(config, "attention_bias", False))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies, rotary_scale = _rotary(config, rope, head_dim)
    return Architecture(
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        norm_epsilon=config.rms_norm_eps,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=qwen2 or attention_bias,
        output_bias=not qwen2 and attention_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        head_norms=config.model_type == "qwen3",
        frequencies=frequencies,
        rotary_scale=rotary_scale,
    )


def _require_supported(config: Any, rope: dict[str, Any], path: Path) -> None:
    """Raise ConfigError naming the first feature that the decoder would compute wrongly."""
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    findings = {
        "model_type": (config.model_type, config.model_type in FAMILIES),
        "layer_types": (sorted(layer_types), layer_types == {"full_attention"}),
        "hidden_act": (getattr(config, "hidden_act", None), getattr(config, "hidden_act", None) == "silu"),
        "quantization_config": (
            getattr(config, "quantization_config", None),
            getattr(config, "quantization_config", None) is None,
        ),
        "rope_type": (rope.get("rope_type"), rope.get("rope_type") in ROPES),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), rope.get("partial_rotary_factor", 1.0) == 1.0),
    }
    for key, (found, supported) in findings.items():
        if not supported:
            raise ConfigError(f"{path}: {key} is {found!r}. {_SUPPORTED}.")


def _rotary(config: Any, rope: dict[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Frequencies [head_dim / 2] and the factor on cosine and sine, as transformers computes them for this configuration."""
    if rope["rope_type"] == "default":
        return 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)), 1.0
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return frequencies.float(), float(scale)
