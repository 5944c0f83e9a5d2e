"""Rows of a dataset, whatever file they stand in: each a dictionary, with the words that say where it stands."""

from __future__ import annotations

import gzip
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors.text import read_object
from protocol.errors import DataError

Row = tuple[str, dict[str, Any]]
"""("train.jsonl, line 7", the row)."""


def read_rows(path: Path, split: str) -> Iterator[Row]:
    """All rows of a file or directory. Raises DataError that names file and line for what cannot be read."""
    if path.is_dir():
        yield from _directory(path, split)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix == ".arrow":
        yield from _arrow(path)
    else:
        yield from _json(path)


def _json(path: Path) -> Iterator[Row]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="\n") as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            file.seek(0)
            if start == "[":
                yield from _json_list(path, file.read())
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _object(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _json_list(path: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, element {number}: a JSON {type(row).__name__}, expected an object")
        yield f"{path}, element {number}", row


def _object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}, expected an object")
    return where, row


def _directory(path: Path, split: str) -> Iterator[Row]:
    """A datasets.Dataset or DatasetDict as `save_to_disk` leaves it, or a directory of data files."""
    if (path / "dataset_dict.json").is_file():
        splits = read_object(path / "dataset_dict.json").get("splits", [])
        if split not in splits:
            raise DataError(f"{path}: has no split {split!r}; it has: {', '.join(map(str, splits)) or 'none'}")
        path = path / split
    if (path / "state.json").is_file():
        files = [path / str(entry["filename"]) for entry in read_object(path / "state.json").get("_data_files", [])]
    else:
        files = sorted(f for f in path.iterdir() if f.name.endswith((".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")))
    if not files:
        raise DataError(f"{path}: holds no data; expected *.jsonl, *.parquet, or what datasets' save_to_disk writes")
    for file in files:
        yield from read_rows(file, split)


def _parquet(path: Path) -> Iterator[Row]:
    pyarrow = _pyarrow(path)
    try:
        with importlib.import_module("pyarrow.parquet").ParquetFile(path) as file:
            yield from _numbered(path, (row for batch in file.iter_batches() for row in batch.to_pylist()))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from None


def _arrow(path: Path) -> Iterator[Row]:
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.memory_map(str(path)) as source:
            yield from _numbered(path, (row for batch in pyarrow.ipc.open_stream(source) for row in batch.to_pylist()))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable Arrow stream ({error})") from None


def _numbered(path: Path, rows: Iterator[dict[str, Any]]) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _pyarrow(path: Path) -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise DataError(f"{path}: reading it needs pyarrow: pip install 'rlsys[data]'") from None
