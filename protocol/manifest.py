"""A published weights version on disk: an immutable directory of safetensors shards and `manifest.json`.

Order of publication: write every file into a hidden directory beside the target, sync, then rename it. A directory that carries its final
name is complete; a reader checks every tensor against the manifest's hashes before it uses one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from protocol.canary import Canary
from protocol.errors import WeightsError
from protocol.messages import Version

MANIFEST = "manifest.json"
ADAPTERS = "adapter_model.safetensors"
"""The one file of a version that holds adapters alone, laid out as peft does."""
_STEP = 1 << 18
"""Bytes that are hashed at a time: they stay in a processor's cache, and no memory is asked of the kernel for them."""
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True)
class Published:
    """A complete version: where it is and the SHA-256 of its manifest, which the announcement carries."""

    version: Version
    directory: Path
    manifest_sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class AddsTo:
    """Of a version that holds adapters alone: each matrix is that of the base model plus `scale` * B A."""

    scale: float
    base_xxh3_128: str
    """`digest` of the base model's directory."""


def digest(model_dir: Path) -> str:
    """One hash over the names, shapes, dtypes and bytes of all tensors in a model's safetensors files. Raises WeightsError without any."""
    described = {name: entry for path in sorted(model_dir.glob("*.safetensors")) for name, entry in _describe(path).items()}
    if not described:
        raise WeightsError(f"{model_dir}: holds no *.safetensors")
    return xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True).encode())


def read_adds_to(directory: Path) -> AddsTo | None:
    """What the version in `directory` adds its adapters to; None for one that holds a whole model, or a plain model directory."""
    path = directory / MANIFEST
    found = json.loads(path.read_bytes()).get("adds_to") if path.is_file() else None
    return AddsTo(**found) if found else None


def publish(
    root: Path,
    version: Version,
    base_model: str,
    write_shards: Callable[[Path], None],
    *,
    canary: Canary | None = None,
    adds_to: AddsTo | None = None,
    sync: bool = False,
    appear: Callable[[str, Callable[[], object]], object] = lambda sha256, rename: rename(),
) -> Published:
    """Publish `version` under `root`: `write_shards(directory)` writes the safetensors files, this adds the manifest and renames.

    `sync` forces the bytes to disk (not needed on tmpfs). `appear(manifest_sha256, rename)` calls `rename`, or raises to
    refuse. Raises WeightsError when that version already stands there, OSError when the disk
    is full; in both cases nothing is left behind.
    """
    target = root / str(version)
    if target.exists():
        raise WeightsError(f"{target} is already published; bytes under one version never change")
    aside = root / f".{version}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write_shards(aside)
        manifest = {
            "number": version.number,
            "incarnation": version.incarnation,
            "base_model": base_model,
            "canary": canary and canary.as_json(),
            "adds_to": adds_to and asdict(adds_to),
            "shards": {path.name: _describe(path) for path in sorted(aside.glob("*.safetensors"))},
            "files": {path.name: _outline(path) for path in sorted(aside.iterdir())},
        }
        text = json.dumps(manifest, indent=1).encode()
        (aside / MANIFEST).write_bytes(text)
        if sync:
            for path in aside.iterdir():
                _fsync(path)
            _fsync(aside)
        appear(hashlib.sha256(text).hexdigest(), lambda: aside.rename(target))
        if sync:
            _fsync(root)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return Published(version, target, hashlib.sha256(text).hexdigest(), sum(path.stat().st_size for path in target.iterdir()))


def hash_of(file: BinaryIO, num_bytes: int) -> tuple[str, int]:
    """The xxh3-128 of the next `num_bytes` of a file, and how many of them there were."""
    state, left = xxhash.xxh3_128(), num_bytes
    while left > 0 and (data := file.read(min(_STEP, left))):
        state.update(data)
        left -= len(data)
    return state.hexdigest(), num_bytes - left


def verify(directory: Path, manifest_sha256: str) -> dict[str, Any]:
    """The manifest of a version after every tensor's hash, shape and dtype was checked. Raises WeightsError naming what differs."""
    try:
        text = (directory / MANIFEST).read_bytes()
    except OSError as error:
        raise WeightsError(f"{directory}: no readable {MANIFEST} ({error.strerror})") from None
    if hashlib.sha256(text).hexdigest() != manifest_sha256:
        raise WeightsError(f"{directory / MANIFEST}: SHA-256 differs from the announced {manifest_sha256[:12]}...")
    manifest: dict[str, Any] = json.loads(text)
    for name, expected in manifest["shards"].items():
        found = _describe(directory / name)
        if found != expected:
            tensors = sorted(found.keys() ^ expected.keys()) or [t for t in expected if found[t] != expected[t]]
            raise WeightsError(f"{directory / name}: differs from its manifest in {', '.join(tensors[:3])}")
    return manifest


def versions(root: Path) -> list[tuple[Version, Path]]:
    """The complete versions under `root`, the newest first."""
    return sorted(((v, d) for d in root.iterdir() if (v := _version_of(d)) is not None), reverse=True)


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete versions. Readers that have one open keep their mapping.

    What was published after a rollback is newer than all that was published before it, whatever its number.
    """
    for _, directory in sorted(versions(root), key=lambda found: (found[0].incarnation, found[0].number), reverse=True)[keep:]:
        shutil.rmtree(directory, ignore_errors=True)


def remove_older_incarnations(root: Path, incarnation: int) -> None:
    """Remove what was published before a rollback, and what a writer that died left unfinished."""
    for directory in root.iterdir():
        version = _version_of(directory)
        if (version is not None and version.incarnation < incarnation) or directory.name.startswith(".v"):
            shutil.rmtree(directory, ignore_errors=True)


def _version_of(directory: Path) -> Version | None:
    number, _, incarnation = directory.name.removeprefix("v").partition(".")
    if not directory.name.startswith("v") or not number.isdigit():
        return None
    return Version(int(number), int(incarnation or 0))


def _describe(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """Name -> {dtype, shape, bytes, xxh3_128} of every tensor in a safetensors file, read without any tensor library.

    `bytes` are its start and end in the file.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            header_size = int.from_bytes(file.read(8), "little")
            if not 2 <= header_size <= size - 8:
                raise WeightsError(f"{path}: a header of {header_size} bytes in a file of {size}")
            header = json.loads(file.read(header_size))
            described = {}
            for name, entry in sorted(header.items()):
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                count = _DTYPE_BYTES[entry["dtype"]]
                for n in entry["shape"]:
                    count *= n
                file.seek(8 + header_size + start)
                found, length = hash_of(file, end - start)
                if length != end - start or length != count:
                    raise WeightsError(f"{path}: {name} has {length} bytes, expected {count}")
                described[name] = {
                    "dtype": entry["dtype"],
                    "shape": entry["shape"],
                    "bytes": [8 + header_size + start, 8 + header_size + end],
                    "xxh3_128": found,
                }
            return described
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from None


def _outline(path: Path) -> Mapping[str, Any]:
    """The size of a file, and the hash of what of it is no tensor: its first `hashed_bytes`, a shard's header or all of another file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        hashed = 8 + int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else size
        file.seek(0)
        return {"bytes": size, "hashed_bytes": hashed, "xxh3_128": xxhash.xxh3_128_hexdigest(file.read(hashed))}


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        os.fsync(fd)
