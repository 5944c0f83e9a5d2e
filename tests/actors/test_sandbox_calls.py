"""Call problems: what a program may answer, and everything it may try instead of answering."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from actors.rewards import Sample, Score
from actors.rewards.unit_tests import UnitTests
from actors.sandbox import values
from actors.sandbox.values import Decoder, Opaque, encode, to_json

HUMANEVAL = {
    "id": "double",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    for n in range(5):\n        assert candidate(n) == 2 * n\n    assert candidate('a') == 'aa'\n",
}
MBPP = {"id": "double", "test_list": ["assert double(2) == 4", "assert double([1]) == [1, 1]", "assert double('a') == 'aa'"]}
LEETCODE = {"id": "double", "tests": {"functional": "def check(candidate):\n    assert candidate(x = 3) == 6\n\ncheck(Solution().double)"}}
TACO = {"id": "double", "input_output": {"fn_name": "double", "inputs": [[2], ["a"]], "outputs": [[4], ["aa"]]}}
LIVECODEBENCH = {
    "id": "double",
    "public_test_cases": '[{"input": "2", "output": "4", "testtype": "functional"}]',
    "private_test_cases": '[{"input": "\\"a\\"", "output": "\\"aa\\"", "testtype": "functional"}]',
    "metadata": '{"func_name": "double"}',
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "HumanEval": HUMANEVAL,
    "MBPP": MBPP,
    "LeetCode": LEETCODE,
    "TACO": TACO,
    "LiveCodeBench": LIVECODEBENCH,
}

EQUAL_TO_ALL = """class Yes{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __bool__(self): return True
"""
CHEATS = {
    "returns None": "def double(x): return None",
    "an object equal to all": EQUAL_TO_ALL.format(base="") + "def double(x): return Yes()",
    "a str equal to all": EQUAL_TO_ALL.format(base="(str)") + "def double(x): return Yes('no')",
    "an int equal to all": EQUAL_TO_ALL.format(base="(int)") + "def double(x): return Yes(-7)",
    "a list equal to all": EQUAL_TO_ALL.format(base="(list)") + "def double(x): return Yes([9, 9, 9])",
    "a list of objects equal to all": EQUAL_TO_ALL.format(base="") + "def double(x): return [Yes(), Yes()]",
    "a dict equal to all": EQUAL_TO_ALL.format(base="(dict)") + "def double(x): return Yes()",
    "a class": EQUAL_TO_ALL.format(base="(type)") + "class No(metaclass=Yes): pass\ndef double(x): return No",
    "a lying metaclass name": "class ListNode:\n    next = None\n    val = 0\n    def __eq__(s, o): return True\ndef double(x): return ListNode()",
    "exits": "import sys\ndef double(x): sys.exit(0)",
    "exits at once": "import sys\nsys.exit(0)",
    "exits hard": "import os\ndef double(x): os._exit(0)",
    "exits hard at once": "import os\nos._exit(0)",
    "walks the frames": (
        "import sys\ndef double(x):\n    frame = sys._getframe()\n    while frame:\n        for name, value in list(frame.f_locals.items()):\n"
        "            if 'wanted' in name or 'expected' in name or 'tests' in name: return value\n        frame = frame.f_back\n    return None"
    ),
    "searches the memory for the tests": (
        "import gc\ndef double(x):\n    for o in gc.get_objects():\n"
        "        if isinstance(o, dict) and 'tests' in o: return 2 * x\n    return None"
    ),
    "overrides assert": "import builtins\nclass AssertionError(Exception): pass\nbuiltins.AssertionError = AssertionError\ndef double(x): return 0",
    "patches the codec": (
        "import sys, gc, types\nfor o in gc.get_objects():\n"
        "    if isinstance(o, types.FunctionType) and o.__name__ in ('same', '_judge', '_expect'): o.__code__ = (lambda *a: True).__code__\n"
        "def double(x): return 0"
    ),
    "prints at exit": "import atexit\natexit.register(print, 'accepted')\ndef double(x): return 0",
    "writes verdicts everywhere": (
        'import os\nfor fd in range(1, 64):\n    try: os.write(fd, b\'[["accepted", ""]]\')\n    except OSError: pass\ndef double(x): return 0'
    ),
    "answers before it is asked": (
        "import os, struct\nb = b'{\"value\": 4}'\nos.write(3, (struct.pack('=I', len(b)) + b) * 50)\ndef double(x): return 0"
    ),
    "answers with a length of gigabytes": "import os\nos.write(3, b'\\xff' * 8)\ndef double(x): return 0",
    "answers with junk": "import os, struct\nos.write(3, struct.pack('=I', 4) + b'junk')\ndef double(x): return 0",
    "answers with bad tags": (
        "import os, struct\nb = b'{\"value\": {\"t\": 3}}'\nos.write(3, (struct.pack('=I', len(b)) + b) * 50)\ndef double(x): return 0"
    ),
    "answers with a deep nest": (
        "import os, struct\nb = b'[' * 100000 + b']' * 100000\nos.write(3, struct.pack('=I', len(b)) + b)\ndef double(x): return 0"
    ),
    "an endless iterator": "import itertools\ndef double(x): return itertools.count()",
    "a list that holds itself": "def double(x):\n    a = []\n    a.append(a)\n    return a",
    "a linked list without an end": ("class ListNode:\n    val = 0\ndef double(x):\n    n = ListNode()\n    n.next = n\n    return n"),
    "raises what a test may expect": "def double(x): raise AssertionError('accepted')",
    "recurses for ever": "def double(x): return double(x)",
    "a generator": "def double(x): yield 2 * x",
    "closes the line": "import os\nos.close(3)\ndef double(x): return 2 * x",
    "turns itself to stone": "import os, signal\ndef double(x): os.kill(os.getpid(), signal.SIGSTOP)",
}


@pytest.fixture(scope="module")
def reward() -> Iterator[UnitTests]:
    reward = UnitTests({"cells": 2, "min_time_limit_s": 1, "max_time_limit_s": 1, "memory_limit_bytes": 256 << 20})
    try:
        yield reward
    finally:
        reward.close()


def as_solution(source: str) -> str:
    """The same behind `class Solution`."""
    return source + "\nclass Solution:\n    def double(self, x): return globals()['double'](x)\n"


def score(reward: UnitTests, layout: str, source: str) -> Score:
    if layout == "LeetCode":
        source = as_solution(source)
    return reward.score(Sample(problem=LAYOUTS[layout], completion=f"```python\n{source}\n```", truncated=False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_right_program_is_accepted_in_every_layout(reward: UnitTests, layout: str) -> None:
    for source in ("def double(x): return 2 * x", "import collections\ndouble = lambda x: x + x"):
        result = score(reward, layout, source)
        assert result.passed, result
    assert not score(reward, layout, "def double(x): return 2 * x if x != 'a' and x != 3 else 0").passed


@pytest.mark.parametrize("cheat", [pytest.param(name, marks=pytest.mark.slow) if "stone" in name else name for name in CHEATS])
def test_no_cheat_passes(reward: UnitTests, cheat: str) -> None:
    for layout in ("MBPP", "HumanEval", "LeetCode") if "turns" not in cheat else ("MBPP",):
        result = score(reward, layout, CHEATS[cheat])
        assert not result.passed, (layout, result)
        assert result.status in ("wrong_answer", "runtime_error", "time_limit", "memory_limit")


def test_soft_scores_count_asserts_and_cases() -> None:
    soft = UnitTests({"cells": 2, "score": "soft"})
    try:
        for layout, value in (("MBPP", 2 / 3), ("TACO", 1 / 2)):
            assert score(soft, layout, "def double(x): return 2 * x if x != 'a' else ''").value == pytest.approx(value)
        assert score(soft, "MBPP", "def double(x):\n    if x == [1]: import os; os._exit(0)\n    return 2 * x").value == pytest.approx(
            1 / 3
        )
    finally:
        soft.close()


def test_a_completion_that_goes_on_with_the_prompt(reward: UnitTests) -> None:
    assert reward.score(Sample(problem=HUMANEVAL, completion="```python\n    return 2 * x\n```", truncated=False)).passed


def test_objects_of_the_programs_own_classes(reward: UnitTests) -> None:
    tests = {
        "id": "tree",
        "test_setup_code": "root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(3)",
        "test_list": ["assert height(root) == 3", "assert root.left.value == 2", "assert height(None) == 0", "assert root.grow(4) == 5"],
    }
    node = "class Node:\n    def __init__(self, v): self.value, self.left = v, None\n    def grow(self, n): return self.value + n\n"
    right = node + "def height(n): return 1 + height(n.left) if n else 0"
    assert reward.score(Sample(problem=tests, completion=f"```python\n{right}\n```", truncated=False)).passed
    wrong = node + "def height(n): return n"
    assert not reward.score(Sample(problem=tests, completion=f"```python\n{wrong}\n```", truncated=False)).passed


def test_arguments_that_a_call_changes_are_seen_by_the_test(reward: UnitTests) -> None:
    problem = {"id": "sort", "test_list": ["xs = [3, 1, 2]\nassert sort(xs) is None\nassert xs == [1, 2, 3]"]}
    for body, passed in (("xs.sort()", True), ("return None", False)):
        completion = f"```python\ndef sort(xs): {body}\n```"
        assert reward.score(Sample(problem=problem, completion=completion, truncated=False)).passed is passed


def test_exceptions_that_a_test_expects(reward: UnitTests) -> None:
    test = "try:\n    f(0)\nexcept ZeroDivisionError:\n    pass\nelse:\n    raise AssertionError('no error')"
    for body, passed in (("1 / x", True), ("int('x')", False), ("0", False)):
        completion = f"```python\ndef f(x): return {body}\n```"
        assert reward.score(Sample(problem={"id": "e", "test_list": [test]}, completion=completion, truncated=False)).passed is passed


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.complex_numbers(allow_nan=False)
    | st.fractions() | st.decimals(allow_nan=False) | st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 9)),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    | st.sets(st.integers() | st.text(), max_size=4) | st.frozensets(st.integers(), max_size=4),
    max_leaves=20,
)  # fmt: skip


def _types(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value), [_types(item) for item in value]
    if isinstance(value, dict):
        return type(value), [(_types(key), _types(item)) for key, item in value.items()]
    return type(value)


@hypothesis.given(PLAIN)
@hypothesis.settings(max_examples=60, deadline=None)
def test_property_plain_data_survives_the_wire(value: object) -> None:
    back = Decoder().decode(json.loads(to_json(encode(value))))
    assert back == value and _types(back) == _types(value)


@hypothesis.given(
    st.recursive(st.none() | st.integers() | st.text() | st.floats(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_property_whatever_is_received_is_decoded_or_refused(data: Any) -> None:
    try:
        Decoder().decode(data)
    except values.NotPlain:
        pass


def test_opaque_objects_refuse_to_be_judged() -> None:
    opaque = Decoder().decode(encode(object()))
    assert isinstance(opaque, Opaque)
    for judge in (
        lambda: opaque == 1,
        lambda: opaque != 1,
        lambda: opaque < 1,
        lambda: bool(opaque),
        lambda: opaque in [1],
        lambda: {opaque},
    ):
        with pytest.raises(TypeError, match="not plain data"):
            judge()


def test_subclasses_are_read_by_the_base_class() -> None:
    class Liar(int):
        def __int__(self) -> int:
            return 42

        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    assert encode(Liar(7)) == 7
    assert encode(Decimal("1.50")) == {"D": "1.50"} and encode(Fraction(1, 3)) == {"F": ["0x1", "0x3"]}
