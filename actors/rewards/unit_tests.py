"""The unit-test reward: run the program that a completion holds on the problem's tests.

Consumes: a problem (see `problems.py`) and a completion. Produces: the share of tests passed, or all or nothing, with the verdict
of the first test that failed. Waits for: cells of its own sandbox. Expected outputs never leave this process.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from actors.rewards import Sample, Score
from actors.rewards.fences import extract_program
from actors.rewards.problems import Asserts, Cases, Problem, Test, parse_problem
from actors.sandbox import MIB, Execution, Limits, wire
from actors.sandbox.checkers import CHECKERS, Checker
from actors.sandbox.conversation import judge_calls
from actors.sandbox.execution import Program
from actors.sandbox.languages import LANGUAGES, CompileError, Language
from actors.sandbox.runner import Sandbox
from protocol.errors import ConfigError, DataError, UnknownName
from protocol.registry import resolve

T = TypeVar("T")


class Options(BaseModel):
    """Options of `unit_tests` in the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    score: Literal["sparse", "soft"] = "sparse"
    """sparse: 1 if every test passes, else 0. soft: the share of tests passed."""
    fence: Literal["required", "optional"] = "required"
    """optional: a text without any fenced block is taken as the program itself."""
    max_tests: int = Field(default=15, ge=1)
    """The ones with the longest inputs are taken."""
    min_time_limit_s: float = Field(default=6.0, gt=0)
    """Processor seconds per test where the problem says less or nothing."""
    max_time_limit_s: float = Field(default=12.0, gt=0)
    """A problem's own limit counts up to here."""
    problem_budget_s: float = Field(default=60.0, gt=0)
    """Processor seconds of all tests of one completion; what is left over then fails as time_limit."""
    memory_limit_bytes: int = Field(default=1024 * MIB, ge=32 * MIB)
    """Where the problem says nothing."""
    output_limit_bytes: int = Field(default=16 * MIB, ge=4096)
    cells: int | None = Field(default=None, ge=1)
    """Programs that run at once; None is one per core."""

    @model_validator(mode="after")
    def _limits_in_order(self) -> Options:
        if self.min_time_limit_s > self.max_time_limit_s:
            raise ValueError(f"min_time_limit_s is {self.min_time_limit_s}, which is above max_time_limit_s {self.max_time_limit_s}")
        return self


class UnitTests:
    """Built once per reward actor; `score` may be called by several threads at once. Owns its sandbox until `close`."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Raises ConfigError for bad options and InfrastructureFault where no isolation can be had."""
        try:
            self._options = Options(**options)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "options"
            raise ConfigError(f"reward unit_tests, option {place!r}: {first['msg']}") from None
        self._languages: dict[str, Language] = {name: resolve(name, LANGUAGES, "language")() for name in LANGUAGES}
        trees = [tree for language in self._languages.values() if not language.missing() for tree in language.trees()]
        self.sandbox = Sandbox(self._options.cells, trees=trees)

    def score(self, sample: Sample) -> Score:
        """Raises DataError for a problem that cannot be judged and InfrastructureFault when the sandbox broke."""
        problem = parse_problem(sample.problem)
        language = self._language(problem)
        checker = _checker(problem)
        source = extract_program(sample.completion, language.fences, self._options.fence)
        if source is None:
            return Score(value=0.0, status="unparseable", detail=f"no fenced block of {problem.language}")
        if not isinstance(problem.form, tuple):
            return self._run_calls(source, problem, problem.form)
        try:
            program = language.prepare(source, self.sandbox)
        except CompileError as error:
            return Score(value=0.0, status="compile_error", detail=_first_error(error.execution.stderr))
        return self._run(program, problem, problem.form, checker)

    def close(self) -> None:
        """End every process of the sandbox."""
        self.sandbox.close()

    def _language(self, problem: Problem) -> Language:
        try:
            if problem.language not in self._languages:
                self._languages[problem.language] = resolve(problem.language, LANGUAGES, "language")()
        except UnknownName as error:
            raise DataError(f"problem {problem.problem_id!r}, field 'language': {error}") from None
        language = self._languages[problem.language]
        if missing := language.missing():
            raise DataError(f"problem {problem.problem_id!r}, field 'language': {missing}")
        return language

    def _limits(self, problem: Problem) -> Limits:
        options = self._options
        asked = problem.time_limit_s or options.min_time_limit_s
        return Limits(
            cpu_s=min(max(asked, options.min_time_limit_s), options.max_time_limit_s),
            memory_bytes=problem.memory_limit_bytes or options.memory_limit_bytes,
            output_bytes=options.output_limit_bytes,
        )

    def _run_calls(self, source: str, problem: Problem, form: Asserts | Cases) -> Score:
        """Put the program and its tests into two cells and let them talk."""
        if problem.language != "python":
            raise DataError(f"problem {problem.problem_id!r}, field 'language': {problem.language!r}, but its tests call Python")
        if problem.checker not in ("exact", "float"):
            raise DataError(
                f"problem {problem.problem_id!r}, field 'checker': {problem.checker!r} compares text; calls take exact or float"
            )
        candidate = Program(kind=wire.CALLS, content=assemble(source, form).encode(errors="surrogatepass"), arguments=_contest(form))
        tests, num_tests = self._call_tests(problem, form)
        limits = self._limits(problem)
        limits = dataclasses.replace(limits, cpu_s=min(limits.cpu_s * num_tests, self._options.problem_budget_s))
        verdicts, execution = judge_calls(self.sandbox.pool, candidate, tests, limits)
        failure = next(((verdict, why) for verdict, why in verdicts if verdict != "accepted"), None)
        detail = f"{failure[0]}: {failure[1]}" if failure else ""
        return self._total([verdict for verdict, _ in verdicts], num_tests, detail, execution.cpu_s, execution.peak_memory_bytes)

    def _call_tests(self, problem: Problem, form: Asserts | Cases) -> tuple[dict[str, Any], int]:
        stop = self._options.score == "sparse"
        if isinstance(form, Cases):
            cases = _longest(form.cases, lambda case: len(repr(case[0])), self._options.max_tests)
            tolerant = problem.checker == "float"
            return {"cases": cases, "function": form.function, "tolerant": tolerant, "stop": stop}, len(cases)
        chosen = _longest(form.tests, len, self._options.max_tests)
        return {"setup": form.setup, "tests": chosen, "remote": form.remote, "stop": stop}, len(chosen)

    def _run(self, program: Program, problem: Problem, form: tuple[Test, ...], checker: Checker) -> Score:
        """Run the chosen tests, shortest input first, for a wrong program usually fails on any."""
        tests = choose_tests(form, self._options.max_tests)
        limits = self._limits(problem)
        verdicts: list[str] = []
        detail = ""
        cpu_s = peak_bytes = 0.0

        def is_right(index: int, execution: Execution) -> bool:
            return not checker(execution.stdout, tests[index].output)

        with closing(self.sandbox.run_each(program, [test.input for test in tests], limits, is_right)) as executions:
            for number, (test, execution) in enumerate(zip(tests, executions, strict=True), 1):
                cpu_s += execution.cpu_s
                peak_bytes = max(peak_bytes, execution.peak_memory_bytes)
                verdict: str = execution.outcome
                why = _last_line(execution.stderr)
                if verdict == "ok":
                    why = checker(execution.stdout, test.output)
                    verdict = "wrong_answer" if why else "accepted"
                verdicts.append(verdict)
                if verdict != "accepted":
                    detail = detail or f"test {number} of {len(tests)}: {verdict}{': ' + why if why else ''}"
                    if self._options.score == "sparse":
                        break
                if cpu_s > self._options.problem_budget_s and len(verdicts) < len(tests):
                    detail = detail or f"budget of {self._options.problem_budget_s:g} s spent after {len(verdicts)} of {len(tests)} tests"
                    verdicts += ["time_limit"] * (len(tests) - len(verdicts))
                    break
        return self._total(verdicts, len(tests), detail, cpu_s, peak_bytes)

    def _total(self, verdicts: list[str], num_tests: int, detail: str, cpu_s: float, peak_bytes: float) -> Score:
        counts = Counter(verdicts)
        passed = counts["accepted"] == num_tests
        status = "accepted" if passed else next(verdict for verdict in verdicts if verdict != "accepted")
        metrics = {f"tests/{verdict}": float(count) for verdict, count in counts.items()}
        metrics |= {"tests/cpu_s": cpu_s / len(verdicts), "tests/peak_bytes": peak_bytes}
        value = float(passed) if self._options.score == "sparse" else counts["accepted"] / num_tests
        return Score(value=value, status=status, passed=passed, detail=detail, metrics=metrics)


def assemble(source: str, form: Asserts | Cases) -> str:
    """The program as it is run: after its prelude, or as the rest of the prelude's last function."""
    if isinstance(form, Cases) or not form.prelude:
        return source
    defines = re.search(rf"^(async\s+)?(def|class)\s+{form.continues_prelude}\b|^{form.continues_prelude}\s*=", source, re.MULTILINE)
    return f"{form.prelude}\n{source}" if defines else form.prelude + source


def _longest(tests: Sequence[T], length: Callable[[T], int], most: int) -> list[T]:
    """The `most` longest tests, in the data set's order, for one may build on another."""
    if len(tests) <= most:
        return list(tests)
    kept = sorted(range(len(tests)), key=lambda index: length(tests[index]))[-most:]
    return [tests[index] for index in sorted(kept)]


def _contest(form: Asserts | Cases) -> tuple[str, ...]:
    return ("contest",) if isinstance(form, Cases) or form.contest else ()


def choose_tests(tests: tuple[Test, ...], most: int) -> list[Test]:
    """The `most` tests with the longest inputs, shortest first; ties in the dataset's order."""
    return sorted(tests, key=lambda test: len(test.input))[-most:]


def _checker(problem: Problem) -> Checker:
    try:
        checker: Checker = resolve(problem.checker, CHECKERS, "checker")
    except UnknownName as error:
        raise DataError(f"problem {problem.problem_id!r}, field 'checker': {error}") from None
    return checker


def _first_error(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return next((line.strip()[:200] for line in lines if "error" in line), _last_line(stderr))


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else ""
