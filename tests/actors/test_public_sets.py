"""Real problem sets: official solutions are accepted, and programs that solve nothing are refused.

The sets lie beside the repository (`../shared/data`) and are read in place. `make test` takes a seeded sample, the slow run all.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from actors.rewards import Sample, Score
from actors.rewards.unit_tests import UnitTests

DATA = Path(__file__).resolve().parents[3] / "shared/data"
SAMPLE = 12
ALWAYS_EQUAL = """class Yes:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __bool__(self): return True
    def __hash__(self): return 0
    def __len__(self): return 1
    def __iter__(self): return iter([self])
    def __float__(self): return 0.0
    def __sub__(self, other): return 0
    __rsub__ = __abs__ = __sub__
"""
BODIES = {"None": "return None", "a constant": "return 'rlsys-no-answer'", "an object equal to all": "return Yes()"}

Problem = dict[str, Any]


def _lines(name: str) -> list[Problem]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {path}: the public sets are not part of the repository")
    text = gzip.decompress(path.read_bytes()).decode() if name.endswith(".gz") else path.read_text()
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


def humaneval() -> list[tuple[Problem, str, str]]:
    """(problem, official solution, the function that it asks for)."""
    return [(line, line["prompt"] + line["canonical_solution"], line["entry_point"]) for line in _lines("HumanEval.jsonl.gz")]


def mbpp() -> list[tuple[Problem, str, str]]:
    return [(line, line["code"], re.findall(r"\w+(?=\s*\()", line["test_list"][0])[0]) for line in _lines("mbpp.jsonl")]


def leetcode() -> list[tuple[Problem, str, str]]:
    lines = _lines("leetcode_train.json")
    return [(line, line["solutions"], re.findall(r"Solution\(\)\.(\w+)", line["tests"]["functional"])[-1]) for line in lines]


SETS = {"HumanEval": humaneval, "MBPP": mbpp, "LeetCode": leetcode}


def hollow(official: str, function: str, body: str) -> str:
    """A program with the function's name that only has `body`."""
    if "class Solution" in official:
        return f"{ALWAYS_EQUAL}class Solution:\n    def {function}(self, *args, **kwargs): {body}\n"
    names = {*re.findall(r"^def (\w+)\(", official, re.MULTILINE), function}
    return ALWAYS_EQUAL + "".join(f"def {name}(*args, **kwargs): {body}\n" for name in sorted(names))


@pytest.fixture(scope="module")
def reward() -> Iterator[UnitTests]:
    reward = UnitTests({"cells": 2})
    try:
        yield reward
    finally:
        reward.close()


def scores(reward: UnitTests, programs: list[tuple[Problem, str]]) -> list[Score]:
    def one(item: tuple[Problem, str]) -> Score:
        return reward.score(Sample(problem=item[0], completion=f"````python\n{item[1]}\n````", truncated=False))

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(one, programs))


def judge(reward: UnitTests, problems: list[tuple[Problem, str, str]]) -> None:
    official = scores(reward, [(problem, solution) for problem, solution, _ in problems])
    refused = [(problem.get("task_id"), score) for (problem, _, _), score in zip(problems, official, strict=True) if not score.passed]
    assert not refused, f"{len(refused)} official solutions refused: {refused[:5]}"
    for name, body in BODIES.items():
        hollows = scores(reward, [(problem, hollow(solution, function, body)) for problem, solution, function in problems])
        passed = [problem.get("task_id", function) for (problem, _, function), score in zip(problems, hollows, strict=True) if score.passed]
        assert not passed, f"returning {name} was accepted for {passed[:10]}"


@pytest.mark.parametrize("name", SETS)
def test_a_sample_of_the_set(reward: UnitTests, name: str) -> None:
    judge(reward, random.Random(7).sample(SETS[name](), SAMPLE))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_the_whole_set(reward: UnitTests, name: str) -> None:
    judge(reward, SETS[name]())
