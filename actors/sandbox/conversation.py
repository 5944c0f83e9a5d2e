"""Two jobs that talk to each other, each in a cell of its own: judged code, and the judge that has the secrets.

The judge decides; the judged side only has to stay alive. Both ends of the line belong to the jobs alone, so each sees the other
end close when it is gone, and neither can outlive the conversation.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.sandbox import Execution, Limits, wire
from actors.sandbox.cell import Cell, CellError, memory_file
from actors.sandbox.execution import Program, Running, is_suspect
from actors.sandbox.pool import CellPool
from actors.sandbox.waiting import readable

LEAVING_S = 2.0
"""How long the judged side may take to end after the judge did; its own end may be slow but changes nothing."""
_JUDGE_LIMITS = Limits(cpu_s=60, memory_bytes=2 << 30)
_LONGEST_REPORT_BYTES = 4 << 20

Verdict = tuple[str, str]
"""accepted, wrong_answer, ... and the reason in one line."""


def judge_calls(pool: CellPool, candidate: Program, tests: dict[str, Any], limits: Limits) -> tuple[list[Verdict], Execution]:
    """Run the tests of a call problem (`asserts.py` has their form) against `candidate`, a program of kind CALLS.

    Returns a verdict for each test that was reached. Raises InfrastructureFault when it failed twice for a reason of ours.
    """
    judge = Program(kind=wire.ASSERTS, content=json.dumps(tests).encode())
    with pool.lease(2) as cells:
        try:
            verdicts, execution, suspect = _judge_once(cells, candidate, judge, limits)
            if not suspect:
                return verdicts, execution
        except CellError:
            for cell in list(cells):
                pool.replace(cells, cell)
        return _judge_once(cells, candidate, judge, limits)[:2]


def _judge_once(cells: Sequence[Cell], candidate: Program, judge: Program, limits: Limits) -> tuple[list[Verdict], Execution, bool]:
    """The verdicts, the judged side's execution, and whether its end may be the machine's fault."""
    report = memory_file()
    try:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            judged = Running(cells[0], candidate, b"", limits, extras=[theirs.fileno()])
            patience = dataclasses.replace(_JUDGE_LIMITS, wall_s=limits.wall + 30)
            judging = Running(cells[1], judge, b"", patience, extras=[ours.fileno(), report])
        execution, judgement, _, suspect = converse(judged, judging, limits)
        text = os.pread(report, _LONGEST_REPORT_BYTES, 0)
    finally:
        os.close(report)
    if not text:  # only what the judged side answered can have broken the judge: it is the one part that varies
        return (
            [(judgement.outcome if judgement.outcome != "ok" else "runtime_error", "its answers could not be judged")],
            execution,
            suspect,
        )
    verdicts = [(str(verdict), str(reason)) for verdict, reason in json.loads(text)]
    if verdicts and verdicts[-1][0] == "gone":
        verdicts[-1] = _why_gone(execution, verdicts[-1][1])
    return verdicts, execution, suspect


def run_joined(pool: CellPool, candidate: Program, judge: Program, limits: Limits) -> tuple[Execution, Execution]:
    """Let two programs share a socket, which both have as descriptor 3. Returns both executions. Raises InfrastructureFault."""
    with pool.lease(2) as cells:
        try:
            judged, judging, suspect = _join_once(cells, candidate, judge, limits)
            if not suspect:
                return judged, judging
        except CellError:
            for cell in list(cells):
                pool.replace(cells, cell)
        return _join_once(cells, candidate, judge, limits)[:2]


def _join_once(cells: Sequence[Cell], candidate: Program, judge: Program, limits: Limits) -> tuple[Execution, Execution, bool]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        judged = Running(cells[0], candidate, b"", limits, extras=[theirs.fileno()])
        patience = dataclasses.replace(_JUDGE_LIMITS, wall_s=limits.wall + 30)
        judging = Running(cells[1], judge, b"", patience, extras=[ours.fileno()])
    execution, judgement, _, suspect = converse(judged, judging, limits)
    return execution, judgement, suspect


def run_interactive(pool: CellPool, candidate: Program, interactor: Program, limits: Limits) -> tuple[Execution, Execution, bool]:
    """Let a program talk to its interactor: each one's stdout is the other's stdin. One that was ended because it stayed too long after the
    interactor, with processor time left, may have been held up by the machine: it runs once more.

    Returns the program's execution, the interactor's, and whether the program ended first. Raises InfrastructureFault.
    """
    with pool.lease(2) as cells:
        try:
            judged, judging, first, suspect = _interact_once(cells, candidate, interactor, limits)
            if not suspect:
                return judged, judging, first
        except CellError:
            for cell in list(cells):
                pool.replace(cells, cell)
        return _interact_once(cells, candidate, interactor, limits)[:3]


def _interact_once(
    cells: Sequence[Cell], candidate: Program, interactor: Program, limits: Limits
) -> tuple[Execution, Execution, bool, bool]:
    pipes = [*os.pipe(), *os.pipe()]
    try:
        judged = Running(cells[0], candidate, pipes[0], limits, stdout=pipes[3])
        patience = dataclasses.replace(_JUDGE_LIMITS, wall_s=limits.wall + 30)
        judging = Running(cells[1], interactor, pipes[2], patience, stdout=pipes[1])
    finally:
        for end in pipes:
            os.close(end)
    execution, judgement, first, suspect = converse(judged, judging, limits)
    return execution, judgement, first, suspect or (execution.exit_code == -signal.SIGKILL and execution.cpu_s < limits.cpu_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """How the programs of a communication task are called, as graders of the International Olympiad in Informatics expect it.

    Source of the order: Contest Management System, task type Communication. Of each pair the caller reads the first and writes the second.
    """

    num_processes: int
    manager_paths: bool
    """Whether the manager gets paths (programs that contain `languages/fifos.cpp`) or descriptor numbers."""
    process_paths: bool = False
    """Whether the processes get paths before their index and keep stdin and stdout to themselves; else these are the lines."""

    def of_manager(self) -> tuple[str, ...]:
        """Its arguments: for each process the line from it and the line to it."""
        return tuple(f"/dev/fd/{3 + number}" if self.manager_paths else str(3 + number) for number in range(2 * self.num_processes))

    def of_process(self, index: int) -> tuple[str, ...]:
        """Its arguments."""
        return (*(("/dev/fd/3", "/dev/fd/4") if self.process_paths else ()), str(index))


def run_communication(
    pool: CellPool, candidate: Program, manager: Program, lines: Lines, test_input: bytes, limits: Limits
) -> tuple[list[Execution], Execution, int]:
    """Let a manager talk to the processes of one program, each in a cell of its own.

    The manager reads the test from stdin and prints its score (0 to 1). Returns the executions of the processes, those that ended
    before the manager first, that of the manager, and how many ended before it. Raises InfrastructureFault.
    """
    with pool.lease(lines.num_processes + 1) as cells:
        try:
            executions, managing, num_early, suspect = _communicate_once(cells, candidate, manager, lines, test_input, limits)
            if not suspect:
                return executions, managing, num_early
        except CellError:
            for cell in list(cells):
                pool.replace(cells, cell)
        return _communicate_once(cells, candidate, manager, lines, test_input, limits)[:3]


def _communicate_once(
    cells: Sequence[Cell], candidate: Program, manager: Program, lines: Lines, test_input: bytes, limits: Limits
) -> tuple[list[Execution], Execution, int, bool]:
    pipes = [(*os.pipe(), *os.pipe()) for _ in range(lines.num_processes)]
    processes: list[Running] = []
    try:
        for index, (reads, _, _, writes) in enumerate(pipes):
            program = dataclasses.replace(candidate, arguments=lines.of_process(index))
            if lines.process_paths:
                processes.append(Running(cells[index + 1], program, b"", limits, extras=(reads, writes)))
            else:
                processes.append(Running(cells[index + 1], program, reads, limits, stdout=writes))
        extras = [end for _, to_process, from_process, _ in pipes for end in (from_process, to_process)]
        called = dataclasses.replace(manager, arguments=lines.of_manager())
        patience = dataclasses.replace(_JUDGE_LIMITS, wall_s=limits.wall + 30)
        managing = Running(cells[0], called, test_input, patience, extras=extras)
    finally:
        for end in (end for four in pipes for end in four):
            os.close(end)
    waiting: list[Running] = [managing, *processes]
    while managing in waiting:
        ready = readable(waiting, limits.wall + 60)
        if not ready:
            raise CellError("neither the manager nor the processes ended in time")
        waiting = [job for job in waiting if job not in ready]
    if waiting:
        readable(waiting, LEAVING_S)
    for job in processes:
        if not readable([job], 0.0):
            job.cell.end_job()
    managed, its_end = managing.collect()
    ended = sorted((job.collect() for job in processes), key=lambda end: end[1].ended_us >= its_end.ended_us)
    num_early = sum(report.ended_us < its_end.ended_us for _, report in ended)
    return [execution for execution, _ in ended], managed, num_early, any(is_suspect(*end, limits) for end in ended)


def converse(judged: Running, judging: Running, limits: Limits) -> tuple[Execution, Execution, bool, bool]:
    """Wait for both jobs to end; the judged side is ended soon after the judge.

    Returns both executions, whether the judged one ended first (by the cells' clocks: on a busy machine both ends may be heard of at once),
    and whether it may have been cut by the machine's fault. Raises CellError when a cell broke.
    """
    try:
        waiting = [judged, judging]
        while judging in waiting:
            ready = readable(waiting, limits.wall + 60)
            if not ready:
                raise CellError("neither the judged program nor its judge ended in time")
            waiting = [job for job in waiting if job not in ready]
        if waiting and not readable(waiting, LEAVING_S):
            judged.cell.end_job()
    finally:
        try:
            judgement, its_end = judging.collect()
        finally:
            execution, report = judged.collect()
    return execution, judgement, report.ended_us < its_end.ended_us, is_suspect(execution, report, limits)


def _why_gone(execution: Execution, reason: str) -> Verdict:
    if execution.outcome == "ok":
        return "runtime_error", "the program ended before it answered"
    lines = execution.stderr.decode(errors="replace").strip().splitlines()
    return execution.outcome, lines[-1][:200] if lines else reason
