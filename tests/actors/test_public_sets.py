"""Real problem sets: official solutions are accepted, and programs that solve nothing are refused.

The sets lie beside the repository (`../shared/data`) and are read in place. `make test` takes a seeded sample, the slow run all.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from actors.rewards import Sample, Score
from actors.rewards.fences import extract_program
from actors.rewards.unit_tests import UnitTests
from actors.sandbox.languages.cpp import Cpp

DATA = Path(__file__).resolve().parents[3] / "shared/data"
SAMPLE = 10
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
    assert problems, "nothing to judge"
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


def _cpp_lines() -> list[Problem]:
    if missing := Cpp().missing():
        pytest.skip(missing)
    return _lines("humaneval_cpp.jsonl")


def plain_gxx_accepts(line: Problem, directory: Path) -> bool:
    """Whether g++ compiles the model-written solution with the tests behind it, and the program ends with 0 within a minute."""
    source = extract_program(line["gpt_solution"], Cpp.fences, "required") or ""
    tests = line["tests"].strip().removeprefix("}")
    text = f"#include <assert.h>\n#include <bits/stdc++.h>\n#define main own_main\n{source}\n#undef main\n{tests}"
    program = directory / "program"
    command = ["g++", "-std=c++17", "-O2", "-w", "-x", "c++", "-", "-o", str(program)]
    if subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False).returncode:
        return False
    try:
        return subprocess.run([program], capture_output=True, timeout=60, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def judge_cpp(reward: UnitTests, lines: list[Problem], directory: Path) -> None:
    assert lines, "nothing to judge"
    for line in lines:
        score = reward.score(Sample(problem=line, completion=line["gpt_solution"], truncated=False))
        assert score.passed is plain_gxx_accepts(line, directory), (line["name"], score)


CPP_CHEATS = {
    "exits": "{signature} {{ exit(0); }}",
    "exits before main": "struct A {{ A() {{ _exit(0); }} }} a;\n{signature} {{ abort(); }}",
    "no asserts": "#undef assert\n#define assert(x)\n#define abort() exit(0)\n{signature} {{ return {{}}; }}",
    "never fails": "#include <signal.h>\nstruct A {{ A() {{ signal(SIGABRT, [](int) {{ _exit(0); }}); }} }} a;\n{signature} {{ abort(); }}",
}


QUICK_CPP_CHEATS = ("exits before main", "no asserts")


def test_a_cpp_solution(reward: UnitTests, tmp_path: Path) -> None:
    judge_cpp(reward, [line for line in _cpp_lines() if line["name"] == "HumanEval_22_filter_integers"], tmp_path)


@pytest.mark.parametrize("name", [name if name in QUICK_CPP_CHEATS else pytest.param(name, marks=pytest.mark.slow) for name in CPP_CHEATS])
def test_cpp_cheats(reward: UnitTests, name: str) -> None:
    line = next(line for line in _cpp_lines() if line["name"] == "HumanEval_3_below_zero")
    signature = line["prompt"].rstrip().splitlines()[-1].removesuffix("{")
    text = f"```cpp\n#include <bits/stdc++.h>\n#include <unistd.h>\n{CPP_CHEATS[name].format(signature=signature)}\n```"
    score = reward.score(Sample(problem=line, completion=text, truncated=False))
    assert not score.passed and score.status in ("wrong_answer", "runtime_error"), score


@pytest.mark.slow
def test_the_whole_cpp_set(reward: UnitTests, tmp_path: Path) -> None:
    """C++ HumanEval with model-written solutions: the same are accepted as by a plain g++ run."""
    judge_cpp(reward, [line for line in _cpp_lines() if "std::nullopt f3" not in line["prompt"]], tmp_path)
