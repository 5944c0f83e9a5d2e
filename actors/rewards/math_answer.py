"""The mathematics reward: is the final answer of a completion the reference?

Consumes: a problem with its reference answer, and a completion that ends in `\\boxed{...}` or `#### ...`. Produces: right or wrong, with
terms for a think block. Waits for: its own processes (`math_workers.py`), and only where the two texts differ in more than spelling.

| layout | field with the reference |
|---|---|
| rlsys, DeepScaleR, MATH-500, AIME, AMC | `answer`: text or number, or a list of which any will do |
| GSM8K | `answer`: a solution that ends in `#### 1,234` |
| MATH | `solution`: a text with `\\boxed{...}`, where there is no `answer` |

In a configuration: `rewarders: {reward: math_answer, options: {scale: plus_minus_one, think: written, think_penalty: 0.5}}`.

Sources: Klear-Reasoner (1 / -1 and a penalty for a missing think block), R1-Code-Interpreter (+0.1 / -0.1 for the format),
DeepScaleR (1 / 0, by normalised text and by sympy). Limits: units are dropped, not converted; letters are compared without case.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from actors.rewards import Sample, Score
from actors.rewards.math_text import are_other_integers, final_answer, has_think_block, is_words, key, readings, tidy
from actors.rewards.math_workers import MathWorkers
from actors.rewards.options import parse_options
from protocol.errors import DataError
from protocol.settings import Settings

_MIB = 1 << 20
_LONGEST_REFERENCE = 20_000


class Options(Settings):
    """Options of `math_answer` in the configuration."""

    scale: Literal["zero_one", "plus_minus_one"] = "zero_one"
    """A wrong answer is worth 0 or -1, a right one 1."""
    forms: Literal["any", "boxed", "hashes"] = "any"
    """Where the answer may stand: the last \\boxed{}, else the last line `#### answer`; or only one of them."""
    think: Literal["off", "written", "opened_by_prompt"] = "off"
    """Whether a think block is looked for; opened_by_prompt: the prompt already ends with its opening tag."""
    think_bonus: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Added where the think block is right."""
    think_penalty: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Subtracted where it is not."""
    on_timeout: Literal["wrong", "missing"] = "wrong"
    """What a comparison that passes its time or memory limit is worth: the model's text caused it, so it is wrong by default."""
    time_limit_s: float = Field(default=5.0, gt=0, le=600)
    """Processor seconds of one comparison."""
    memory_limit_bytes: int = Field(default=1024 * _MIB, ge=128 * _MIB)
    """Address space of one process."""
    max_answer_chars: int = Field(default=1000, ge=1, le=_LONGEST_REFERENCE)
    """A longer answer is unparseable."""
    workers: int | None = Field(default=None, ge=1)
    """Processes that compare at once; None is one per core."""

    @model_validator(mode="after")
    def _terms_need_a_block(self) -> Options:
        if self.think == "off" and (self.think_bonus or self.think_penalty):
            raise ValueError("think_bonus and think_penalty need think: written or opened_by_prompt, found off")
        return self


class MathAnswer:
    """Built once per reward actor; `score` may be called by several threads at once. Owns its processes until `close`."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Raises ConfigError for bad options."""
        self._options = parse_options(Options, "math_answer", options)
        num_workers = self._options.workers or len(os.sched_getaffinity(0))
        self.workers = MathWorkers(num_workers, self._options.time_limit_s, self._options.memory_limit_bytes)

    def score(self, sample: Sample) -> Score:
        """Raises DataError for a problem without a usable reference and InfrastructureFault when a process broke twice."""
        references = parse_references(sample.problem)
        answer = final_answer(sample.completion, self._options.forms, self._options.max_answer_chars)
        if answer is None:
            return self._total(
                sample, "unparseable", f"no closed \\boxed{{}} or #### answer of at most {self._options.max_answer_chars} characters"
            )
        status, why = self._compare(references, answer)
        return self._total(sample, status, why or f"answer {answer[:80]!r}, expected {references[0][:80]!r}")

    def close(self) -> None:
        """End every process of the reward."""
        self.workers.close()

    def _compare(self, references: list[str], answer: str) -> tuple[str, str]:
        """(status, why): first by spelling, then by computer algebra."""
        given, wanted = tidy(answer), [tidy(reference) for reference in references]
        if key(given) in {key(reference) for reference in wanted} - {""}:
            return "accepted", ""
        if not given:
            return "unparseable", "the answer is empty"
        symbolic = [reference for reference in wanted if not is_words(reference) and not are_other_integers(reference, given)]
        if not symbolic or is_words(given):
            return "wrong_answer", ""
        for reference in symbolic:
            verdict = self.workers.ask(readings(reference, given), readings(given, reference))
            if verdict.verdict != "different":
                break
        status = {"equal": "accepted", "different": "wrong_answer", "unreadable": "unparseable"}.get(verdict.verdict, verdict.verdict)
        return status, verdict.detail

    def _total(self, sample: Sample, status: str, detail: str) -> Score:
        options = self._options
        detail = detail.encode(errors="replace").decode()  # half surrogate pairs do not travel
        passed = status == "accepted"
        if status in ("time_limit", "memory_limit") and options.on_timeout == "missing":
            return Score(value=None, status=status, detail=detail)
        value = 1.0 if passed else -1.0 if options.scale == "plus_minus_one" else 0.0
        metrics = {}
        if options.think != "off":
            thought = has_think_block(sample.completion, options.think == "opened_by_prompt")
            value += options.think_bonus if thought else -options.think_penalty
            metrics["math/think_block"] = float(thought)
        return Score(value=value, status=status, passed=passed, detail=detail, metrics=metrics)


def parse_references(problem: Mapping[str, Any]) -> list[str]:
    """The reference answers of a dataset line. Raises DataError that names problem and field."""
    problem_id = problem.get("id", problem.get("unique_id", "without id"))
    field = "answer" if problem.get("answer") is not None else "solution"
    found = problem.get(field)
    references = []
    for value in found if isinstance(found, list) else [found]:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise DataError(f"problem {problem_id!r}, field {field!r}: {value!r:.80}, expected a text or a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"problem {problem_id!r}, field {field!r}: {value}, expected a finite number")
        references.append(_reference(value, solution=field == "solution"))
    if not references or not all(0 < len(reference) <= _LONGEST_REFERENCE for reference in references):
        raise DataError(f"problem {problem_id!r}, field {field!r}: {found!r:.80} holds no answer of 1 to {_LONGEST_REFERENCE} characters")
    return references


def _reference(value: str | int | float, solution: bool) -> str:
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    text = str(value)
    if solution or "####" in text or "\\boxed" in text:
        return final_answer(text, "any", _LONGEST_REFERENCE) or ""
    return text.strip()
