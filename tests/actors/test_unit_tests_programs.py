"""Problems that bring programs of their own: checkers, interactors, graders, managers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from actors.rewards import Sample, Score
from actors.rewards.unit_tests import UnitTests
from actors.sandbox import Limits, conversation, wire
from actors.sandbox.execution import Program, Running
from actors.sandbox.runner import Sandbox
from protocol.errors import DataError

TESTS = [{"input": f"{n}\n", "output": f"{n}\n"} for n in (6, 15, 28)]
TESTLIB_CHECKER = """
import sys
n = int(open(sys.argv[1]).read())
try:
    a, b = map(int, open(sys.argv[2]).read().split())
except ValueError:
    print("two numbers are expected", file=sys.stderr)
    sys.exit(2)
assert int(open(sys.argv[3]).read()) == n
if a + b != n:
    print(f"{a} + {b} is not {n}", file=sys.stderr)
    sys.exit(1)
"""
KATTIS_CHECKER = """
import os, sys
assert os.path.isdir(sys.argv[3]) and open(sys.argv[2]).read() == open(sys.argv[1]).read()
sys.exit(42 if sum(map(int, sys.stdin.read().split())) == int(open(sys.argv[1]).read()) else 43)
"""
SPLIT = "n = int(input())\nprint(n // 3, n - n // 3)"
GUESS_INTERACTOR = """
import sys
secret, asked = int(open(sys.argv[1]).read()), 0
for line in sys.stdin:
    word, number = line.split()
    if word == "!":
        if int(number) == secret and asked <= 10: sys.exit(0)
        print("not the secret number", file=sys.stderr)
        sys.exit(1)
    asked += 1
    print("<" if secret < int(number) else ">=", flush=True)
print("no answer", file=sys.stderr)
sys.exit(1)
"""
BISECT = """
low, high = 0, 1000
while high - low > 1:
    middle = (low + high) // 2
    print("?", middle, flush=True)
    if input() == "<": high = middle
    else: low = middle
print("!", low, flush=True)
"""
BISECT_CPP = """
#include <iostream>
#include <string>
int main() {
    int low = 0, high = 1000;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        std::cout << "? " << middle << std::endl;
        std::string answer;
        std::cin >> answer;
        (answer == "<" ? high : low) = middle;
    }
    std::cout << "! " << low << std::endl;
}
"""
GRADER = '#include "sum.h"\n#include <cstdio>\nint main() { long a, b; std::scanf("%ld %ld", &a, &b); std::printf("%ld\\n", sum(a, b)); }\n'
SUM_H = "#pragma once\nlong sum(long a, long b);\n"
IOI = {
    "id": "sum",
    "language": "cpp",
    "grader_files": {"grader.cpp": GRADER, "sum.h": SUM_H},
    "subtasks": [
        {"points": 30, "tests": [{"input": "1 2", "output": "3"}, {"input": "4 5", "output": "9"}]},
        {"points": 70, "tests": [{"input": "3000000000 1", "output": "3000000001"}, {"input": "1 1", "output": "2"}]},
    ],
}


@pytest.fixture(scope="module")
def reward() -> Iterator[UnitTests]:
    reward = UnitTests({"cells": 1, "min_time_limit_s": 1, "max_time_limit_s": 1})
    try:
        yield reward
    finally:
        reward.close()


@pytest.fixture(scope="module")
def hasty() -> Iterator[UnitTests]:
    """For programs that wait for what never comes: their wall time is three times this and a second."""
    reward = UnitTests({"cells": 1, "min_time_limit_s": 0.1, "max_time_limit_s": 0.1})
    try:
        yield reward
    finally:
        reward.close()


@pytest.fixture(scope="module")
def soft() -> Iterator[UnitTests]:
    reward = UnitTests({"cells": 2, "min_time_limit_s": 1, "max_time_limit_s": 1, "score": "soft"})
    try:
        yield reward
    finally:
        reward.close()


def score(reward: UnitTests, problem: dict[str, Any], source: str) -> Score:
    language = problem.get("language", "python")
    return reward.score(Sample(problem=problem, completion=f"```{language}\n{source}\n```", truncated=False))


@pytest.mark.parametrize(("convention", "checker"), [("testlib", TESTLIB_CHECKER), ("kattis", KATTIS_CHECKER)])
def test_a_checker_program_judges(reward: UnitTests, soft: UnitTests, convention: str, checker: str) -> None:
    problem = {"id": "split", "tests": TESTS, "checker": convention, "checker_source": checker, "checker_language": "python"}
    assert score(reward, problem, SPLIT).passed
    wrong = score(reward, problem, SPLIT.replace("n - n // 3", "n"))
    assert wrong.status == "wrong_answer" and wrong.value == 0
    if convention == "testlib":
        assert "2 + 6 is not 6" in wrong.detail
        assert "two numbers are expected" in score(reward, problem, "print(1)").detail
    assert score(soft, problem, "n = int(input())\nprint(0, n if n < 20 else 0)").value == pytest.approx(2 / 3)
    assert score(reward, problem, "1 / 0").status == "runtime_error"


def test_a_checker_in_cpp(reward: UnitTests) -> None:
    checker = "#include <fstream>\nint main(int, char** v) { long n, a, b; std::ifstream(v[1]) >> n; std::ifstream(v[2]) >> a >> b;"
    checker += " return a + b != n; }"
    problem = {"id": "split", "tests": TESTS, "checker": "testlib", "checker_source": checker}
    assert score(reward, problem, SPLIT).passed
    assert not score(reward, problem, "print(1, 1)").passed


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"checker_source": "raise ValueError('x')\n"}, ["'checker_source'", "the checker failed", "ValueError: x"]),
        ({"checker": "testlib", "checker_source": "1 / 0"}, ["'checker_source'", "the checker failed", "ZeroDivisionError"]),
        ({"checker": "testlib", "checker_source": "def broken(:"}, ["'checker_source'", "the checker failed", "SyntaxError"]),
        ({"checker_source": "import sys; sys.exit(3)"}, ["'checker_source'", "exit code 3"]),
        ({"checker_source": "import os; os.abort()"}, ["'checker_source'", "exit code -6"]),
        ({"checker_source": "int main() {", "checker_language": "cpp"}, ["'checker_source'", "does not compile"]),
        ({"checker_source": "x", "checker_language": "cobol"}, ["'checker_source'", "cobol"]),
        ({"checker_source": "x", "checker": "exact"}, ["'checker'", "testlib"]),
        ({"checker": "testlib"}, ["'checker'", "testlib"]),
        (
            {
                "checker": "exact",
                "interactor_source": "import sys; print(6, flush=True); sys.stdin.read(); sys.exit(9)",
                "interactor_language": "python",
            },
            ["'interactor_source'", "exit code 9"],
        ),
        ({"interactor_source": "x", "interactor_convention": "y"}, ["'interactor_convention'", "'y'"]),
    ],
)
def test_broken_judges_are_errors_of_the_data(reward: UnitTests, fields: dict[str, str], words: list[str]) -> None:
    problem = {"id": "split", "tests": TESTS, "checker": "kattis", "checker_language": "python"} | fields
    with pytest.raises(DataError) as error:
        score(reward, problem, SPLIT)
    assert all(word in str(error.value) for word in ["'split'", *words]), error.value


@pytest.mark.parametrize(
    ("source", "status"),
    [
        (BISECT, "accepted"),
        (BISECT.replace("low, flush", "low + 1, flush"), "wrong_answer"),
        ("print('!', 1, flush=True)", "wrong_answer"),
        ("pass", "wrong_answer"),
        ("for n in range(400): print('?', n, flush=True); input()\nprint('!', 6, flush=True)", "wrong_answer"),
        ("print('? 5', flush=True)\n1 / 0", "runtime_error"),
        ("print('? 5', flush=True)\nwhile True: pass", "time_limit"),
        ("input()", "time_limit"),
    ],
)
def test_an_interactor_talks_to_the_program(reward: UnitTests, hasty: UnitTests, source: str, status: str) -> None:
    problem = {"id": "guess", "tests": TESTS, "interactor_source": GUESS_INTERACTOR, "interactor_language": "python"}
    result = score(hasty if source == "input()" else reward, problem, source)
    assert result.status == status, result


@pytest.mark.parametrize(
    ("program", "interactor", "first"),
    [("print('? 5', flush=True)\n1 / 0", "import sys\nsys.stdin.read()", True), ("input()", "import sys\nsys.exit(1)", False)],
    ids=["the program", "the interactor"],
)
def test_who_ended_first_is_known_also_to_a_judge_that_looks_late(
    monkeypatch: pytest.MonkeyPatch, program: str, interactor: str, first: bool
) -> None:
    """On a busy machine both have ended when it is looked."""
    readable = conversation.readable

    def late(jobs: list[Running], timeout_s: float) -> list[Running]:
        for job in jobs:
            readable([job], timeout_s)
        return readable(jobs, timeout_s)

    monkeypatch.setattr(conversation, "readable", late)
    candidate, judge = (Program(kind=wire.PYTHON, content=source.encode()) for source in (program, interactor))
    with Sandbox(2) as sandbox:
        ended = [conversation.run_interactive(sandbox.pool, candidate, judge, Limits(cpu_s=10))[2] for _ in range(5)]
    assert ended == [first] * 5


def test_an_interaction_in_cpp(reward: UnitTests) -> None:
    problem = {"id": "guess", "language": "cpp", "tests": TESTS, "interactor_source": GUESS_INTERACTOR, "interactor_language": "python"}
    assert score(reward, problem, BISECT_CPP).passed


@pytest.mark.parametrize(
    ("source", "value", "passed"),
    [
        ('#include "sum.h"\nlong sum(long a, long b) { return a + b; }', 1.0, True),
        ('#include "sum.h"\nlong sum(long a, long b) { return int(a) + int(b); }', 0.3, False),
        ('#include "sum.h"\nlong sum(long a, long b) { return a == 4 ? 0 : a + b; }', 0.7, False),
        ('#include "sum.h"\nlong sum(long a, long b) { return 0; }', 0.0, False),
    ],
)
def test_subtasks_give_their_points_when_all_their_tests_pass(soft: UnitTests, source: str, value: float, passed: bool) -> None:
    result = score(soft, IOI, source)
    assert result.value == pytest.approx(value) and result.passed is passed, result


def test_a_grader_that_does_not_link_is_a_compile_error(soft: UnitTests) -> None:
    assert score(soft, IOI, "int nothing() { return 0; }").status == "compile_error"


COMMUNICATION_MANAGER = """
#include <cstdio>
#include <fstream>
int main(int argc, char** argv) {
    long secret, got = 0;
    std::scanf("%ld", &secret);
    FILE* from_first = std::fopen(argv[1], "r"); FILE* to_first = std::fopen(argv[2], "w");
    std::ifstream from_second(argv[3]); std::ofstream to_second(argv[4]);
    std::fprintf(to_first, "%ld\\n", secret); std::fflush(to_first);
    long code = 0;
    if (std::fscanf(from_first, "%ld", &code) != 1 || code > 9) { std::puts("0"); return 0; }
    to_second << code << std::endl;
    from_second >> got;
    std::printf("%d\\n", got == secret);
}
"""


@pytest.mark.parametrize(
    ("source", "status"),
    [
        # the first process may send one digit: secrets are squares of digits
        ("import sys\nn = int(input())\nprint(round(n ** 0.5) if sys.argv[1] == '0' else n * n, flush=True)", "accepted"),
        ("n = int(input())\nprint(n, flush=True)", "wrong_answer"),
        ("1 / 0", "runtime_error"),
        ("while True: pass", "time_limit"),
    ],
)
def test_processes_that_communicate_through_a_manager(soft: UnitTests, source: str, status: str) -> None:
    tests = [{"input": f"{n * n}\n", "output": ""} for n in (4, 7)]
    problem = {"id": "wire", "subtasks": [{"points": 100, "tests": tests}], "manager_source": COMMUNICATION_MANAGER, "num_processes": 2}
    result = score(soft, problem, source)
    assert result.status == status, result


@pytest.mark.slow
def test_processes_that_open_their_lines_by_path(soft: UnitTests) -> None:
    source = """
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <unistd.h>
int main(int argc, char** argv) {
    FILE* from = fdopen(open(argv[1], O_RDONLY), "r"); FILE* to = fopen(argv[2], "w");
    std::puts("this is nobody's input");
    long n, root = 0;
    if (fscanf(from, "%ld", &n) != 1) return 1;
    while (root * root < n) root++;
    fprintf(to, "%ld\\n", std::atoi(argv[3]) ? n * n : root); fclose(to);
}
"""
    problem = {
        "id": "paths",
        "language": "cpp",
        "subtasks": [{"points": 100, "tests": [{"input": "49\n", "output": ""}]}],
        "manager_source": COMMUNICATION_MANAGER,
        "num_processes": 2,
        "user_io": "fifo_io",
    }
    result = soft.score(Sample(problem=problem, completion=f"```cpp\n{source}\n```", truncated=False))
    assert result.status == "accepted", result


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"subtasks": [{"points": 1, "tests": TESTS}], "user_io": "pipes"}, "'user_io'"),
        ({"subtasks": [{"points": 1, "tests": TESTS}], "user_io": "fifo_io", "language": "python"}, "'user_io'"),
        ({"subtasks": [{"points": 0, "tests": TESTS}]}, "'points'"),
        ({"subtasks": [{"tests": TESTS}]}, "'subtasks[0].points'"),
        ({"subtasks": [{"points": 1}]}, "'tests'"),
        ({"subtasks": [1]}, "'subtasks'"),
        ({"subtasks": [{"points": 1, "tests": TESTS}], "grader_files": {"../x.cpp": ""}}, "'grader_files'"),
        ({"subtasks": [{"points": 1, "tests": TESTS}], "grader_files": {"x.cpp": ""}, "language": "python"}, "'grader_files'"),
    ],
)
def test_bad_subtasks_are_named(soft: UnitTests, fields: dict[str, Any], word: str) -> None:
    with pytest.raises(DataError) as error:
        score(soft, {"id": "bad"} | fields, "print(1)")
    assert word in str(error.value) and "'bad'" in str(error.value)
