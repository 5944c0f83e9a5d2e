"""`rlsys export`: a run, a checkpoint or a Hugging Face directory goes in, a Hugging Face directory comes out."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from learner.checkpoint_files import MANIFEST, Checkpoint, complete, latest_good, verify
from learner.settings import LoraSettings
from protocol.errors import ConfigError, DataError
from protocol.registry import resolve
from rlsys.rundir import check_new

if TYPE_CHECKING:
    from collections.abc import Mapping

DTYPES = ("float32", "bfloat16", "float16")
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, slots=True)
class Source:
    """What is exported, and what the run says about it."""

    checkpoint: Checkpoint | None
    """None: `directory` is a Hugging Face directory already."""
    directory: Path
    model_dir: Path | None
    lora: LoraSettings | None
    dtype: str


def export(source: Path, out: Path, *, model: Path | None, iteration: int | None, dtype: str | None, adapter: bool, as_json: bool) -> int:
    """Find the checkpoint, check it, and write it out."""
    check_new(out)
    found = find(source, iteration)
    kind = dtype or found.dtype
    if kind not in DTYPES:
        raise ConfigError(f"--dtype {kind}: expected one of {', '.join(DTYPES)}")
    model_dir = model or found.model_dir
    started = time.monotonic()
    if found.checkpoint is None:
        if adapter:
            raise ConfigError(f"{source}: --adapter needs a checkpoint of a run with learner.lora")
        _write("directory", found.directory, out, kind)
    else:
        if model_dir is None:
            raise ConfigError(
                f"{source}: no config.yaml of a run beside the checkpoint says which model it is of; name it with --model DIR"
            )
        if not (model_dir / "config.json").is_file():
            raise DataError(
                f"{model_dir}: the model that the run started from is not there (no config.json); name its place with --model DIR"
            )
        if adapter and found.lora is None:
            raise ConfigError(f"{source}: --adapter, but the run trains the whole model (no learner.lora)")
        if adapter and found.lora is not None:
            _write("adapters", found.checkpoint, model_dir, found.lora, out, kind)
        else:
            _write("checkpoint", found.checkpoint, model_dir, found.lora, out, kind)
    size = sum(path.stat().st_size for path in out.iterdir())
    result: dict[str, Any] = {
        "from": str(found.checkpoint.path if found.checkpoint else found.directory),
        "iteration": found.checkpoint.iteration if found.checkpoint else None,
        "to": str(out),
        "dtype": kind,
        "bytes": size,
        "adapter": adapter,
        "seconds": round(time.monotonic() - started, 3),
    }
    if as_json:
        print(json.dumps(result))
    else:
        after = f" after {result['iteration']} iterations" if found.checkpoint else ""
        print(f"{result['from']}{after} -> {out}: {size / 1e6:.1f} MB, {kind}{', adapters only' if adapter else ''}")
    return 0


def _write(what: str, *arguments: Any) -> None:
    resolve(what, {name: f"learner.export:export_{name}" for name in ("directory", "adapters", "checkpoint")}, "export")(*arguments)


def find(source: Path, iteration: int | None) -> Source:
    """What `source` means: a checkpoint, the newest good one of a run (or that of `iteration`), or a Hugging Face directory.

    Raises DataError or ConfigError that says what was looked for.
    """
    if not source.is_dir():
        raise DataError(f"{source}: no such directory; expected a run, a checkpoint or a model")
    if _is_checkpoint(source):
        return _of_run(source.resolve().parent.parent, verify(source))
    if (source / CHECKPOINTS).is_dir() and complete(source / CHECKPOINTS):
        return _of_run(source, _choose(source / CHECKPOINTS, iteration))
    if iteration is not None:
        raise DataError(f"{source}: --iteration {iteration}, but it holds no {CHECKPOINTS}/")
    for directory in (source / "final_model", source):
        if (directory / "config.json").is_file():
            dtype = json.loads((directory / "config.json").read_text()).get("dtype") or "float32"
            return Source(None, directory, directory, None, dtype if dtype in DTYPES else "float32")
    raise DataError(
        f"{source}: neither a run with {CHECKPOINTS}/ or final_model/, nor a checkpoint ({MANIFEST}), nor a model (config.json)"
    )


def _is_checkpoint(directory: Path) -> bool:
    """By its content, so that a copy may have any name. A damaged one under its own name is one too: `verify` says what is wrong with it."""
    path = directory / MANIFEST
    if not path.is_file():
        return False
    try:
        return directory.name.isdigit() or "files" in json.loads(path.read_bytes())
    except ValueError:
        return False


def _choose(directory: Path, iteration: int | None) -> Checkpoint:
    if iteration is not None:
        paths = {int(path.name): path for path in complete(directory)}
        if iteration not in paths:
            raise DataError(f"{directory}: no checkpoint of iteration {iteration}; there are: {', '.join(map(str, paths))}")
        return verify(paths[iteration])
    found = latest_good(directory)
    if found is None:
        raise DataError(f"{directory}: no checkpoint in it is whole")
    return found


def _of_run(run: Path, checkpoint: Checkpoint) -> Source:
    """What the run's resolved configuration says: the model it started from, adapters, the published dtype."""
    path = run / "config.yaml"
    if not path.is_file() or checkpoint.path.parent.name != CHECKPOINTS:
        return Source(checkpoint, checkpoint.path, None, LoraSettings.from_words(checkpoint.about.get("adapters", "")), "float32")
    content: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    model = (content.get("model") or {}).get("path")
    lora = (content.get("learner") or {}).get("lora")
    dtype = (content.get("weights") or {}).get("dtype") or content.get("dtype") or "float32"
    settings = LoraSettings.model_validate(lora) if lora else None
    if settings is None and any(".lora_" in name for name in checkpoint.tensors):
        print(f"rlsys: {path} names no learner.lora, but the checkpoint holds adapters", file=sys.stderr)
    return Source(checkpoint, checkpoint.path, Path(model) if model else None, settings, dtype)
