"""Files of JSON lines that several processes append to and that outlive them: how they are written on, kept bounded, and read.

A process may die in the middle of a line, and another goes on with the file. Whoever opens it ends such a torn line first, so that it costs
one record and not two; whoever reads it leaves out what is no record.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO


def open_lines(path: Path) -> TextIO:
    """Open to append whole lines."""
    torn = False
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
    opened = path.open("a", buffering=1, encoding="utf-8")
    if torn:
        opened.write("\n")
    return opened


def parse_lines(data: str) -> list[dict[str, Any]]:
    """The records of whole lines; what is no JSON object (torn, or not ours) is left out."""
    records = []
    for line in data.split("\n"):
        try:
            record = json.loads(line) if line else None
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a file, without a last line that its writer did not live to finish, or is at."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return parse_lines(text[: text.rfind("\n") + 1])


class BoundedLines:
    """A file of lines that is moved to `old/` past `most_bytes`, where it replaces the one before."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        self._path, self._most_bytes = path, most_bytes
        self._file = open_lines(path)
        self._size = path.stat().st_size

    def write(self, line: str) -> None:
        """Append one line."""
        if self._size and self._size + len(line) > self._most_bytes:
            self._file.close()
            old = self._path.parent / "old"
            old.mkdir(exist_ok=True)
            self._path.replace(old / self._path.name)
            self._file, self._size = open_lines(self._path), 0
        self._size += self._file.write(line + "\n")

    def close(self) -> None:
        self._file.close()
