"""Problems with tests, and the noisy programs that the warm start learns from. Pure: everything follows from the random generator.

A problem reads integers from one line of stdin, applies one or two transforms, prints one result, and carries six tests.
Problems of two transforms are split by a hash of their triple (transform, transform, result): a fifth of the triples is held out,
so that neither the warm start nor training ever sees them in any phrasing. Problems of one transform are always for training.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from protocol.errors import DataError
from rlsys.quickstart.operations import RESULTS, TRANSFORMS, Operation, Result, Transform

Split = Literal["train", "held_out"]

NUM_TESTS = 6
HELD_OUT_PERCENT = 20
OPENINGS = ("Read integers from one line.", "The input is one line of integers.", "You are given integers on a single line.")
VARIABLES = ("xs", "nums", "data")
_DRAWS = 60
"""Inputs tried for one problem's tests before it is given up as degenerate (say, always empty)."""
_FRUITLESS_DRAWS = 1000
"""Consecutive duplicates after which a dataset is declared too large for the task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One task for the policy. `tests` are (stdin, expected stdout) pairs with different stdins and at least two different outputs."""

    prompt: str
    steps: tuple[tuple[Transform, int], ...]
    """Transforms in order with their operand, 0 where they take none."""
    result: Result
    tests: tuple[tuple[str, str], ...]

    @property
    def operations(self) -> tuple[str, ...]:
        """Names of the transforms and the result; what the split is decided by."""
        return (*(transform.name for transform, _ in self.steps), self.result.name)


def split_of(operations: tuple[str, ...]) -> Split:
    """Where problems made of these operations belong. Decided by SHA-256, so the same in every process and Python version."""
    digest = hashlib.sha256(">".join(operations).encode()).digest()
    held_out = len(operations) == 3 and int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT
    return "held_out" if held_out else "train"


def make_problem(rng: random.Random, split: Split) -> Problem:
    """Draw a problem of the split: two transforms in two of three draws (always, when held out), each operation equally likely."""
    while True:
        transforms = rng.sample(TRANSFORMS, k=rng.choice((1, 2, 2)))
        result = rng.choice(RESULTS)
        if split_of((*(transform.name for transform in transforms), result.name)) != split:
            continue
        steps = tuple((transform, rng.choice(transform.operands) if transform.operands else 0) for transform in transforms)
        tests = _make_tests(rng, steps, result)
        if tests is not None:
            return Problem(prompt=_phrase(rng, steps, result), steps=steps, result=result, tests=tests)


def correct_program(rng: random.Random, problem: Problem) -> str:
    """A program that solves the problem."""
    return _program(rng, problem, lambda operation: True)


def noisy_program(rng: random.Random, problem: Problem) -> str:
    """A program in which each operation is right with that operation's own probability, see `reliability`."""
    return _program(rng, problem, lambda operation: rng.random() < reliability(operation))


def reliability(operation: Operation) -> float:
    """How often the noisy corpus writes the operation correctly, in [0.35, 0.85], fixed by its name.

    The base model copies these rates, so that it solves some samples of most problems: what reinforcement can find and amplify.
    """
    fraction = int.from_bytes(hashlib.sha256(f"reliability {operation.name}".encode()).digest()[:8], "big") / 2**64
    return 0.35 + 0.5 * fraction


def write_dataset(path: Path, split: Split, count: int, seed: int) -> None:
    """Write `count` problems with different prompts as JSON lines, atomically: id, prompt, operations, tests of input and output.

    Raises DataError when the task does not hold that many different prompts.
    """
    rng = random.Random(f"{split} {seed}")
    problems: dict[str, Problem] = {}
    fruitless = 0
    while len(problems) < count:
        problem = make_problem(rng, split)
        fruitless = fruitless + 1 if problem.prompt in problems else 0
        if fruitless == _FRUITLESS_DRAWS:
            raise DataError(f"{path}: found {len(problems)} different {split} prompts, expected {count}; ask for fewer.")
        problems.setdefault(problem.prompt, problem)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=path.name, suffix=".part", delete=False) as file:
        try:
            for number, problem in enumerate(problems.values()):
                file.write(json.dumps(_record(f"{split}-{number}", problem)) + "\n")
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _record(identity: str, problem: Problem) -> dict[str, object]:
    tests = [{"input": stdin, "output": stdout} for stdin, stdout in problem.tests]
    return {"id": identity, "prompt": problem.prompt, "operations": list(problem.operations), "tests": tests}


def _phrase(rng: random.Random, steps: tuple[tuple[Transform, int], ...], result: Result) -> str:
    clauses = ", then ".join(rng.choice(transform.phrasings).format(k=operand) for transform, operand in steps)
    return f"{rng.choice(OPENINGS)} {clauses[0].upper()}{clauses[1:]} and {rng.choice(result.phrasings)}."


def _make_tests(rng: random.Random, steps: tuple[tuple[Transform, int], ...], result: Result) -> tuple[tuple[str, str], ...] | None:
    """Six tests, or None if most inputs have no answer (such as the maximum of nothing) or all answers are the same."""
    tests: dict[str, str] = {}
    for _ in range(_DRAWS):
        numbers = _draw_numbers(rng, steps)
        try:
            answer = _answer(numbers, steps, result)
        except (ValueError, IndexError, ZeroDivisionError):
            continue
        tests[" ".join(map(str, numbers)) + "\n"] = answer + "\n"
        if len(tests) == NUM_TESTS:
            return tuple(tests.items()) if len(set(tests.values())) > 1 else None
    return None


def _draw_numbers(rng: random.Random, steps: tuple[tuple[Transform, int], ...]) -> list[int]:
    """5 to 10 numbers; zeros, duplicates and the operands are likely, for they are where mistakes show."""
    numbers = [rng.randint(-9, 12) for _ in range(rng.randint(5, 10))]
    for likely in (0, numbers[0], *(operand for _, operand in steps)):
        if rng.random() < 0.5:
            numbers[rng.randrange(len(numbers))] = likely
    return numbers


def _answer(numbers: list[int], steps: tuple[tuple[Transform, int], ...], result: Result) -> str:
    for transform, operand in steps:
        numbers = transform.meaning(numbers, operand)
    return str(result.meaning(numbers))


def _program(rng: random.Random, problem: Problem, is_right: Callable[[Operation], bool]) -> str:
    variable = rng.choice(VARIABLES)

    def write(operation: Operation, operand: int) -> str:
        return rng.choice(operation.correct if is_right(operation) else operation.mistakes).format(v=variable, k=operand)

    lines = [f"{variable} = list(map(int, input().split()))"]
    lines += [f"{variable} = {write(transform, operand)}" for transform, operand in problem.steps]
    lines.append(write(problem.result, 0))
    return "\n".join(lines)
