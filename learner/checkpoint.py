"""Checkpoints of the learner: a snapshot in host memory between iterations, written in the background, loaded by any number of ranks.

    every rank:   snapshot(step, k)  ->  write(snapshot, directory)            load(path, step)
                  copies its shards      in a thread of its own, while          reads the rows that its own shards need,
                  to host memory         training goes on; no messages          whatever number of ranks wrote them

Tensors go through torch.distributed.checkpoint: each rank writes safetensors files of its own shards with their offsets, and a reader
takes from all files what its shards overlap. Ranks do not talk while they write (a collective in a second thread could meet one of the
training loop); they leave notes beside their files, and rank 0 joins these into the manifest and gives the directory its name. So all
ranks need to see one file system. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from learner.checkpoint_files import (
    UNFINISHED,
    Checkpoint,
    directory_name,
    hash_file,
    read_manifest,
    remove,
    sync_directory,
    verify_files,
    write_manifest,
)
from learner.steps import TrainStep
from protocol.errors import DataError, DeadlineExceeded, UserError

log = logging.getLogger("rlsys.learner")

FILE_BYTES = 512 << 20
"""Tensors are gathered in files of about this size: what one file needs in memory a second time while it is written."""
POLL_S = 0.02
"""How often rank 0 looks whether the other ranks have written their parts."""
_NOTE = "rank-{:05d}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One rank's part of the state, in host memory. Nothing in it changes when training goes on."""

    iteration: int
    rank: int
    ranks: int
    token: str
    """The same on all ranks and new for each snapshot, so that parts of two attempts are never mixed."""
    plan: SavePlan
    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[tuple[int, ...], str]]
    """Name -> whole shape and dtype of every tensor that this rank writes a part of."""
    about: Mapping[str, str]
    extra: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """Size of this rank's part."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def snapshot(step: TrainStep, iteration: int, extra: Mapping[str, Any] | None = None) -> Snapshot:
    """Copy this rank's part of the state to host memory. A collective call, between iterations.

    `iteration` is the number of iterations trained. `extra` is kept in the manifest (JSON values); that of rank 0 counts. What all ranks
    hold alike is shared out among them, so that each copies and writes about the same.
    """
    group = step.group
    token = group.broadcast_bytes(os.urandom(6).hex().encode() if group.rank == 0 else None).decode()
    state = step.live_state()
    whole = {name: tensor for name, tensor in state.items() if not isinstance(tensor, DTensor)}
    mine = _share(whole, group.rank, group.size)
    chosen = {name: tensor for name, tensor in state.items() if name in mine or name not in whole}
    chosen |= _random_state(group.rank)
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(chosen, is_coordinator=True)
    plan = planner.create_local_plan()
    host = {item.index.fqn: _to_host(planner.resolve_data(item)) for item in plan.items}  # type: ignore[arg-type]
    if any(tensor.device.type == "cuda" for tensor in state.values()):
        torch.cuda.synchronize()
    return Snapshot(
        iteration=iteration,
        rank=group.rank,
        ranks=group.size,
        token=token,
        plan=plan,
        tensors=host,
        shapes={name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in chosen.items()},
        about=step.about(),
        extra=dict(extra or {}),
    )


def write(taken: Snapshot, directory: Path, *, timeout_s: float = 3600.0) -> Checkpoint | None:
    """Write one rank's snapshot under `directory`; may run in a background thread. Rank 0 returns the complete checkpoint, others None.

    A checkpoint of the same iteration that stands there is replaced. Raises DeadlineExceeded on rank 0 when another rank's part does not
    come within `timeout_s`, UserError when the disk is full; what was written is removed then.
    """
    aside = directory / f".{directory_name(taken.iteration)}.{taken.token}{UNFINISHED}"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        files = _write_tensors(taken, aside)
        note = {"files": files, "tensors": {name: {"shape": shape, "dtype": dtype} for name, (shape, dtype) in taken.shapes.items()}}
        _write_note(aside, taken.rank, note)
        if taken.rank:
            return None
        notes = _collect(aside, taken.ranks, timeout_s)
        content = {"iteration": taken.iteration, "ranks": taken.ranks, "about": dict(taken.about), "extra": dict(taken.extra)}
        merged = {what: {name: entry for one in notes for name, entry in one[what].items()} for what in ("tensors", "files")}
        write_manifest(aside, {**content, **merged})
        for rank in range(taken.ranks):
            (aside / _NOTE.format(rank)).unlink()
        sync_directory(aside)
        target = directory / directory_name(taken.iteration)
        if target.exists():
            remove(target)
        aside.rename(target)
        sync_directory(directory)
        return read_manifest(target)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        where = next(path for path in (directory, *directory.parents) if path.exists())
        free = shutil.disk_usage(where).free / 1e6
        raise UserError(
            f"{directory}: the checkpoint of iteration {taken.iteration} cannot be written ({error}); {free:.0f} MB are free"
        ) from None
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def load(path: Path, step: TrainStep, *, verified: bool = False) -> Checkpoint:
    """Continue from the checkpoint in `path`. A collective call; all ranks see the same files.

    Every file is hashed before anything is used, each by one of the ranks (`verified` skips that, after `checkpoint_files.verify`). Raises
    DataError when a file is not as it was written, or the checkpoint is of another model or optimizer; the step is then unchanged.
    """
    checkpoint = read_manifest(path)
    fault = None
    if not verified:
        try:
            verify_files(checkpoint, sorted(checkpoint.files)[step.group.rank :: step.group.size])
        except DataError as error:
            fault = error
        bad = torch.tensor([float(fault is not None)], device=_device(step))
        step.group.maximum(bad)
        if fault is not None:
            raise fault
        if bool(bad.any()):
            raise DataError(f"{path}: another rank found a file that is not as it was written")
    for what, expected in step.about().items():
        if checkpoint.about.get(what) != expected:
            raise DataError(f"{path}: the checkpoint's {what} is {checkpoint.about.get(what)}, this run's is {expected}")
    held = {name: whole for name, whole in checkpoint.tensors.items() if not name.startswith("rng.")}
    try:
        targets = step.state_to_fill(held)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    random = {name: torch.empty(shape, dtype=torch.uint8) for name, shape in _random_shapes(checkpoint, step.group.rank).items()}
    _read({**targets, **random}, path)
    step.adopt_state(targets)
    _set_random_state(random, step.group.rank)
    return checkpoint


def read_tensors(checkpoint: Checkpoint, names: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint on the CPU, without a step: for an export."""
    found = {name: torch.empty(checkpoint.tensors[name][0], dtype=dtype) for name, dtype in names.items()}
    _read(found, checkpoint.path)
    return found


def difference(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str | None:
    """What stands between a checkpoint's tensors and a model's, in one sentence with a few names each; None when nothing does."""
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = [
        f"{name} is {list(found[name])}, expected {list(expected[name])}"
        for name in sorted(found)
        if name in expected and tuple(found[name]) != tuple(expected[name])
    ]
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("tensors are missing", missing), ("are not of this model", unexpected), ("have another shape", other))
        if names
    ]
    return "the checkpoint is of another model: " + ", ".join(parts) if parts else None


# ------------------------------------------------------------------------------------------------------------ parts


class _FromHost(DefaultSavePlanner):
    """Gives the writer the copies in host memory instead of the live tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._tensors[write_item.index.fqn]


def _write_tensors(taken: Snapshot, aside: Path) -> dict[str, dict[str, Any]]:
    writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
    writer.set_up_storage_writer(True)
    numbers, room = {}, 0
    for name, tensor in taken.tensors.items():
        room += tensor.nbytes
        numbers[name] = 1 + room // FILE_BYTES
    placed = {"fqn_to_index_mapping": numbers, "shard_index": taken.rank + 1}
    plan = dataclasses.replace(writer.prepare_local_plan(taken.plan), storage_data=placed)
    writer.write_data(plan, _FromHost(taken.tensors)).wait()
    own = sorted(aside.glob(f"shard-{taken.rank + 1:05d}-*.safetensors"))
    return {path.name: {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)} for path in own}


def _write_note(aside: Path, rank: int, note: Mapping[str, Any]) -> None:
    path = aside / _NOTE.format(rank)
    hidden = path.with_name(f".{path.name}")
    hidden.write_text(json.dumps(note))
    hidden.rename(path)


def _collect(aside: Path, ranks: int, timeout_s: float) -> list[dict[str, Any]]:
    """Wait for every rank's note."""
    deadline = time.monotonic() + timeout_s
    while missing := [rank for rank in range(ranks) if not (aside / _NOTE.format(rank)).exists()]:
        if time.monotonic() > deadline:
            names = ", ".join(map(str, missing))
            raise DeadlineExceeded(
                f"{aside}: learner rank 0 waited {timeout_s:g} s for the parts of ranks {names}; do all ranks see this directory?"
            )
        time.sleep(POLL_S)
    return [json.loads((aside / _NOTE.format(rank)).read_text()) for rank in range(ranks)]


def _read(targets: Mapping[str, Tensor], path: Path) -> None:
    reader = HuggingFaceStorageReader(str(path))
    metadata = reader.read_metadata()
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    planner.set_up_planner(dict(targets), metadata, is_coordinator=True)
    with torch.no_grad():
        reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()


def _share(whole: Mapping[str, Tensor], rank: int, ranks: int) -> set[str]:
    """Of tensors that all ranks hold alike, those that this rank writes: the largest first, each to the rank that has least."""
    loads, mine = [0] * ranks, set()
    for name in sorted(whole, key=lambda name: (-whole[name].nbytes, name)):
        to = loads.index(min(loads))
        loads[to] += whole[name].nbytes
        if to == rank:
            mine.add(name)
    return mine


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cuda":
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor.detach(), non_blocking=True)
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _device(step: TrainStep) -> torch.device:
    return torch.device(next(iter(step.live_state().values())).device)


def _random_state(rank: int) -> dict[str, Tensor]:
    state = {f"rng.cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rng.cuda.{rank}"] = torch.cuda.get_rng_state()
    return state


def _random_shapes(checkpoint: Checkpoint, rank: int) -> dict[str, tuple[int, ...]]:
    """A rank beyond those that wrote the checkpoint goes on with its own."""
    names = [name for name in (f"rng.cpu.{rank}", f"rng.cuda.{rank}") if name in checkpoint.tensors]
    return {name: checkpoint.tensors[name][0] for name in names}


def _set_random_state(state: Mapping[str, Tensor], rank: int) -> None:
    if (found := state.get(f"rng.cpu.{rank}")) is not None:
        torch.set_rng_state(found)
    if (found := state.get(f"rng.cuda.{rank}")) is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(found)
