"""The layouts of public problem sets, made one: what a dataset line asks a program to do.

| layout | fields |
|---|---|
| rlsys, Codeforces, SYNTHETIC-1 | `tests`: [{"input", "output"}], or {"inputs": [...], "outputs": [...]} |
| TACO, APPS, PRIME | `input_output`: the same as JSON text, with `fn_name` for calls |
| LiveCodeBench | `public_test_cases`, `private_test_cases`: JSON text of [{"input", "output", "testtype"}] |

Bad data is an error that names problem and field, never a problem that nobody can solve.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from protocol.errors import DataError

_LONGEST_UNPACKED_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """One input and the output that answers it."""

    __test__ = False  # not a test class of pytest

    input: bytes
    output: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a program is judged by."""

    problem_id: str
    tests: tuple[Test, ...]
    language: str = "python"
    checker: str = "exact"
    time_limit_s: float | None = None
    memory_limit_bytes: int | None = None


def parse_problem(line: Mapping[str, Any]) -> Problem:
    """The problem of a dataset line. Raises DataError."""
    problem_id = str(line.get("id", line.get("task_id", line.get("question_id", "without id"))))
    reader = _Reader(problem_id)
    return Problem(
        problem_id=problem_id,
        tests=tuple(reader.stdio_tests(line)),
        language=reader.text(line, "language", "python"),
        checker=reader.text(line, "checker", "exact"),
        time_limit_s=reader.positive(line, "time_limit_s"),
        memory_limit_bytes=None if (limit := reader.positive(line, "memory_limit_bytes")) is None else int(limit),
    )


class _Reader:
    """Reads fields of one line; its errors name the problem and the field."""

    def __init__(self, problem_id: str) -> None:
        self._problem_id = problem_id

    def error(self, field: str, found: str) -> DataError:
        return DataError(f"problem {self._problem_id!r}, field {field!r}: {found}")

    def text(self, line: Mapping[str, Any], field: str, default: str) -> str:
        value = line.get(field) or default
        if not isinstance(value, str):
            raise self.error(field, f"{type(value).__name__}, expected text")
        return value

    def positive(self, line: Mapping[str, Any], field: str) -> float | None:
        value = line.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.error(field, f"{value!r}, expected a positive number")
        return float(value)

    def unpacked(self, line: Mapping[str, Any], field: str) -> Any:
        """The field's value; JSON text is parsed, LiveCodeBench's base64 of zlib too (without its pickle layer, which is refused)."""
        value = line[field]
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError:
            pass
        try:
            return json.loads(zlib.decompressobj().decompress(base64.b64decode(value, validate=True), _LONGEST_UNPACKED_BYTES))
        except (ValueError, zlib.error) as error:
            raise self.error(field, f"text that is neither JSON nor compressed JSON ({error})") from None

    def stdio_tests(self, line: Mapping[str, Any]) -> Sequence[Test]:
        """Tests of a program that reads stdin and writes stdout."""
        fields = [name for name in ("tests", "input_output", "public_test_cases", "private_test_cases") if line.get(name)]
        if not fields:
            raise self.error("tests", "no tests")
        tests = [test for field in fields for test in self._tests_of(field, self.unpacked(line, field))]
        if not tests:
            raise self.error(fields[0], "no tests")
        return tests

    def _tests_of(self, field: str, value: Any) -> list[Test]:
        if isinstance(value, Mapping):
            inputs, outputs = value.get("inputs"), value.get("outputs")
            if not isinstance(inputs, list) or not isinstance(outputs, list):
                raise self.error(field, f"keys {sorted(value)}, expected lists 'inputs' and 'outputs'")
            if len(inputs) != len(outputs):
                raise self.error(field, f"{len(inputs)} inputs but {len(outputs)} outputs")
            value = [{"input": left, "output": right} for left, right in zip(inputs, outputs, strict=True)]
        if not isinstance(value, list):
            raise self.error(field, f"{type(value).__name__}, expected a list of tests")
        return [self._test(f"{field}[{index}]", test) for index, test in enumerate(value)]

    def _test(self, field: str, test: Any) -> Test:
        if not isinstance(test, Mapping) or "input" not in test or "output" not in test:
            raise self.error(field, "expected an object with 'input' and 'output'")
        return Test(input=self._stream(f"{field}.input", test["input"]), output=self._stream(f"{field}.output", test["output"]))

    def _stream(self, field: str, value: Any) -> bytes:
        """Text, or a list of lines as TACO and APPS have them."""
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = "\n".join(value)
        if not isinstance(value, str):
            raise self.error(field, f"{type(value).__name__}, expected text")
        return value.encode(errors="surrogatepass")
