"""What a weights directory holds by its safetensors headers and sizes: names and shapes, read without any tensor library."""

from __future__ import annotations

import json
from pathlib import Path

from protocol.errors import WeightsError

Shapes = dict[str, tuple[int, ...]]
TIED = "lm_head.weight"
"""May be left out where the embedding serves for it."""


def read_shapes(directory: Path) -> Shapes:
    """Tensor -> shape over all safetensors files of a directory. Raises WeightsError when there are none, or one cannot be read or is cut off."""
    files = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    if not files:
        raise WeightsError(f"{directory}: holds no *.safetensors weights")
    shapes: Shapes = {}
    for path in files:
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if not 2 <= size <= path.stat().st_size - 8:
                    raise WeightsError(f"{path}: a header of {size} bytes in a file of {path.stat().st_size}")
                header = json.loads(file.read(size))
            end = 8 + size + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
            if end != path.stat().st_size:  # SGLang dies of such a file instead of refusing it
                raise WeightsError(f"{path}: has {path.stat().st_size} bytes, its header says {end}")
            shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{path}: not a readable safetensors file ({error})") from None
    return shapes


def check_shapes(directory: Path, found: Shapes, expected: Shapes) -> None:
    """Raise WeightsError naming what is missing, unknown or of another shape. A tied head may be absent on either side."""
    missing = sorted(expected.keys() - found.keys() - {TIED})
    unknown = sorted(found.keys() - expected.keys() - {TIED})
    other = [name for name in sorted(found.keys() & expected.keys()) if found[name] != expected[name]]
    if missing:
        raise WeightsError(f"{directory}: lacks {len(missing)} tensors of the model, such as {missing[0]}")
    if unknown:
        raise WeightsError(f"{directory}: holds {len(unknown)} tensors that the model has not, such as {unknown[0]}")
    if other:
        raise WeightsError(f"{directory}: {other[0]} has shape {list(found[other[0]])}, expected {list(expected[other[0]])}")
