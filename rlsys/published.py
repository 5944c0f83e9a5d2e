"""How large a published version is, from the configuration and the headers of the model's files."""

from __future__ import annotations

import json
import math
from pathlib import Path

from learner.settings import LoraSettings
from protocol.errors import DataError
from rlsys.config import RunConfig

WIDTH = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_STORED = ("F64", "F32", "F16", "BF16")

Shapes = dict[str, tuple[int, ...]]


def read_shapes(directory: Path) -> Shapes:
    """Of all tensors of numbers in a model's safetensors files. Raises DataError for broken ones."""
    shapes: Shapes = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if entry.get("dtype") in _STORED}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
            raise DataError(f"{path}: its header cannot be read ({error})") from None
    return shapes


def count_parameters(shapes: Shapes) -> int:
    """Numbers in all tensors."""
    return sum(math.prod(shape) for shape in shapes.values())


def adapter_parameters(shapes: Shapes, lora: LoraSettings) -> int:
    """Numbers in the adapters: rank x (in + out) for every matrix that gets one. For `all-linear` that is every one but embeddings and head."""
    total = 0
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or len(shape) != 2:
            continue
        last = layer.rpartition(".")[2]
        if lora.target_modules == "all-linear":
            targeted = "embed" not in last and last not in ("lm_head", "wte", "wpe")
        else:
            targeted = any(layer == target or layer.endswith(f".{target}") for target in lora.target_modules)
        total += lora.rank * sum(shape) if targeted else 0
    return total


def version_bytes(config: RunConfig) -> int:
    """Of one published version: about what the model's files take, or the adapters alone."""
    lora, model = config.learner.lora, config.model.path
    if lora is not None and lora.publish == "adapter":
        return adapter_parameters(read_shapes(model), lora) * WIDTH[config.weights.dtype]
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))
