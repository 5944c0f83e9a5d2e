"""How a program is judged, form by form: streams, calls, interaction, subtasks. Each gives one `Judgement`.

Consumes: a problem and source text. Produces: a verdict for each test. Expected outputs stay in this process or in the cell of the
problem's own judging program.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from actors.rewards import cpp_asserts
from actors.rewards.problems import Asserts, Cases, CppAsserts, Interaction, JudgeProgram, Problem, Subtasks, Test
from actors.sandbox import Execution, Limits, wire
from actors.sandbox.checkers import CHECKERS, Checker
from actors.sandbox.checkers.programs import CONVENTIONS, CheckerFailed, Convention, check_output, equip, guarded, read_verdict
from actors.sandbox.conversation import Lines, judge_calls, run_communication, run_interactive, run_joined
from actors.sandbox.execution import Program
from actors.sandbox.languages import LANGUAGES, NO_FILES, CompileError, Language
from actors.sandbox.languages.cpp import FIFOS
from actors.sandbox.runner import Sandbox
from protocol.errors import UnknownName
from protocol.registry import resolve

T = TypeVar("T")
Check = Callable[[Test, Execution], str]
"""Empty when an output answers the test, else the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How much is tried."""

    stop: bool
    """At the first failure, because it decides the score."""
    max_tests: int
    budget_s: float


@dataclass(slots=True, kw_only=True)
class Judgement:
    """What is known about one program."""

    num_tests: int
    verdicts: list[str] = field(default_factory=list)
    """Of the tests that were reached."""
    detail: str = ""
    """The first failure."""
    cpu_s: float = 0.0
    peak_bytes: int = 0
    earned: float | None = None
    """Share of the points, where the problem has points."""

    def add(self, verdict: str, why: str, execution: Execution) -> bool:
        """Note one test; True when it was accepted."""
        self.verdicts.append(verdict)
        self.note(execution)
        if verdict != "accepted" and not self.detail:
            self.detail = f"test {len(self.verdicts)} of {self.num_tests}: {verdict}{': ' + why if why else ''}"
        return verdict == "accepted"

    def note(self, execution: Execution) -> None:
        """Count what an execution used."""
        self.cpu_s += execution.cpu_s
        self.peak_bytes = max(self.peak_bytes, execution.peak_memory_bytes)

    def give_up(self, verdict: str, why: str) -> None:
        """All remaining tests end as `verdict`."""
        self.detail = self.detail or why
        self.verdicts += [verdict] * (self.num_tests - len(self.verdicts))


class Bench:
    """The sandbox and its languages, with one method for each form of problem. Threads share it."""

    def __init__(self, cells: int | None, *, own_code: bool = True) -> None:
        """Without `own_code` problems name checkers and languages of rlsys alone: any other would be imported and called outside of the sandbox."""
        self._own_code = own_code
        self._languages: dict[str, Language] = {name: resolve(name, LANGUAGES, "language")() for name in LANGUAGES}
        trees = [tree for language in self._languages.values() if not language.missing() for tree in language.trees()]
        self.sandbox = Sandbox(cells, trees=trees)

    def language(self, name: str, problem: Problem, field_name: str = "language") -> Language:
        """The language called `name`. Raises DataError when it is unknown or cannot run here."""
        try:
            if name not in self._languages:
                self._languages[name] = self._resolve(name, LANGUAGES, "language")()
        except UnknownName as error:
            raise problem.error(field_name, str(error)) from None
        language = self._languages[name]
        if missing := language.missing():
            raise problem.error(field_name, missing)
        return language

    def _resolve(self, name: str, table: Mapping[str, str], what: str) -> Any:
        if name not in table and not self._own_code:
            raise UnknownName(f"{what} {name!r} is not known here. Known: {', '.join(sorted(table))}.")
        return resolve(name, table, what)

    def judge(self, source: str, problem: Problem, limits: Limits, rules: Rules) -> Judgement:
        """Raises DataError for a problem that cannot be judged, CompileError for a source that is no program, InfrastructureFault."""
        form = problem.form
        if isinstance(form, Asserts | Cases):
            return self._calls(source, problem, form, limits, rules)
        language = self.language(problem.language, problem)
        if isinstance(form, CppAsserts):
            return self._cpp_calls(source, language, problem, form, limits, rules)
        if isinstance(form, Subtasks):
            if form.files and not language.takes_files:
                raise problem.error("grader_files", f"{problem.language} cannot be compiled together with other files")
            if form.fifo_io and problem.language != "cpp":
                raise problem.error("user_io", f"fifo_io, which only cpp programs can open, not {problem.language}")
            program = language.prepare(source, self.sandbox, {**form.files, **FIFOS} if form.fifo_io else form.files)
            return self._subtasks(program, problem, form, limits, rules)
        program = language.prepare(source, self.sandbox)
        if isinstance(form, Interaction):
            return self._interaction(program, problem, form, limits, rules)
        check = self._check(problem)
        tests = choose_tests(form, rules.max_tests)
        return self._streams(program, tests, check, limits, rules)

    def _judge_program(self, judge: JudgeProgram, problem: Problem, field_name: str, files: Mapping[str, bytes] = NO_FILES) -> Program:
        """A judging program that came with the data."""
        try:
            return self.language(judge.language, problem, field_name).prepare(guarded(judge.source, judge.language), self.sandbox, files)
        except CompileError as error:
            raise problem.error(field_name, f"does not compile: {first_error(error.execution.stderr)}") from None

    def _check(self, problem: Problem) -> Check:
        """The problem's checker: a comparison or a program."""
        if problem.checker_program is not None:
            _convention(problem.checker, problem, "checker")
            program = self._judge_program(problem.checker_program, problem, "checker_source")

            def by_program(test: Test, execution: Execution) -> str:
                try:
                    return check_output(self.sandbox, program, problem.checker, test.input, execution.stdout, test.output)
                except CheckerFailed as error:
                    raise problem.error("checker_source", f"the checker failed: {error}") from None

            return by_program
        try:
            compare: Checker = self._resolve(problem.checker, CHECKERS, "checker")
        except UnknownName as error:
            raise problem.error("checker", str(error)) from None
        return lambda test, execution: compare(execution.stdout, test.output)

    def _streams(self, program: Program, tests: Sequence[Test], check: Check, limits: Limits, rules: Rules) -> Judgement:
        """Run the tests in order, shortest input first, for a wrong program usually fails on any."""
        judgement = Judgement(num_tests=len(tests))
        right: set[int] = set()

        def is_right(index: int, execution: Execution) -> bool:
            if not check(tests[index], execution):
                right.add(index)
            return index in right

        with closing(self.sandbox.run_each(program, [test.input for test in tests], limits, is_right)) as executions:
            for index, (test, execution) in enumerate(zip(tests, executions, strict=True)):
                verdict: str = execution.outcome
                why = last_line(execution.stderr)
                if verdict == "ok":
                    why = "" if index in right else check(test, execution)
                    verdict = "wrong_answer" if why else "accepted"
                if not judgement.add(verdict, why, execution) and rules.stop:
                    break
                if judgement.cpu_s > rules.budget_s:
                    judgement.give_up(
                        "time_limit", f"budget of {rules.budget_s:g} s spent after {len(judgement.verdicts)} of {len(tests)} tests"
                    )
                    break
        return judgement

    def _calls(self, source: str, problem: Problem, form: Asserts | Cases, limits: Limits, rules: Rules) -> Judgement:
        """Put the program and its tests into two cells and let them talk."""
        if problem.language != "python":
            raise problem.error("language", f"{problem.language!r}, but its tests call Python")
        if problem.checker not in ("exact", "float") or problem.checker_program is not None:
            raise problem.error("checker", f"{problem.checker!r} compares text; calls take exact or float")
        candidate = Program(kind=wire.CALLS, content=assemble(source, form).encode(errors="surrogatepass"), arguments=_contest(form))
        tests: dict[str, Any] = {"stop": rules.stop}
        if isinstance(form, Cases):
            chosen: Sequence[Any] = _longest(form.cases, lambda case: len(repr(case[0])), rules.max_tests)
            tests |= {"cases": chosen, "function": form.function, "tolerant": problem.checker == "float"}
        else:
            chosen = form.tests if form.indivisible else _longest(form.tests, len, rules.max_tests)
            tests |= {"setup": form.setup, "tests": chosen, "remote": form.remote}
        num_limits = 1 if isinstance(form, Asserts) and form.indivisible else len(chosen)
        limits = dataclasses.replace(limits, cpu_s=min(limits.cpu_s * num_limits, rules.budget_s))
        verdicts, execution = judge_calls(self.sandbox.pool, candidate, tests, limits)
        judgement = Judgement(num_tests=len(chosen))
        judgement.note(execution)
        for verdict, why in verdicts:
            judgement.add(verdict, why, Execution(outcome="ok"))
        return judgement

    def _cpp_calls(self, source: str, language: Language, problem: Problem, form: CppAsserts, limits: Limits, rules: Rules) -> Judgement:
        try:
            tests = language.prepare(cpp_asserts.tests_source(form.prompt, form.tests, rules.stop), self.sandbox, cpp_asserts.HEADER)
        except CompileError as error:
            raise problem.error("tests", f"do not compile: {first_error(error.execution.stderr)}") from None
        program = language.prepare(cpp_asserts.judged_source(form.prompt, source, form.function), self.sandbox, cpp_asserts.HEADER)
        execution, judging = run_joined(self.sandbox.pool, program, tests, limits)
        marks = judging.stdout.decode(errors="replace")
        judgement = Judgement(num_tests=max(1, cpp_asserts.num_asserts(form.tests), len(marks) + (judging.outcome != "ok")))
        judgement.note(execution)
        for mark in marks:
            passed = mark == cpp_asserts.PASSED
            judgement.add("accepted" if passed else "wrong_answer", "" if passed else "an assert failed", Execution(outcome="ok"))
        if judging.outcome == "ok":
            judgement.verdicts += ["accepted"] * (judgement.num_tests - len(marks))  # asserts that its main does not reach
        elif judging.exit_code == cpp_asserts.GONE:
            verdict = "runtime_error" if execution.outcome in ("ok", "runtime_error") else execution.outcome
            judgement.give_up(verdict, last_line(execution.stderr) or "the program ended before it answered")
        elif judging.exit_code != cpp_asserts.FAILED or cpp_asserts.PASSED * len(marks) == marks:
            judgement.give_up(judging.outcome, last_line(judging.stderr))
        return judgement

    def _interaction(self, program: Program, problem: Problem, form: Interaction, limits: Limits, rules: Rules) -> Judgement:
        convention = _convention(form.convention, problem, "interactor_convention")
        interactor = self._judge_program(form.interactor, problem, "interactor_source")
        tests = choose_tests(form.tests, rules.max_tests)
        judgement = Judgement(num_tests=len(tests))
        for test in tests:
            equipped = equip(interactor, convention, {"input": test.input, "answer": test.output})
            execution, judging, ended_first = run_interactive(self.sandbox.pool, program, equipped, limits)
            try:
                verdict, why = _interactive_verdict(execution, read_verdict(judging, convention), ended_first)
            except CheckerFailed as error:
                if execution.outcome == "ok":
                    raise problem.error("interactor_source", f"the interactor failed: {error}") from None
                verdict, why = execution.outcome, last_line(execution.stderr)
            if not judgement.add(verdict, why, execution) and rules.stop:
                break
        return judgement

    def _subtasks(self, program: Program, problem: Problem, form: Subtasks, limits: Limits, rules: Rules) -> Judgement:
        """Points of a subtask count when all its tests pass. Sources: ioinformatics.org, contest rules."""
        check = self._check(problem)
        judgement = Judgement(num_tests=sum(len(tests) for _, tests in form.subtasks))
        earned = 0.0
        for points, tests in form.subtasks:
            one_fails_all = dataclasses.replace(rules, stop=True)
            manager = form.manager
            if manager is None:
                part = self._streams(program, sorted(tests, key=lambda test: len(test.input)), check, limits, one_fails_all)
            else:
                has_paths = manager.language == "cpp"
                judging = self._judge_program(manager, problem, "manager_source", FIFOS if has_paths else NO_FILES)
                lines = Lines(num_processes=form.num_processes, manager_paths=has_paths, process_paths=form.fifo_io)
                part = self._communication(program, judging, tests, lines, problem, limits)
            earned += points * (part.verdicts == ["accepted"] * len(tests))
            judgement.verdicts += part.verdicts
            judgement.detail = judgement.detail or part.detail
            judgement.cpu_s += part.cpu_s
            judgement.peak_bytes = max(judgement.peak_bytes, part.peak_bytes)
        judgement.earned = earned / sum(points for points, _ in form.subtasks)
        judgement.num_tests = max(judgement.num_tests, len(judgement.verdicts))
        return judgement

    def _communication(
        self, program: Program, manager: Program, tests: Sequence[Test], lines: Lines, problem: Problem, limits: Limits
    ) -> Judgement:
        judgement = Judgement(num_tests=len(tests))
        for test in tests:
            executions, managing, num_early = run_communication(self.sandbox.pool, program, manager, lines, test.input, limits)
            limited = [execution for execution in executions if execution.outcome not in ("ok", "runtime_error")]
            crashed = [execution for execution in executions[:num_early] if execution.outcome == "runtime_error"]
            worst = [*limited, *crashed, *executions][0]
            try:
                share = float(managing.stdout)
            except ValueError:
                if worst.outcome == "ok":
                    raise problem.error("manager_source", f"the manager printed no score: {managing}") from None
                share = 0.0
            if limited or crashed:
                verdict, why = str(worst.outcome), last_line(worst.stderr)
            else:
                verdict, why = ("accepted", "") if share >= 1 else ("wrong_answer", last_line(managing.stderr))
            if not judgement.add(verdict, why, worst):
                break
        return judgement


def _convention(name: str, problem: Problem, field_name: str) -> Convention:
    if name not in CONVENTIONS:
        raise problem.error(field_name, f"{name!r}, expected one of {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def _interactive_verdict(execution: Execution, refusal: str, ended_first: bool) -> tuple[str, str]:
    """Who is to blame: a limit comes before all, a crash before a refusal only if it came first."""
    if execution.outcome not in ("ok", "runtime_error"):
        return execution.outcome, ""
    if execution.outcome == "runtime_error" and (ended_first or not refusal):
        return "runtime_error", last_line(execution.stderr)
    return ("wrong_answer", refusal) if refusal else ("accepted", "")


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


def first_error(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return next((line.strip()[:200] for line in lines if "error" in line), last_line(stderr))


def last_line(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else ""
