"""The unit-test reward on stdin/stdout problems."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from actors.rewards import Sample, Score
from actors.rewards.fences import extract_program
from actors.rewards.judging import choose_tests
from actors.rewards.problems import parse_problem
from actors.rewards.unit_tests import UnitTests
from protocol.errors import ConfigError, DataError

ADD = "a, b = map(int, input().split())\nprint(a + b)\n"
TESTS = [{"input": f"{a} {b}\n", "output": f"{a + b}\n"} for a, b in ((1, 2), (100, 200), (5, 5))]
PROBLEM = {"id": "add", "prompt": "", "tests": TESTS}


@pytest.fixture(scope="module")
def reward() -> Iterator[UnitTests]:
    reward = UnitTests({"cells": 2, "min_time_limit_s": 1, "max_time_limit_s": 2})
    try:
        yield reward
    finally:
        reward.close()


def score(reward: UnitTests, completion: str, problem: dict[str, Any] = PROBLEM) -> Score:
    return reward.score(Sample(problem=problem, completion=completion, truncated=False))


def fenced(source: str, info: str = "python") -> str:
    return f"Some thought.\n```{info}\n{source}\n```\nDone."


@pytest.mark.parametrize(
    ("source", "status"),
    [
        (ADD, "accepted"),
        ("print(3)", "wrong_answer"),
        ("a, b = map(int, input().split())\nprint(a + b, end=' extra')", "wrong_answer"),
        ("1 / 0", "runtime_error"),
        ("def broken(:", "runtime_error"),
        (ADD + "raise SystemExit(1)", "runtime_error"),
        ("while True: pass", "time_limit"),
        ("x = [0] * (1 << 30)", "memory_limit"),
        ("while True: print('x' * 10_000)", "output_limit"),
        ("import os; os._exit(0)", "wrong_answer"),
        ("import sys; sys.exit(0)", "wrong_answer"),
    ],
)
def test_verdicts(reward: UnitTests, source: str, status: str) -> None:
    result = score(reward, fenced(source))
    assert result.status == status, result
    assert (result.value, result.passed) == ((1.0, True) if status == "accepted" else (0.0, False))
    assert result.metrics[f"tests/{status}"] >= 1


SAME_ALONE = {
    "a mark in a shared module": "import math\nassert not hasattr(math, 'seen')\nmath.seen = 1\n" + ADD,
    "a counter in a shared module": "import heapq\nheapq.n = getattr(heapq, 'n', 0) + 1\nif heapq.n > 1: print('again')\n" + ADD,
    "ends at once": ADD + "import os, sys\nsys.stdout.flush()\nos._exit(0)",
    "exits": ADD + "exit()",
    "closes stdin": ADD + "import sys\nsys.stdin.close()",
    "closes the descriptors": "import os\ns = os.read(0, 99)\nos.write(1, b'%d' % sum(map(int, s.split())))\nos.closerange(0, 99)",
    "file on stdin": "a, b = map(int, open(0).read().split())\nprint(a + b)",
    "replaces stdout": "import sys, io\nout = sys.stdout\nsys.stdout = io.StringIO()\n" + ADD + "out.write(sys.stdout.getvalue())",
    "a file that is never closed": "import os\na, b = map(int, input().split())\nout = os.fdopen(1, 'w')\nprint(a + b, file=out)",
    "prints at exit": "import atexit\na, b = map(int, input().split())\natexit.register(print, a + b)",
    "a thread that goes on": (
        "import threading, time\na, b = map(int, input().split())\n"
        "def late():\n    time.sleep(0.01)\n    print(a + b)\nthreading.Thread(target=late).start()"
    ),
    "a daemon thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n" + ADD,
    "recursion limit": "import sys\nassert sys.getrecursionlimit() == 1000\nsys.setrecursionlimit(5000)\n" + ADD,
    "slow": "import time\nend = time.process_time() + 0.04\nwhile time.process_time() < end: pass\n" + ADD,
    "writes into the descriptors of other runs": (
        "import os\n"
        + ADD
        + "import sys\nsys.stdout.flush()\nfor n in range(3, 20):\n    try: os.write(n, b'...........7\\n')\n    except OSError: pass"
    ),
    "a file that an earlier run left": "import os\nassert not os.path.exists('/tmp/mark')\nopen('/tmp/mark', 'w').close()\n" + ADD,
    "takes the same random numbers each time": "import random\nassert random.random() == 0.8444218515250481\n" + ADD,
}


@pytest.mark.parametrize("name", SAME_ALONE)
def test_runs_that_share_a_process_are_judged_as_if_alone(reward: UnitTests, name: str) -> None:
    problem = {"id": "many", "tests": [{"input": f"{n} 1", "output": str(n + 1)} for n in range(6)]}
    result = score(reward, fenced(SAME_ALONE[name]), problem)
    assert result.status == "accepted", result


def test_a_failure_after_the_first_test_is_a_failure(reward: UnitTests) -> None:
    problem = {"id": "many", "tests": [{"input": f"{n} 1", "output": str(n + 1)} for n in range(6)]}
    for end, status in (
        ("1 / (a - 3)", "runtime_error"),
        ("if a == 3: print('more')", "wrong_answer"),
        ("while a == 3: pass", "time_limit"),
    ):
        result = score(reward, fenced(ADD + end), problem)
        assert (result.status, result.metrics["tests/accepted"]) == (status, 3)


def test_sparse_stops_at_the_first_failure_and_soft_gives_the_share(reward: UnitTests) -> None:
    half = fenced("a, b = map(int, input().split())\nprint(a + b if a < 100 else 0)")
    assert sum(value for name, value in score(reward, half).metrics.items() if name in ("tests/accepted", "tests/wrong_answer")) == 3
    always_wrong = score(reward, fenced("print('no')"))
    assert always_wrong.metrics["tests/wrong_answer"] == 1
    soft = UnitTests({"cells": 1, "score": "soft"})
    try:
        result = score(soft, half)
        assert result.value == pytest.approx(2 / 3) and result.status == "wrong_answer" and not result.passed
        assert score(soft, fenced(ADD)).value == 1.0
    finally:
        soft.close()


def test_the_budget_of_a_problem_ends_it() -> None:
    reward = UnitTests({"cells": 1, "score": "soft", "min_time_limit_s": 1, "problem_budget_s": 1.5})
    try:
        problem = {"id": "slow", "tests": [{"input": str(n), "output": "x"} for n in range(10)]}
        result = score(reward, fenced("while True: pass"), problem)
        assert result.metrics["tests/time_limit"] == 10 and "budget" not in result.detail
        assert result.metrics["tests/cpu_s"] * 10 < 5
    finally:
        reward.close()


def test_hardest_tests_are_chosen() -> None:
    problem = parse_problem({"id": 1, "tests": [{"input": "x" * size, "output": str(size)} for size in (5, 1, 9, 3, 7)]})
    assert isinstance(problem.form, tuple)
    assert [test.output for test in choose_tests(problem.form, 3)] == [b"5", b"7", b"9"]


LAYOUTS: list[dict[str, Any]] = [
    {"tests": {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3", "7"]}},
    {"tests": json.dumps([{"input": "1 2", "output": "3"}])},
    {"input_output": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})},
    {"input_output": {"inputs": [["1 2"]], "outputs": [["3"]]}},
    {
        "public_test_cases": json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]),
        "private_test_cases": json.dumps([{"input": "2 2", "output": "4", "testtype": "stdin"}]),
    },
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_public_sets(reward: UnitTests, layout: dict[str, Any]) -> None:
    assert score(reward, fenced(ADD), layout).passed
    assert not score(reward, fenced("print(0)"), layout).passed


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ({"id": "p1"}, ["'p1'", "'tests'", "no tests"]),
        ({"id": "p1", "tests": []}, ["'p1'", "'tests'", "no tests"]),
        ({"id": "p1", "tests": {"inputs": ["1"], "outputs": []}}, ["'p1'", "1 inputs but 0 outputs"]),
        ({"id": "p1", "tests": [{"input": "1"}]}, ["'p1'", "'tests[0]'"]),
        ({"id": "p1", "tests": [{"input": "1", "output": 3}]}, ["'p1'", "'tests[0].output'", "int"]),
        ({"id": "p1", "input_output": "{"}, ["'p1'", "'input_output'"]),
        ({**PROBLEM, "language": "cobol"}, ["'add'", "'language'", "cobol"]),
        ({**PROBLEM, "checker": "near"}, ["'add'", "'checker'", "near"]),
        ({**PROBLEM, "time_limit_s": 0}, ["'add'", "'time_limit_s'"]),
    ],
)
def test_bad_problems_are_named(reward: UnitTests, problem: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(DataError) as error:
        score(reward, fenced(ADD), problem)
    assert all(word in str(error.value) for word in words), error.value


def test_bad_options_are_named() -> None:
    for options, word in (({"cels": 2}, "cels"), ({"cells": 0}, "cells"), ({"min_time_limit_s": 13}, "max_time_limit_s")):
        with pytest.raises(ConfigError, match=word):
            UnitTests(options)


PYTHON = ("python", "py", "python3")


@pytest.mark.parametrize(
    ("text", "fence", "program"),
    [
        ("```python\na\n```\ntext\n```python\nb\n```", "required", "b\n"),
        ("```python\na\n```\n```text\nb\n```", "required", "a\n"),
        ("```Python\na\n```", "required", "a\n"),
        ("```\na\n```", "required", "a\n"),
        ("```python\na\n```\n```\nnote\n```", "required", "a\n"),
        ("~~~py\na\n~~~", "required", "a\n"),
        ("````python\nx = '''\n```\n'''\n````", "required", "x = '''\n```\n'''\n"),
        ("```python title=x\na\n```", "required", "a\n"),
        ("```cpp\na\n```", "required", None),
        ("```cpp\na\n```", "optional", None),
        ("```python\na", "required", None),
        ("```python\na", "optional", None),
        ("```python\n\n```", "required", None),
        ("print(1)", "required", None),
        ("print(1)", "optional", "print(1)"),
        ("  \n", "optional", None),
        ("", "required", None),
    ],
)
def test_the_last_block_of_the_language_is_the_program(text: str, fence: Any, program: str | None) -> None:
    assert extract_program(text, PYTHON, fence) == program


def test_no_program_is_unparseable(reward: UnitTests) -> None:
    result = score(reward, "I give up.")
    assert (result.value, result.status, result.passed) == (0.0, "unparseable", False)


THREE = "assert candidate(0) == 0\n    assert candidate(2) == 4\n    assert candidate(3) == 6\n"
HUMANEVAL = {
    "task_id": "Demo/0",
    "prompt": "def double(n):\n    'Twice n.'\n",
    "entry_point": "double",
    "test": f"def check(candidate):\n    assert True, 'simple'\n    {THREE}",
}
LEETCODE = {"task_id": "Demo/1", "tests": {"functional": f"def check(candidate):\n    {THREE}\n\ncheck(Solution().double)"}}
LOOPS = {**HUMANEVAL, "task_id": "Demo/2", "test": "def check(candidate):\n    for n in (0, 2, 3):\n        assert candidate(n) == 2 * n\n"}
CPP = {
    "task_id": "Demo/3",
    "language": "cpp",
    "prompt": "#include <cassert>\nlong twice(long n) {\n",
    "tests": "}\nint main() {\n    auto candidate = twice;\n"
    + "".join(f"    assert(candidate(({n})) == ({2 * n}));\n" for n in (0, 2, 3))
    + "}\n",
}


@pytest.fixture(scope="module")
def soft() -> Iterator[UnitTests]:
    reward = UnitTests({"cells": 2, "score": "soft"})
    try:
        yield reward
    finally:
        reward.close()


@pytest.mark.parametrize(
    ("problem", "source", "value", "status"),
    [
        (HUMANEVAL, "def double(n): return 2 * n", 1, "accepted"),
        (HUMANEVAL, "def double(n): return n * n", 2 / 3, "wrong_answer"),
        (HUMANEVAL, "def double(n): return None", 0, "wrong_answer"),
        (HUMANEVAL, "def double(n): return 2 * n if n < 3 else 1 / 0", 2 / 3, "runtime_error"),
        (LEETCODE, "class Solution:\n    def double(self, n): return n * n", 2 / 3, "wrong_answer"),
        (LEETCODE, "class Solution:\n    def __init__(self): 1 / 0", 0, "runtime_error"),
        (LOOPS, "def double(n): return n * n", 0, "wrong_answer"),
        (CPP, "long twice(long n) { return n < 3 ? n * n : *(volatile long*)nullptr; }", 2 / 3, "runtime_error"),
        pytest.param(CPP, "long twice(long n) { return n + n; }", 1, "accepted", marks=pytest.mark.slow),
        pytest.param(CPP, "long twice(long n) { return n * n; }", 2 / 3, "wrong_answer", marks=pytest.mark.slow),
        pytest.param(CPP, "#include <cstdlib>\nlong twice(long n) { std::exit(0); }", 0, "runtime_error", marks=pytest.mark.slow),
    ],
)
def test_soft_gives_the_share_of_the_asserts(
    reward: UnitTests, soft: UnitTests, problem: dict[str, Any], source: str, value: float, status: str
) -> None:
    program = fenced(source, str(problem.get("language", "python")))
    shared = score(soft, program, problem)
    assert (shared.value, shared.status) == (pytest.approx(value), status), shared
    if problem is not CPP:  # the same source compiled twice more
        all_or_nothing = score(reward, program, problem)
        assert (all_or_nothing.value, all_or_nothing.status) == (float(value == 1), status), all_or_nothing
