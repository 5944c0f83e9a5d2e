"""`Sandbox`: run programs on the pool's cells, with one retry where the fault may be ours."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from actors.sandbox import DEFAULT_LIMITS, MIB, Execution, Limits, wire
from actors.sandbox.cell import Cell, CellError
from actors.sandbox.execution import Program, Running, is_suspect, run_series
from actors.sandbox.pool import CellPool, usable_cores
from actors.sandbox.sessions import CALL_LIMIT_S, MAX_CALLS, Session
from actors.sandbox.waiting import readable


class Sandbox:
    """A pool of `cells` cells, one per usable core by default. Threads share it; close it to leave no process.

    `profile` is for tests; None takes the strongest isolation that holds on this machine. Raises InfrastructureFault where none does.

    Example:
        with Sandbox() as sandbox:
            execution = sandbox.run(sandbox_program, b"1 2\\n", Limits(cpu_s=2))
    """

    def __init__(self, cells: int | None = None, profile: str | None = None, trees: Sequence[str] = ()) -> None:
        """`trees` are directories outside /usr that cells shall see, such as a compiler's."""
        self.pool = CellPool(cells or usable_cores(), profile, trees)

    def run(self, program: Program, stdin: bytes = b"", limits: Limits = DEFAULT_LIMITS, extras: Sequence[int] = ()) -> Execution:
        """Run `program` once; `extras` are descriptors that it has as 3, 4, ... Raises InfrastructureFault when two cells broke."""
        with self.pool.lease() as cells:
            try:
                execution, report = Running(cells[0], program, stdin, limits, extras=extras).collect()
                if not is_suspect(execution, report, limits):
                    return execution
            except CellError:
                self.pool.replace(cells, cells[0])
            return Running(cells[0], program, stdin, limits, extras=extras).collect()[0]

    def run_each(
        self,
        program: Program,
        stdins: Sequence[bytes],
        limits: Limits = DEFAULT_LIMITS,
        is_right: Callable[[int, Execution], bool] | None = None,
    ) -> Generator[Execution]:
        """Run `program` on each input and yield the executions in order.

        With `is_right`, which judges the execution of the input at an index, quick runs of a Python program share a process, for a
        fork costs ten times what they do; a failure in a process that is not fresh is never believed but run again alone. Slow runs
        are spread over all cells that are idle. Close the iterator to stop early: what still runs is ended. Raises like `run`.
        """
        with self.pool.lease() as first:
            series: list[Execution] = []
            if is_right is not None and program.kind == wire.PYTHON and len(stdins) > 1:
                try:
                    series = run_series(first[0], program, stdins, limits)
                except CellError:
                    self.pool.replace(first, first[0])
            for index, execution in enumerate(series):
                if index and is_right is not None and not is_right(index, execution):
                    (execution,) = _Batch(self.pool, [first], program, [stdins[index]], limits).run()
                yield execution
            rest = stdins[len(series) :]
            if rest:
                with self.pool.lease_idle(min(len(rest), self.pool.num_cells) - 1) as more:
                    yield from _Batch(self.pool, [first, *more], program, rest, limits).run()

    def session(self, memory_bytes: int = 1024 * MIB, max_calls: int = MAX_CALLS, call_limit_s: float = CALL_LIMIT_S) -> Session:
        """An interpreter that keeps its state over several calls. It holds a cell until it is closed. Raises InfrastructureFault."""
        return Session(self.pool, memory_bytes, max_calls, call_limit_s)

    def close(self) -> None:
        """End every process of the sandbox."""
        self.pool.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Batch:
    """One program on many inputs, several at once, driven by one thread."""

    def __init__(self, pool: CellPool, leases: list[list[Cell]], program: Program, stdins: Sequence[bytes], limits: Limits) -> None:
        self._pool = pool
        self._free = leases
        self._program = program
        self._stdins = stdins
        self._limits = limits
        self._running: dict[int, tuple[Running, list[Cell]]] = {}
        self._retried: set[int] = set()
        self._done: dict[int, Execution] = {}

    def run(self) -> Generator[Execution]:
        waiting = list(range(len(self._stdins)))[::-1]
        try:
            for index in range(len(self._stdins)):
                while index not in self._done:
                    while waiting and self._free:
                        self._start(waiting.pop(), self._free.pop())
                    self._collect_one()
                yield self._done.pop(index)
        finally:
            for job, cells in self._running.values():
                self._abandon(job, cells)

    def _start(self, index: int, cells: list[Cell]) -> None:
        try:
            job = Running(cells[0], self._program, self._stdins[index], self._limits)
        except CellError as fault:
            self._retry(index, cells, fault)
        else:
            self._running[index] = (job, cells)

    def _retry(self, index: int, cells: list[Cell], fault: CellError) -> None:
        """After a broken cell: once more on a fresh one; raises the second fault."""
        if index in self._retried:
            raise fault
        self._retried.add(index)
        self._pool.replace(cells, cells[0])
        self._start(index, cells)

    def _collect_one(self) -> None:
        """Wait for whichever job ends first. A cell that is silent for too long raises in its `finish`."""
        jobs = [job for job, _ in self._running.values()]
        ready = readable(jobs, self._limits.wall) if len(jobs) > 1 else []
        index = next((index for index, (job, _) in self._running.items() if job in ready), next(iter(self._running)))
        job, cells = self._running.pop(index)
        try:
            execution, report = job.collect()
        except CellError as fault:
            self._retry(index, cells, fault)
            return
        if is_suspect(execution, report, self._limits) and index not in self._retried:
            self._retried.add(index)
            self._start(index, cells)
        else:
            self._done[index] = execution
            self._free.append(cells)

    def _abandon(self, job: Running, cells: list[Cell]) -> None:
        try:
            job.abandon()
        except CellError:
            self._pool.replace(cells, cells[0])
