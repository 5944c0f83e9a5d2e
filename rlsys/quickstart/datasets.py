"""The quickstart's problems as files: one JSON line per problem, for training and held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlsys.quickstart.cache import ensure_entry, fingerprint
from rlsys.quickstart.tasks import write_dataset

_SOURCES = ("rlsys/quickstart/datasets.py", "rlsys/quickstart/operations.py", "rlsys/quickstart/tasks.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Datasets:
    """Paths of the two files; no operation triple of `held_out` stands in `train` or in the warm start."""

    train: Path
    held_out: Path
    cached: bool
    """Whether they were written by an earlier call."""


def ensure_datasets(num_train: int = 4096, num_held_out: int = 256, seed: int = 0) -> Datasets:
    """The two datasets, from the cache or else written now, in about half a second.

    Raises DataError when the cache cannot be written or the task does not hold that many different prompts.
    """

    def build(directory: Path) -> None:
        write_dataset(directory / "train.jsonl", "train", num_train, seed)
        write_dataset(directory / "held_out.jsonl", "held_out", num_held_out, seed)

    path, cached = ensure_entry(f"data-{fingerprint(_SOURCES, (), num_train, num_held_out, seed)}", build)
    return Datasets(train=path / "train.jsonl", held_out=path / "held_out.jsonl", cached=cached)
