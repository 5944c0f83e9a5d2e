"""The layouts of public problem sets, made one: what a dataset line asks a program to do.

| layout | fields |
|---|---|
| rlsys, Codeforces, SYNTHETIC-1 | `tests`: [{"input", "output"}], or {"inputs": [...], "outputs": [...]} |
| TACO, APPS, PRIME | `input_output`: the same as JSON text, with `fn_name` for calls |
| LiveCodeBench | `public_test_cases`, `private_test_cases`: JSON text of [{"input", "output", "testtype"}]; `metadata` with `func_name` |
| HumanEval | `prompt`, `entry_point`, `test` with check(candidate) |
| MBPP | `test_list`, `test_setup_code` |
| MultiPL-E, C++ | `language`: cpp, `prompt`, `tests`: a main with asserts on `candidate` |
| interactive | `tests`, `interactor_source`, `interactor_language`, `interactor_convention` |
| IOI | `subtasks`: [{"points", "tests"}], `grader_files`: {name: text}, `manager_source`, `num_processes`, `user_io` |
| LeetCode | `tests`: {"functional": source that calls check(Solution().method)} |

Bad data is an error that names problem and field, never a problem that nobody can solve.
"""

from __future__ import annotations

import ast
import base64
import builtins
import itertools
import json
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.rewards.cpp_asserts import function_name
from protocol.errors import DataError

_KNOWN_TO_TESTS = {"list_node", "tree_node", "is_same_list", "is_same_tree", "ListNode", "TreeNode", "inf", "nan"}
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LONGEST_UNPACKED_BYTES = 256 << 20


def split_check(source: str) -> tuple[str, tuple[str, ...]]:
    """(setup, tests) of test code that ends in `check(...)`: one test for each assert of `check`, so that a share of them can pass.

    A `check` that does anything else than assert is one test. Asserts of constants, which HumanEval has, are none. `source` parses.
    """
    *before, last = ast.parse(source).body
    check = next((node for node in before if isinstance(node, ast.FunctionDef) and node.name == "check"), None)
    called = isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and ast.unparse(last.value.func) == "check"
    if check is not None and called and isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and len(last.value.args) == 1:
        asserts = [node for node in check.body if isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant)]
        others = [node for node in check.body if not isinstance(node, ast.Assert)]
        if asserts and all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in others):
            setup = "\n".join(ast.unparse(node) for node in before if node is not check)
            binding = f"{check.args.args[0].arg} = {ast.unparse(last.value.args[0])}"
            return setup, tuple(ast.unparse(node) if number else f"{binding}\n{ast.unparse(node)}" for number, node in enumerate(asserts))
    return "\n".join(map(ast.unparse, before)), (ast.unparse(last),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """One input and the output that answers it."""

    __test__ = False  # not a test class of pytest

    input: bytes
    output: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Asserts:
    """Test code that calls the program by the names in `remote` and raises where an answer is wrong."""

    setup: str
    """Run once, before the tests, in their namespace."""
    tests: tuple[str, ...]
    remote: tuple[str, ...]
    prelude: str = ""
    """Source that the program may rely on: it stands before the program."""
    continues_prelude: str = ""
    """Name of a function: a program that does not define it is the rest of the prelude's last function."""
    contest: bool = False
    """Whether the program begins with the imports that contest platforms make."""
    indivisible: bool = False
    """Whether all tests are always run, under the limits of one: they are the asserts of one test function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cases:
    """Arguments for one function, and for each the results that will do."""

    function: str
    cases: tuple[tuple[list[Any], list[Any]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CppAsserts:
    """A `main` that asserts what `candidate`, the function of the prompt, returns."""

    prompt: str
    tests: str
    function: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeProgram:
    """A program that came with the data and judges: a checker, an interactor or a manager."""

    source: str
    language: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Interaction:
    """The program talks to an interactor, which has the test's input and answer."""

    tests: tuple[Test, ...]
    interactor: JudgeProgram
    convention: str
    """A name of `actors.sandbox.checkers.programs.CONVENTIONS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subtasks:
    """Points for groups of tests, as the International Olympiad in Informatics grades."""

    subtasks: tuple[tuple[float, tuple[Test, ...]], ...]
    """(points, tests); the points count when every test passes."""
    files: Mapping[str, bytes]
    """Compiled together with the submission (*.cpp), or included by it (*.h)."""
    manager: JudgeProgram | None
    """Communication tasks: the program that talks to the submission's processes."""
    num_processes: int
    fifo_io: bool = False
    """Communication tasks: the processes are called with the paths of their lines, before their index; else these are stdin and stdout."""


Form = tuple[Test, ...] | Asserts | Cases | CppAsserts | Interaction | Subtasks


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a program is judged by."""

    problem_id: str
    form: Form
    """A tuple of tests is read from stdin and answered on stdout."""
    language: str = "python"
    checker: str = "exact"
    time_limit_s: float | None = None
    memory_limit_bytes: int | None = None
    checker_program: JudgeProgram | None = None
    """Of the convention that `checker` names."""

    def error(self, field: str, found: str) -> DataError:
        """An error that names the problem and the field."""
        return DataError(f"problem {self.problem_id!r}, field {field!r}: {found}")


def parse_problem(line: Mapping[str, Any]) -> Problem:
    """The problem of a dataset line. Raises DataError."""
    problem_id = str(line.get("id", line.get("task_id", line.get("question_id", line.get("name", "without id")))))
    reader = _Reader(problem_id)
    return Problem(
        problem_id=problem_id,
        form=reader.form(line),
        language=reader.text(line, "language", "python"),
        checker=reader.text(line, "checker", "exact"),
        time_limit_s=reader.positive(line, "time_limit_s"),
        memory_limit_bytes=None if (limit := reader.positive(line, "memory_limit_bytes")) is None else int(limit),
        checker_program=reader.judge_program(line, "checker"),
    )


def _first_call(source: str) -> tuple[str, ...]:
    """The outermost function that test code calls first: the program's, where it has the name of a builtin."""
    calls = (node.func.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    return tuple(itertools.islice(calls, 1))


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

    def judge_program(self, line: Mapping[str, Any], role: str) -> JudgeProgram | None:
        """The program in the fields ROLE_source and ROLE_language."""
        if not line.get(f"{role}_source"):
            return None
        return JudgeProgram(source=self.text(line, f"{role}_source", ""), language=self.text(line, f"{role}_language", "cpp"))

    def form(self, line: Mapping[str, Any]) -> Form:
        """The tests, by whichever layout the fields show."""
        if line.get("subtasks"):
            return self._subtasks(line)
        interactor = self.judge_program(line, "interactor")
        if interactor is not None:
            convention = self.text(line, "interactor_convention", "testlib")
            return Interaction(tests=tuple(self._stdio_tests(line)), interactor=interactor, convention=convention)
        if "entry_point" in line:
            return self._humaneval(line)
        if line.get("test_list"):
            return self._mbpp(line)
        if line.get("language") == "cpp" and isinstance(line.get("tests"), str) and (function := function_name(line["tests"])):
            return CppAsserts(prompt=self.text(line, "prompt", ""), tests=line["tests"], function=function)
        tests = self.unpacked(line, "tests") if line.get("tests") else None
        if isinstance(tests, Mapping) and "functional" in tests:
            source = self.text(tests, "functional", "")
            remote = self._free_names("tests.functional", source)
            setup, asserts = split_check(source)
            return Asserts(setup=setup, tests=asserts, remote=remote, contest=True, indivisible=True)
        function = self._function_name(line)
        return self._cases(line, function) if function else tuple(self._stdio_tests(line))

    def _subtasks(self, line: Mapping[str, Any]) -> Subtasks:
        subtasks = line["subtasks"]
        if not isinstance(subtasks, list) or not all(isinstance(subtask, Mapping) for subtask in subtasks):
            raise self.error("subtasks", "expected a list of objects with 'points' and 'tests'")
        read = []
        for index, subtask in enumerate(subtasks):
            points = self.positive(subtask, "points")
            if points is None:
                raise self.error(f"subtasks[{index}].points", "missing")
            read.append((points, tuple(self._stdio_tests(subtask))))
        files = line.get("grader_files") or {}
        if not isinstance(files, Mapping) or not all(isinstance(text, str) and _FILE_NAME.fullmatch(name) for name, text in files.items()):
            raise self.error("grader_files", "expected file names without directories, and their text")
        user_io = line.get("user_io", "std_io")
        if user_io not in ("std_io", "fifo_io"):
            raise self.error("user_io", f"{user_io!r}, expected std_io or fifo_io")
        return Subtasks(
            subtasks=tuple(read),
            files={name: text.encode() for name, text in files.items()},
            manager=self.judge_program(line, "manager"),
            num_processes=int(self.positive(line, "num_processes") or 1),
            fifo_io=user_io == "fifo_io",
        )

    def _humaneval(self, line: Mapping[str, Any]) -> Asserts:
        prompt, test, entry = (self.text(line, field, "") for field in ("prompt", "test", "entry_point"))
        self._free_names("prompt", prompt)
        self._free_names("test", test)
        if not entry.isidentifier() or "def check(" not in test:
            raise self.error("test" if entry.isidentifier() else "entry_point", "expected a function's name and a `def check(candidate)`")
        setup, asserts = split_check(f"{test}\ncheck({entry})")
        return Asserts(
            setup=f"{prompt}\n{setup}", tests=asserts, remote=(entry,), prelude=prompt, continues_prelude=entry, indivisible=True
        )

    def _mbpp(self, line: Mapping[str, Any]) -> Asserts:
        tests = line["test_list"]
        if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
            raise self.error("test_list", "expected a list of assert statements")
        setup = self.text(line, "test_setup_code", "") or "\n".join(line.get("test_imports", []))
        source = "\n".join([setup, *tests])
        names = self._free_names("test_list", source) or _first_call(source)
        modules = [name for name in names if name in sys.stdlib_module_names]
        imports = "".join(f"import {name}\n" for name in modules)
        return Asserts(setup=imports + setup, tests=tuple(tests), remote=tuple(name for name in names if name not in modules))

    def _free_names(self, field: str, source: str) -> tuple[str, ...]:
        """Names that test code uses and does not make itself: those of the judged program."""
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise self.error(field, f"not Python: {error}") from None
        made = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
        made |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        imports = [name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names]
        made |= {(name.asname or name.name).partition(".")[0] for name in imports}
        used = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
        return tuple(dict.fromkeys(name for name in used if name not in made | _KNOWN_TO_TESTS and not hasattr(builtins, name)))

    def _function_name(self, line: Mapping[str, Any]) -> str:
        """The function that TACO's or LiveCodeBench's tests call; empty for programs of stdin and stdout."""
        for field, key in (("input_output", "fn_name"), ("tests", "fn_name"), ("metadata", "func_name")):
            if line.get(field):
                value = self.unpacked(line, field)
                if isinstance(value, Mapping) and value.get(key):
                    return str(value[key])
        return str(line.get("fn_name") or "")

    def _cases(self, line: Mapping[str, Any], function: str) -> Cases:
        cases: list[tuple[list[Any], list[Any]]] = []
        for field, value in self._test_fields(line):
            for index, test in enumerate(self._pairs(field, value)):
                place = f"{field}[{index}]"
                if test.get("testtype") == "functional":
                    arguments = [self._json(f"{place}.input", text) for text in str(test["input"]).split("\n") if text.strip()]
                    answers = [self._json(f"{place}.output", test["output"])]
                else:
                    arguments, wanted = test["input"], test["output"]
                    # some sets wrap the one result in a list and some do not, and the field's own checkers take both
                    answers = [wanted, wanted[0]] if isinstance(wanted, list) and len(wanted) == 1 else [wanted]
                if not isinstance(arguments, list):
                    raise self.error(f"{place}.input", f"{type(arguments).__name__}, expected a list of arguments")
                cases.append((arguments, answers))
        return Cases(function=function, cases=tuple(cases))

    def _json(self, field: str, text: Any) -> Any:
        try:
            return json.loads(text)
        except (TypeError, ValueError) as error:
            raise self.error(field, f"not JSON: {error}") from None

    def _stdio_tests(self, line: Mapping[str, Any]) -> Sequence[Test]:
        """Tests of a program that reads stdin and writes stdout."""
        return [
            Test(
                input=self._stream(f"{field}[{index}].input", test["input"]),
                output=self._stream(f"{field}[{index}].output", test["output"]),
            )
            for field, value in self._test_fields(line)
            for index, test in enumerate(self._pairs(field, value))
        ]

    def _test_fields(self, line: Mapping[str, Any]) -> list[tuple[str, Any]]:
        fields = [name for name in ("tests", "input_output", "public_test_cases", "private_test_cases") if line.get(name)]
        if not fields:
            raise self.error("tests", "no tests")
        found = [(field, self.unpacked(line, field)) for field in fields]
        if not any(self._pairs(field, value) for field, value in found):
            raise self.error(fields[0], "no tests")
        return found

    def _pairs(self, field: str, value: Any) -> list[Mapping[str, Any]]:
        """Tests as objects with `input` and `output`."""
        if isinstance(value, Mapping):
            inputs, outputs = value.get("inputs"), value.get("outputs")
            if not isinstance(inputs, list) or not isinstance(outputs, list):
                raise self.error(field, f"keys {sorted(value)}, expected lists 'inputs' and 'outputs'")
            if len(inputs) != len(outputs):
                raise self.error(field, f"{len(inputs)} inputs but {len(outputs)} outputs")
            value = [{"input": left, "output": right} for left, right in zip(inputs, outputs, strict=True)]
        if not isinstance(value, list):
            raise self.error(field, f"{type(value).__name__}, expected a list of tests")
        for index, test in enumerate(value):
            if not isinstance(test, Mapping) or "input" not in test or "output" not in test:
                raise self.error(f"{field}[{index}]", "expected an object with 'input' and 'output'")
        return value

    def _stream(self, field: str, value: Any) -> bytes:
        """Text, or a list of lines as TACO and APPS have them."""
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = "\n".join(value)
        if not isinstance(value, str):
            raise self.error(field, f"{type(value).__name__}, expected text")
        return value.encode(errors="surrogatepass")
