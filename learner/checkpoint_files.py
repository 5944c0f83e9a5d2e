"""Checkpoints as directories: what makes one complete, which is the newest good one, and which may go. Needs no torch.

    checkpoints/00000040/manifest.json + shard-*.safetensors       complete: it carries its final name
    checkpoints/.00000040.<token>.writing/                          being written, or left by a process that died

The manifest names every file with its size and hash and every tensor with its shape, and carries a checksum of itself. A file that was cut
short, changed or lost is found before anything of the checkpoint is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from protocol.errors import DataError

log = logging.getLogger("rlsys.learner")

MANIFEST = "manifest.json"
FORMAT = 1
"""Raised when older code could not read what this code writes."""
UNFINISHED = ".writing"
_READ_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint as its manifest describes it."""

    path: Path
    iteration: int
    """Iterations trained so far, which is the policy version."""
    manifest_sha256: str
    num_bytes: int
    ranks: int
    """Ranks that wrote it; any number can load it."""
    about: Mapping[str, str]
    """What must agree for the state to mean the same: model type, optimizer."""
    extra: Mapping[str, Any]
    """Whatever the caller of `snapshot` wanted kept with it."""
    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    """Name -> shape and dtype of every whole tensor."""
    files: Mapping[str, tuple[int, str]]
    """Name -> bytes and xxh3-128 of every file."""


def directory_name(iteration: int) -> str:
    """The name of a complete checkpoint, so that names sort as iterations do."""
    return f"{iteration:08d}"


def write_manifest(directory: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest with its checksum, synced."""
    body = {"format": FORMAT, **content}
    text = json.dumps({**body, "checksum": _checksum(body)}, indent=1)
    path = directory / MANIFEST
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(path: Path) -> Checkpoint:
    """The checkpoint in `path`; its files are not looked at. Raises DataError when the manifest is missing, torn, changed or too new."""
    try:
        text = (path / MANIFEST).read_bytes()
        content = json.loads(text)
        checksum = content.pop("checksum")
    except OSError as error:
        raise DataError(f"{path}: no readable checkpoint, its {MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, AttributeError):
        raise DataError(f"{path / MANIFEST}: torn, it is no complete JSON object") from None
    if checksum != _checksum(content):
        raise DataError(f"{path / MANIFEST}: changed after it was written, its checksum does not match")
    if content["format"] != FORMAT:
        raise DataError(f"{path}: checkpoint format {content['format']}, this rlsys reads {FORMAT}")
    return Checkpoint(
        path=path,
        iteration=content["iteration"],
        manifest_sha256=hashlib.sha256(text).hexdigest(),
        num_bytes=sum(file["bytes"] for file in content["files"].values()),
        ranks=content["ranks"],
        about=content["about"],
        extra=content["extra"],
        tensors={name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in content["tensors"].items()},
        files={name: (file["bytes"], file["xxh3_128"]) for name, file in content["files"].items()},
    )


def verify_files(checkpoint: Checkpoint, names: Collection[str] | None = None) -> None:
    """Check size and hash of the named files (all of them if not given). Raises DataError that names the first wrong one."""
    for name in checkpoint.files if names is None else names:
        size, expected = checkpoint.files[name]
        path = checkpoint.path / name
        try:
            found = path.stat().st_size
            if found != size:
                raise DataError(f"{path}: {found} bytes, the manifest says {size}")
            if hash_file(path) != expected:
                raise DataError(f"{path}: its content does not match the manifest's hash")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def verify(path: Path) -> Checkpoint:
    """The checkpoint in `path` after every byte was checked. Raises DataError that says what is wrong."""
    checkpoint = read_manifest(path)
    verify_files(checkpoint)
    return checkpoint


def complete(directory: Path) -> list[Path]:
    """Checkpoints that carry their final name, oldest first; they may still turn out to be bad. Empty when there is no such directory."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if path.is_dir() and path.name.isdigit())


def latest_good(directory: Path, *, at_most: int | None = None) -> Checkpoint | None:
    """The newest checkpoint that passes `verify`, of iteration `at_most` or before if given; a warning names each newer one that does not."""
    for path in reversed(complete(directory)):
        if at_most is not None and int(path.name) > at_most:
            continue
        try:
            return verify(path)
        except DataError as error:
            log.warning("checkpoint %s is not used: %s; falling back to the one before it", path.name, error)
    return None


def keep(iterations: Sequence[int], keep_last: int, keep_every: int | None) -> set[int]:
    """Which checkpoints stay: the newest `keep_last`, and those of every `keep_every`-th iteration."""
    newest = sorted(iterations)[-keep_last:]
    return {*newest, *(i for i in iterations if keep_every is not None and i > 0 and i % keep_every == 0)}


def prune(directory: Path, *, keep_last: int, keep_every: int | None = None, protect: Collection[int] = ()) -> list[int]:
    """Remove checkpoints that `keep` does not name and `protect` does not hold; returns their iterations. At least the newest stays."""
    found = [int(path.name) for path in complete(directory)]
    gone = sorted(set(found) - keep(found, max(keep_last, 1), keep_every) - set(protect))
    for iteration in gone:
        remove(directory / directory_name(iteration))
    return gone


def remove(path: Path) -> None:
    """Remove a checkpoint so that a crash on the way never leaves a part of it under its final name."""
    aside = path.with_name(f".{path.name}.removed{UNFINISHED}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def clean(directory: Path) -> None:
    """Remove what a process that died left unfinished. Call it before the first write of a run, never beside one."""
    if directory.is_dir():
        for path in directory.glob(f".*{UNFINISHED}"):
            shutil.rmtree(path, ignore_errors=True)


def hash_file(path: Path) -> str:
    """The xxh3-128 of a file, read in pieces."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Force a directory's entries to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
