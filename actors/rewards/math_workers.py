"""Processes that compare answers (`math_judge.py`), leased to the threads of one reward.

A process is started when it is first needed, answers many questions, and is replaced when a question ends it. All are started by
one thread, because the kernel ends a process together with the thread that started it (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from actors.rewards import math_judge
from protocol.errors import DeadlineExceeded, InfrastructureFault

_START_DEADLINE_S = 60.0
"""A start takes half a second of processor time."""
_QUESTIONS_AHEAD = 10  # hung ones that may stand before a question in the queue; a longer wait means that leases leak
_END_DEADLINE_S = 10.0  # a process whose stream ended, or that got SIGKILL, is gone at once
_QUESTIONS_PER_PROCESS = 5000  # sympy's caches are bounded but not small; a fresh start costs less than 0.1 ms a question


def _wall_limit_s(cpu_s: float) -> float:
    """How long a question may take on a machine so busy that its process hardly runs."""
    return 30.0 + 20.0 * cpu_s


class WorkerDied(InfrastructureFault):
    """A judging process ended or fell silent for a reason that is not its question's."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """equal, different, unreadable, time_limit or memory_limit; `detail` says why in one line."""

    verdict: str
    detail: str = ""


class Worker:
    """One process. Used by one thread at a time."""

    def __init__(self, cpu_s: float, memory_bytes: int) -> None:
        self.num_questions = 0
        self._cpu_s = cpu_s
        # The processor-time limit ends a hung question; the wall limit is for a process that gets no processor at all.
        self._wall_s = _wall_limit_s(cpu_s)
        self._connection, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), str(os.getpid()), str(cpu_s), str(memory_bytes)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(Path(math_judge.__file__)), *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                start_new_session=True,
            )
        except BaseException:
            self._connection.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        """Block until the process takes questions. Raises WorkerDied."""
        verdict = self._receive(_START_DEADLINE_S)
        if verdict is None or verdict.verdict != "ready":
            raise WorkerDied(
                f"a judge of mathematics did not start: {self._ending()} (is math-verify installed, and the memory limit enough?)"
            )

    def ask(self, references: Sequence[str], answers: Sequence[str]) -> Verdict:
        """The verdict; after time_limit and memory_limit the worker is of no more use. Raises WorkerDied."""
        self.num_questions += 1
        self._connection.settimeout(self._wall_s)
        try:
            math_judge.send_frame(self._connection, {"references": list(references), "answers": list(answers)})
        except OSError as error:
            raise WorkerDied(f"judge {self.pid} takes no question: {error}") from error
        verdict = self._receive(self._wall_s)
        if verdict is not None:
            return verdict
        ending = self._ending()
        if self._process.returncode in (-signal.SIGPROF, -signal.SIGXCPU):
            return Verdict("time_limit", f"more than {self._cpu_s:g} s of processor time")
        raise WorkerDied(f"judge {self.pid} died during a question: {ending}")

    def _receive(self, wall_s: float) -> Verdict | None:
        """None when the stream ended."""
        self._connection.settimeout(wall_s)
        try:
            frame = math_judge.receive_frame(self._connection)
        except TimeoutError:
            raise WorkerDied(f"judge {self.pid} said nothing for {wall_s:g} s") from None
        except ConnectionError:
            return None
        except (OSError, ValueError) as error:
            raise WorkerDied(f"judge {self.pid}: {error}") from None
        return None if frame is None else Verdict(str(frame["verdict"]), str(frame["detail"]))

    def _ending(self) -> str:
        """How the process ended, in words."""
        try:
            code = self._process.wait(_END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            return "its stream ended but it runs on"
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def kill(self) -> None:
        """End the process while another thread waits for it; that thread gets WorkerDied and closes it."""
        self._process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """End the process. Safe to call twice."""
        self._connection.close()
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(_END_DEADLINE_S)


class MathWorkers:
    """At most `num_workers` processes; `ask` may be called by any number of threads."""

    def __init__(self, num_workers: int, cpu_s: float, memory_bytes: int) -> None:
        self.num_replaced = 0
        """Processes that a question ended or that died, since the start."""
        self._num_workers, self._cpu_s, self._memory_bytes = num_workers, cpu_s, memory_bytes
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="math-keeper")
        self._changed = threading.Condition()
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._leases = 0
        self._closed = False

    def ask(self, references: Sequence[str], answers: Sequence[str]) -> Verdict:
        """Whether any of `answers` equals any of `references` (tidied LaTeX).

        A process that dies for a reason of its own is replaced and asked once more; then WorkerDied, an InfrastructureFault. Raises
        DeadlineExceeded when no process becomes idle, and InfrastructureFault after `close`.
        """
        try:
            return self._ask_once(references, answers)
        except WorkerDied:
            return self._ask_once(references, answers)

    def pids(self) -> set[int]:
        """The processes that run now."""
        with self._changed:
            return {worker.pid for worker in [*self._idle, *self._busy]}

    def _ask_once(self, references: Sequence[str], answers: Sequence[str]) -> Verdict:
        with self._changed:
            deadline_s = _QUESTIONS_AHEAD * _wall_limit_s(self._cpu_s)
            if not self._changed.wait_for(lambda: self._closed or self._leases < self._num_workers, deadline_s):
                raise DeadlineExceeded(f"no judge of mathematics became idle within {deadline_s:.0f} s; {self._leases} are busy")
            self._refuse_if_closed()
            self._leases += 1
            worker = self._idle.pop() if self._idle else None
            if worker is not None:
                self._busy.add(worker)
        keep = False
        try:
            if worker is None:
                worker = self._start()
            verdict = worker.ask(references, answers)
            keep = verdict.verdict not in ("time_limit", "memory_limit")
            return verdict
        finally:
            self._give_back(worker, keep)

    def _start(self) -> Worker:
        try:
            started = self._keeper.submit(Worker, self._cpu_s, self._memory_bytes)
            worker = started.result(_START_DEADLINE_S)
        except TimeoutError:
            started.add_done_callback(lambda late: late.result().close())
            raise InfrastructureFault(f"a judge of mathematics was not started within {_START_DEADLINE_S:g} s") from None
        except (OSError, RuntimeError) as error:
            raise InfrastructureFault(f"a judge of mathematics cannot be started: {error}") from error
        with self._changed:
            closed = self._closed
            if not closed:
                self._busy.add(worker)
        try:
            if closed:
                self._refuse_if_closed()
            worker.wait_ready()
        except BaseException:
            with self._changed:
                self._busy.discard(worker)
            worker.close()
            raise
        return worker

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise InfrastructureFault("the judges of mathematics are closed")

    def _give_back(self, worker: Worker | None, keep: bool) -> None:
        fresh_enough = worker is not None and worker.num_questions < _QUESTIONS_PER_PROCESS
        with self._changed:
            self._leases -= 1
            if worker is not None:
                self._busy.discard(worker)
                keep = keep and fresh_enough and not self._closed
                self.num_replaced += not keep
                if keep:
                    self._idle.append(worker)
            self._changed.notify()
        if worker is not None and not keep:
            worker.close()

    def close(self) -> None:
        """End every process; questions that run raise InfrastructureFault in their threads. Safe to call twice."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            for worker in self._busy:
                worker.kill()
            self._changed.notify_all()
        for worker in idle:
            worker.close()
        self._keeper.shutdown()
