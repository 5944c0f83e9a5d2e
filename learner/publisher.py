"""Publishes the policy: safetensors shards and a manifest in an immutable directory, then the announcement."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from learner.lora import adapter_config
from learner.settings import LoraSettings
from protocol.canary import Canary
from protocol.errors import UserError
from protocol.ledger import Ledger
from protocol.manifest import ADAPTERS, AddsTo, Published, digest, prune, publish, remove_older_incarnations, versions
from protocol.messages import Version, WeightsReady

KEEP = 2
"""Complete versions that stay: the newest, and one for a reader that has just begun with it. A third is being written meanwhile."""
SHARD_BYTES = 2 << 30
"""Largest shard; larger models are split so that shards can be read and hashed side by side."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def next_incarnation(root: Path, published: Iterable[tuple[int, int]]) -> int:
    """Above that of every version in the ledger and on the disk: a writer may have died between the rename and the ledger's row."""
    on_disk = [version.incarnation for version, _ in versions(root)] if root.is_dir() else []
    return max([*on_disk, *(incarnation for _, incarnation in published)], default=-1) + 1


class Publisher:
    """Writes versions of one model under `root` (tmpfs if it can be)."""

    def __init__(
        self, root: Path, model_dir: Path, dtype: str, ledger: Ledger | None = None, *, adapters: LoraSettings | None = None
    ) -> None:
        """With a ledger a version appears only while this writer is the present one. With `adapters` versions hold these alone."""
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._root, self._model_dir, self._ledger = root, model_dir, ledger
        self.dtype = DTYPES[dtype]
        self._adapters = adapters
        self._adds = AddsTo(adapters.alpha / adapters.rank, digest(model_dir)) if adapters is not None else None

    def publish(self, version: Version, tensors: Iterable[tuple[str, Tensor]], canary: Canary | None = None) -> WeightsReady:
        """Make `version` complete on disk, then remove what is too old. `tensors` are taken one at a time, never held all at once.

        Raises UserError when the disk is full, and leaves nothing.
        """
        try:
            done = publish(
                self._root,
                version,
                str(self._model_dir),
                lambda directory: self._write(directory, tensors),
                canary=canary,
                adds_to=self._adds,
                appear=self._appearing(version),
            )
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self._root}: version {version} cannot be written ({error}); {_free(self._root)}") from None
        prune(self._root, KEEP)
        return announcement(done)

    def _appearing(self, version: Version) -> Callable[[str, Callable[[], object]], object]:
        ledger = self._ledger
        if ledger is None:
            return lambda sha256, rename: rename()
        return lambda sha256, rename: ledger.publish(version.number, version.incarnation, sha256, rename)

    def remove_older_incarnations(self, incarnation: int) -> None:
        """What was published before a rollback goes; generators that have it loaded keep it until a newer one comes."""
        remove_older_incarnations(self._root, incarnation)

    def _write(self, directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        if self._adapters is None:
            save_shards(directory, tensors, self.dtype)
            return
        path = directory / ADAPTERS
        held = {name: tensor.to(self.dtype).cpu().contiguous() for name, tensor in tensors}
        save_file(held, path, metadata={"format": "pt"})
        path.chmod(0o644)
        config = adapter_config(self._adapters, str(self._model_dir), held)
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=1))

    def export(self, target: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """The policy as a Hugging Face directory; see `export_model`."""
        export_model(self._model_dir, target, tensors, self.dtype)


def export_model(model_dir: Path, target: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """Weights, and configuration and tokenizer of `model_dir`, as a Hugging Face directory. Written aside, then renamed over what is there.

    Raises UserError when the disk is full, and leaves nothing.
    """
    aside = target.with_name(f".{target.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_shards(aside, tensors, dtype)
        for name in CONFIG_FILES:
            if (model_dir / name).is_file():
                shutil.copy(model_dir / name, aside / name)
        _state_dtype(aside / "config.json", dtype)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{target}: the model cannot be written ({error}); {_free(target.parent)}") from None


def _state_dtype(config: Path, dtype: torch.dtype) -> None:
    """Where a configuration names a dtype, `from_pretrained(dtype="auto")` goes by it, not by the tensors."""
    content = json.loads(config.read_text()) if config.is_file() else {}
    stated = [key for key in ("dtype", "torch_dtype") if key in content]
    if stated:
        config.write_text(json.dumps({**content, **dict.fromkeys(stated, str(dtype).removeprefix("torch."))}, indent=2))


def _free(directory: Path) -> str:
    return f"{shutil.disk_usage(directory).free / 1e6:.0f} MB are free"


def save_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """Shards under the names that `from_pretrained` looks for, with the index that it needs when there are several.

    Tensors are cast and come to host memory one at a time; a shard is written when the next one would make it larger than SHARD_BYTES.
    """
    shard: dict[str, Tensor] = {}
    parts: list[dict[str, int]] = []

    def write() -> None:
        path = directory / f"part-{len(parts)}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(0o644)
        parts.append({name: tensor.nbytes for name, tensor in shard.items()})
        shard.clear()

    for name, tensor in tensors:
        tensor = (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().to("cpu").contiguous()
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > SHARD_BYTES:
            write()
        shard[name] = tensor
    write()
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts):
        name = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        (directory / f"part-{i}.safetensors").rename(directory / name)
        weight_map |= dict.fromkeys(part, name)
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(size for part in parts for size in part.values())}, "weight_map": weight_map}
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
