"""Publishes the policy: safetensors shards and a manifest in an immutable directory, then the announcement."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from protocol.errors import UserError
from protocol.manifest import Published, prune, publish
from protocol.messages import Version, WeightsReady

KEEP = 2
"""Complete versions that stay: the newest, and one for a reader that has just begun with it. A third is being written meanwhile."""
SHARD_BYTES = 2 << 30
"""Largest shard; larger models are split so that shards can be read and hashed side by side."""
CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class Publisher:
    """Writes versions of one model under `root` (tmpfs if it can be)."""

    def __init__(self, root: Path, model_dir: Path, dtype: str) -> None:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._root, self._model_dir = root, model_dir
        self._dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]

    def publish(self, version: Version, tensors: dict[str, Tensor]) -> WeightsReady:
        """Make `version` complete on disk, then remove what is too old. Raises UserError when the disk is full, and leaves nothing."""
        try:
            done = publish(self._root, version, str(self._model_dir), lambda directory: self._write(directory, tensors))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self._root}: version {version} cannot be written ({error}); {_free(self._root)}") from None
        prune(self._root, KEEP)
        return announcement(done)

    def _write(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        save_shards(directory, self._cast(tensors))

    def _cast(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self._dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

    def export(self, target: Path, tensors: dict[str, Tensor]) -> None:
        """The policy as a Hugging Face directory: weights, configuration and tokenizer. Written aside, then renamed.

        Raises UserError when the disk is full, and leaves nothing.
        """
        aside = target.with_name(f".{target.name}.writing")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            save_shards(aside, self._cast(tensors))
            for name in CONFIG_FILES:
                if (self._model_dir / name).is_file():
                    shutil.copy(self._model_dir / name, aside / name)
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(f"{target}: the model cannot be written ({error}); {_free(target.parent)}") from None


def _free(directory: Path) -> str:
    return f"{shutil.disk_usage(directory).free / 1e6:.0f} MB are free"


def split(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors in shards of at most SHARD_BYTES, in the order of their names."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def save_shards(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Shards under the names that `from_pretrained` looks for, with the index that it needs when there are several."""
    shards = split(tensors)
    names = (
        [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))] if len(shards) > 1 else ["model.safetensors"]
    )
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, directory / name, metadata={"format": "pt"})
        (directory / name).chmod(0o644)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def announcement(done: Published) -> WeightsReady:
    """The message that tells readers of a published version."""
    return WeightsReady(
        number=done.version.number,
        incarnation=done.version.incarnation,
        directory=str(done.directory),
        manifest_sha256=done.manifest_sha256,
        num_bytes=done.num_bytes,
        published_s=time.time(),
    )
