"""What a run needs in memory and on disk, from the configuration and the headers of the model's files. Pure arithmetic but for `read_model`.

What it leaves out: the framework's own memory (a few hundred MB a process), fragmentation, and activations of layers that it does not know.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from protocol.errors import DataError
from rlsys.config import RunConfig
from rlsys.published import WIDTH, Shapes, adapter_parameters, count_parameters, read_shapes

STATE_BYTES = 16
"""Of a parameter in training: float32 weight, gradient, and two moments of AdamW."""
CHECKPOINT_BYTES = 12
"""Of a parameter on disk: weight and two moments."""
SAMPLE_BYTES = 600
"""Of a journaled sample besides its tokens, measured on runs of the quickstart."""
TOKEN_BYTES = 9
"""Of a journaled token: id, log-prob, mask."""
ACTIVATIONS = 34
"""Bytes per token, layer and hidden unit that a transformer keeps for its backward pass at two bytes a number (Korthikanti et al. 2022,
eq. 1, without the part of attention that grows with the square of the context, which fused kernels do not store)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What memory depends on."""

    parameters: int
    layers: int
    hidden: int
    key_value_heads: int
    head_dim: int
    shapes: Shapes = field(default_factory=dict)
    """Of the stored tensors, which adapters are sized by."""

    def cache_bytes(self, tokens: float, width: int) -> float:
        """Of keys and values of so many tokens."""
        return 2.0 * tokens * self.layers * self.key_value_heads * self.head_dim * width


def read_model(directory: Path) -> ModelSize | None:
    """Sizes from config.json and the headers of the weights; None for a model whose layers are not described. Raises DataError for broken files."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        layers, heads, hidden = config.get("num_hidden_layers"), config.get("num_attention_heads"), config.get("hidden_size")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{directory}: its size cannot be read ({error})") from None
    if not (layers and heads and hidden):
        return None
    shapes = read_shapes(directory)
    return ModelSize(
        shapes=shapes,
        parameters=count_parameters(shapes),
        layers=layers,
        hidden=hidden,
        key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Bytes. Of one generator, of one learner rank, of the published versions, and on the run's disk."""

    generator: float
    learner: float
    weights: float
    journal: float
    checkpoints: float


def needed(config: RunConfig, size: ModelSize | None, mean_tokens: float, prompt_tokens: float) -> Room:
    """What the run of a configuration needs; a model of unknown size counts as nothing."""
    generators, learner, sampling = config.generators, config.learner, config.sampling
    context = config.model.max_context or sampling.max_tokens + (sampling.max_prompt_tokens or round(prompt_tokens) + 1)
    parameters = trained = published = size.parameters if size else 0
    engine = step = 0.0
    if size is not None and learner.lora is not None:
        trained = adapter_parameters(size.shapes, learner.lora)
        published = trained if learner.lora.publish == "adapter" else parameters
    if size is not None:
        width = WIDTH[generators.dtype]
        engine = parameters * width + size.cache_bytes(generators.slots * context, width)
        kept = ACTIVATIONS / 2 * WIDTH[learner.dtype] if not learner.gradient_checkpointing else 2.0 * WIDTH[learner.dtype]
        longest = max(learner.tokens_per_microbatch, min(context, sampling.max_tokens + round(prompt_tokens)))
        frozen = 0 if learner.lora is None else parameters * (2 if learner.dtype == "bfloat16" else 4)
        step = frozen + trained * STATE_BYTES + longest * size.layers * size.hidden * kept
    kept = learner.checkpoints.keep_last + (config.iterations // learner.checkpoints.keep_every if learner.checkpoints.keep_every else 0)
    samples = config.iterations * sampling.groups_per_iteration * sampling.group_size
    return Room(
        generator=engine,
        learner=step,
        weights=3.0 * published * WIDTH[config.weights.dtype],
        journal=samples * (SAMPLE_BYTES + TOKEN_BYTES * mean_tokens + 4 * prompt_tokens),
        checkpoints=float((kept + 1) * trained * CHECKPOINT_BYTES),
    )
