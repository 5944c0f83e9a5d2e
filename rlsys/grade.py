"""`rlsys grade PROBLEMS SUBMISSIONS`: the rewards as a command of their own, with the same isolation as in training."""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from actors.rewards import REWARDS, Reward, Sample, Score
from actors.rewards.answers import sound
from protocol.errors import ConfigError, DataError, InfrastructureFault
from protocol.registry import resolve

ID_FIELDS = ("id", "task_id", "question_id", "problem_id")
TEXT_FIELDS = ("completion", "submission", "solution", "code")
RETRIES = 2
_REASONS_SHOWN = 20  # all stand in --out and --json


@dataclass(frozen=True, slots=True)
class Submission:
    """One text to grade, and where it stands."""

    problem_id: str
    text: str
    where: str


def read_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, object) of a JSON-lines file or a JSON list, plain or gzipped. Raises DataError that names file and line."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if text.lstrip().startswith("["):
        try:
            records = [(f"{path}, item {i}", record) for i, record in enumerate(json.loads(text))]
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    else:
        records = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    records.append((f"{path}, line {number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
    for where, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{where}: a JSON {type(record).__name__}, expected an object")
        yield where, record


def read_problems(path: Path) -> dict[str, Mapping[str, Any]]:
    """Problems by id; those without one are numbered from 0 in the order of the file."""
    problems: dict[str, Mapping[str, Any]] = {}
    for number, (where, record) in enumerate(read_records(path)):
        key = _id_of(record) or str(number)
        if key in problems:
            raise DataError(f"{where}: id {key!r} stands in the file already")
        problems[key] = record
    if not problems:
        raise DataError(f"{path}: holds no problem")
    return problems


def read_submissions(path: Path, problems: Mapping[str, Any]) -> list[Submission]:
    """Submissions, each of a known problem; without an id they are matched by their order."""
    submissions = []
    for number, (where, record) in enumerate(read_records(path)):
        key = _id_of(record) or str(number)
        if key not in problems:
            raise DataError(f"{where}: no problem has the id {key!r}")
        text = next((record[field] for field in TEXT_FIELDS if isinstance(record.get(field), str)), None)
        if text is None:
            raise DataError(f"{where}: none of the fields {', '.join(TEXT_FIELDS)} holds a text")
        submissions.append(Submission(key, text, where))
    if not submissions:
        raise DataError(f"{path}: holds no submission")
    return submissions


def _id_of(record: Mapping[str, Any]) -> str | None:
    return next((str(record[field]) for field in ID_FIELDS if record.get(field) is not None), None)


def grade(
    problems_path: Path, submissions_path: Path, *, reward: str, options: Sequence[str], jobs: int | None, as_json: bool, out: Path | None
) -> int:
    """Score every submission; a table of verdicts and pass@1, or JSON lines. Exit code 1 if any score could not be found."""
    problems = read_problems(problems_path)
    submissions = read_submissions(submissions_path, problems)
    parsed = _options(options)
    workers = jobs or os.cpu_count() or 1
    if reward == "unit_tests":
        parsed = {"fence": "optional", "cells": workers, **parsed}
    scorer: Reward = resolve(reward, REWARDS, "reward")(parsed)
    started = time.monotonic()
    results: list[tuple[Submission, Score]] = []
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(_score, scorer, problems[s.problem_id], s): s for s in submissions}
        for future in as_completed(futures):
            results.append((futures[future], future.result()))
            _progress(len(results), len(submissions), started)
    finally:  # an interrupt or a bug of the reward waits for nothing that has not begun, and ends what has
        pool.shutdown(wait=False, cancel_futures=True)
        scorer.close()
        pool.shutdown()
    order = {id(s): i for i, s in enumerate(submissions)}
    results.sort(key=lambda result: order[id(result[0])])
    records = [
        {"id": s.problem_id, "value": score.value, "passed": score.passed, "status": score.status, "detail": score.detail, **score.metrics}
        for s, score in results
    ]
    if out is not None:
        out.write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = summarise(records, time.monotonic() - started)
    for reason, count in Counter(record["detail"] for record in records if record["value"] is None).most_common(_REASONS_SHOWN):
        print(f"without a score, {count}x: {reason}", file=sys.stderr)
    if as_json:
        print(json.dumps({**summary, "results": records}))
    else:
        print("\n".join(table(summary)))
    return 1 if summary["unscored"] else 0


def _score(scorer: Reward, problem: Mapping[str, Any], submission: Submission) -> Score:
    for _ in range(RETRIES + 1):
        try:
            return sound(scorer.score(Sample(problem=problem, completion=submission.text, truncated=False)), type(scorer).__name__)
        except InfrastructureFault as fault:
            reason = str(fault)
        except DataError as error:
            return Score(value=None, status="bad_problem", detail=str(error))
    return Score(value=None, status="failed", detail=reason)


def summarise(records: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """Counts by verdict; pass@1 is the mean over problems of the share of scored submissions that passed."""
    scored = [r for r in records if r["value"] is not None]
    by_problem: dict[str, list[bool]] = {}
    for record in scored:
        by_problem.setdefault(record["id"], []).append(record["passed"])
    shares = [sum(passed) / len(passed) for passed in by_problem.values()]
    return {
        "submissions": len(records),
        "problems": len({r["id"] for r in records}),
        "verdicts": dict(Counter(r["status"] for r in records).most_common()),
        "unscored": len(records) - len(scored),
        "mean_value": sum(r["value"] for r in scored) / len(scored) if scored else None,
        "pass_at_1": sum(shares) / len(shares) if shares else None,
        "seconds": round(seconds, 2),
    }


def table(summary: Mapping[str, Any]) -> list[str]:
    """The summary for people."""
    lines = [f"{count:8}  {status}" for status, count in summary["verdicts"].items()]
    lines.append(f"{summary['submissions']:8}  submissions of {summary['problems']} problems in {summary['seconds']:.1f} s")
    if summary["pass_at_1"] is not None:
        lines.append(f"{summary['pass_at_1']:8.4f}  pass@1, mean score {summary['mean_value']:.4f}")
    if summary["unscored"]:
        lines.append(f"{summary['unscored']:8}  without a score (a fault of ours or of the problem; never counted as 0)")
    return lines


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--option {pair}: expected KEY=VALUE, such as score=soft")
        options[key] = yaml.safe_load(value)
    return options


def _progress(done: int, total: int, started: float) -> None:
    if sys.stderr.isatty() or done == total or done % 200 == 0:
        left = (time.monotonic() - started) / done * (total - done)
        end = "\r" if sys.stderr.isatty() and done < total else "\n"
        print(f"graded {done} of {total}, {left:.0f} s left   ", end=end, file=sys.stderr, flush=True)
