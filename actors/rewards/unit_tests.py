"""The unit-test reward: run the program that a completion holds on the problem's tests.

Consumes: a problem (see `problems.py`) and a completion. Produces: the share of tests passed, or all or nothing, with the verdict
of the first test that failed. Waits for: cells of its own sandbox. Expected outputs never leave this process.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.rewards import Sample, Score
from actors.rewards.fences import extract_program
from actors.rewards.judging import Bench, Judgement, Rules, first_error
from actors.rewards.options import parse_options
from actors.rewards.problems import Problem, parse_problem
from actors.sandbox import MIB, Limits
from actors.sandbox.languages import CompileError

_PROBLEMS_KEPT = 64  # parsed; a reward actor works on a few groups at a time


class JudgingOptions(BaseModel):
    """How a completion is judged, wherever that is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    score: Literal["sparse", "soft"] = "sparse"
    """sparse: 1 if every test passes, else 0. soft: the share of tests passed, or of points where the problem has subtasks."""
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

    @model_validator(mode="after")
    def _limits_in_order(self) -> Self:
        if self.min_time_limit_s > self.max_time_limit_s:
            raise ValueError(f"min_time_limit_s is {self.min_time_limit_s}, which is above max_time_limit_s {self.max_time_limit_s}")
        return self


class Options(JudgingOptions):
    """Options of `unit_tests` in the configuration."""

    cells: int | None = Field(default=None, ge=1)
    """Programs that run at once; None is one per core."""


class UnitTests:
    """Built once per reward actor; `score` may be called by several threads at once. Owns its sandbox until `close`."""

    def __init__(self, options: Mapping[str, Any], bench: Bench | None = None) -> None:
        """With a `bench` of the caller's no sandbox is made and `cells` means nothing.

        Raises ConfigError for bad options and InfrastructureFault where no isolation can be had.
        """
        self._options = parse_options(Options, "unit_tests", options)
        self._owns = bench is None
        self._bench = bench or Bench(self._options.cells)
        self.sandbox = self._bench.sandbox
        self._problems: dict[str, tuple[Mapping[str, Any], Problem]] = {}
        self._lock = threading.Lock()
        self._rules = Rules(
            stop=self._options.score == "sparse", max_tests=self._options.max_tests, budget_s=self._options.problem_budget_s
        )

    def score(self, sample: Sample) -> Score:
        """Raises DataError for a problem that cannot be judged and InfrastructureFault when the sandbox broke."""
        problem = self._parsed(sample.problem)
        language = self._bench.language(problem.language, problem)
        source = extract_program(sample.completion, language.fences, self._options.fence)
        if source is None:
            return Score(value=0.0, status="unparseable", detail=f"no fenced block of {problem.language}")
        return self._judge(source, problem)

    def score_program(self, source: str, line: Mapping[str, Any]) -> Score:
        """The score of a program as it stands, without fences around it. Raises as `score` does."""
        problem = self._parsed(line)
        self._bench.language(problem.language, problem)
        return self._judge(source, problem)

    def _judge(self, source: str, problem: Problem) -> Score:
        try:
            judgement = self._bench.judge(source, problem, self._limits(problem), self._rules)
        except CompileError as error:
            return Score(value=0.0, status="compile_error", detail=first_error(error.execution.stderr))
        return self._total(judgement)

    def close(self) -> None:
        """End every process of the sandbox, if it is its own."""
        if self._owns:
            self.sandbox.close()

    def _parsed(self, line: Mapping[str, Any]) -> Problem:
        """The problem of a line, kept for the other samples of its group. Raises DataError."""
        name = str(line.get("id", line.get("task_id")))
        with self._lock:
            kept = self._problems.get(name)
        if kept is None or kept[0] != line:
            kept = (line, parse_problem(line))
            with self._lock:
                self._problems[name] = kept
                if len(self._problems) > _PROBLEMS_KEPT:
                    del self._problems[next(iter(self._problems))]
        return kept[1]

    def _limits(self, problem: Problem) -> Limits:
        options = self._options
        asked = problem.time_limit_s or options.min_time_limit_s
        return Limits(
            cpu_s=min(max(asked, options.min_time_limit_s), options.max_time_limit_s),
            memory_bytes=problem.memory_limit_bytes or options.memory_limit_bytes,
            output_bytes=options.output_limit_bytes,
        )

    def _total(self, judgement: Judgement) -> Score:
        counts = Counter(judgement.verdicts)
        passed = counts["accepted"] == judgement.num_tests
        status = "accepted" if passed else next(verdict for verdict in judgement.verdicts if verdict != "accepted")
        metrics = {f"tests/{verdict}": float(count) for verdict, count in counts.items()}
        metrics |= {"tests/cpu_s": judgement.cpu_s / len(judgement.verdicts), "tests/peak_bytes": float(judgement.peak_bytes)}
        value = float(passed)
        if self._options.score == "soft":
            value = counts["accepted"] / judgement.num_tests if judgement.earned is None else judgement.earned
        return Score(value=value, status=status, passed=passed, detail=judgement.detail, metrics=metrics)
