"""Problems from JSON lines: read, checked, and put into a reproducible order."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import msgpack

from protocol.errors import DataError


@dataclass(frozen=True, slots=True)
class Problem:
    """One line of a dataset."""

    problem_id: str
    prompt: str
    payload: bytes
    """msgpack of the whole line, as it travels to the reward."""


def read_problems(path: Path, limit: int | None = None) -> list[Problem]:
    """All problems of a file. Raises DataError that names file and line for what does not parse, and for ids that repeat."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines, which also breaks at U+2028 inside a text
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        problem = _parse(line, f"{path}, line {number}")
        if problem.problem_id in seen:
            raise DataError(f"{path}, line {number}: id {problem.problem_id!r} stands in line {seen[problem.problem_id]} already")
        seen[problem.problem_id] = number
        problems.append(problem)
        if limit is not None and len(problems) >= limit:
            break
    if not problems:
        raise DataError(f"{path}: holds no problem")
    return problems


def _parse(line: str, where: str) -> Problem:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets nested without end
        raise DataError(f"{where}: cannot be read ({error})") from None
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a JSON {type(fields).__name__}, expected an object with id and prompt")
    for name in ("id", "prompt"):
        if not isinstance(fields.get(name), str) or not fields[name]:
            raise DataError(f"{where}: field {name!r} is {fields.get(name)!r}, expected a text that is not empty")
    try:
        payload: bytes = msgpack.packb(fields)
    except (OverflowError, ValueError) as error:
        raise DataError(f"{where}: cannot travel ({error}); write integers beyond 64 bits as text, and no half surrogate pairs") from None
    return Problem(fields["id"], fields["prompt"], payload)


class Order:
    """Position n of the training sequence -> place in the dataset: epoch after epoch, each shuffled from (seed, epoch)."""

    def __init__(self, count: int, seed: int, shuffle: bool) -> None:
        self._count, self._seed, self._shuffle = count, seed, shuffle
        self._epoch, self._places = -1, list(range(count))

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self._count)
        if epoch != self._epoch and self._shuffle:
            self._places = list(range(self._count))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._places)
        self._epoch = epoch
        return self._places[place]
