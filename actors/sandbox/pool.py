"""The cells that one process owns, leased to its threads.

A cell that breaks is replaced inside the lease. All cells are started by one thread, because the kernel ends a cell together
with the thread that started it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from actors.sandbox.cell import START_DEADLINE_S, Cell
from actors.sandbox.selftest import choose_profile
from protocol.errors import DeadlineExceeded, InfrastructureFault
from protocol.holds import sweep
from protocol.intervals import phase

PACKAGES = ("numpy", "sortedcontainers")
"""Offered to judged programs where they are installed, as judges of programming contests do."""
_LEASE_DEADLINE_S = 900.0  # jobs are bounded by minutes; a longer wait means that cells leak


class CellPool:
    """At most `num_cells` leases at once.

    Building it proves the isolation (`selftest.py`) and raises InfrastructureFault with the remedy where there is none.
    """

    def __init__(self, num_cells: int, profile: str | None = None, trees: Sequence[str] = ()) -> None:
        self.num_cells = num_cells
        self.cells_replaced = 0
        """Cells that broke and were replaced, since the start."""
        self._trees = [*interpreter_trees(), *trees]
        self._packages = find_packages(PACKAGES)
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="sandbox-keeper")
        self._changed = threading.Condition()
        self._idle: list[Cell] = []
        self._busy: set[Cell] = set()
        self._leases = 0
        self._here = threading.local()
        self._closed = False
        try:
            self.profile = self._keeper.submit(choose_profile, profile, self._build_cell).result()
            if self.profile == "landlock":
                sweep(Path(tempfile.gettempdir()))  # what cells leave whose owner was killed; under namespaces it is gone with them
            self._idle = self._start_cells(num_cells)
        except BaseException:
            self._keeper.shutdown()
            raise

    def _build_cell(self, profile: str) -> Cell:
        return Cell(profile, self._trees, self._packages)

    def _start_cells(self, number: int) -> list[Cell]:
        """Start cells side by side."""
        cells: list[Cell] = []
        try:
            for _ in range(number):
                cells.append(self._keeper.submit(self._build_cell, self.profile).result(START_DEADLINE_S))
            for cell in cells:
                cell.wait_ready()
        except BaseException:
            for cell in cells:
                cell.close()
            raise
        return cells

    @contextmanager
    def lease(self, number: int = 1) -> Iterator[list[Cell]]:
        """`number` cells for the calling thread alone, as a list that `replace` keeps up to date.

        Waits while `num_cells` leases run, but not in a thread that holds one already, and a lease of several cells starts more cells
        if it must: so leases never wait for each other in a circle. Raises DeadlineExceeded, and InfrastructureFault after `close`.
        """
        with phase("waiting:sandbox", "sandbox", f"{self._leases} leases run"), self._changed:
            if not self._changed.wait_for(self._may_lease, _LEASE_DEADLINE_S):
                raise DeadlineExceeded(f"no sandbox cell became idle within {_LEASE_DEADLINE_S:.0f} s; {self._leases} leases run")
            cells = self._take(number)
        try:
            if len(cells) < number:
                self._add(cells, number - len(cells))
            with phase("run program"):
                yield cells
        finally:
            self._give_back(cells)

    def _may_lease(self) -> bool:
        return self._closed or self._leases < self.num_cells or getattr(self._here, "leases", 0) > 0

    @contextmanager
    def lease_idle(self, at_most: int) -> Iterator[list[list[Cell]]]:
        """Up to `at_most` one-cell leases, as many as can be had without waiting; often none."""
        taken: list[list[Cell]] = []
        try:
            while len(taken) < at_most:
                with self._changed:
                    if self._closed or self._leases >= self.num_cells or not self._idle:
                        break
                    taken.append(self._take(1))
            yield taken
        finally:
            for cells in taken:
                self._give_back(cells)

    def _take(self, number: int) -> list[Cell]:
        """Open a lease with the idle cells there are; the lock is held."""
        if self._closed:
            raise InfrastructureFault("the sandbox is closed")
        self._leases += 1
        self._here.leases = getattr(self._here, "leases", 0) + 1
        cells = [self._idle.pop() for _ in range(min(number, len(self._idle)))]
        self._busy.update(cells)
        return cells

    def _add(self, cells: list[Cell], number: int) -> None:
        fresh = self._start_cells(number)
        with self._changed:
            if not self._closed:
                cells += fresh
                self._busy.update(fresh)
                return
        for cell in fresh:  # `close` came meanwhile and has not seen these: nothing may run in them
            cell.close()
        raise InfrastructureFault("the sandbox is closed")

    def _give_back(self, cells: list[Cell]) -> None:
        with self._changed:
            self._leases -= 1
            self._here.leases -= 1
            self._busy.difference_update(cells)
            if not self._closed:  # what conversations of several cells needed is not all kept
                kept = [cell for cell in cells if not cell.broken][: max(0, 2 * self.num_cells - len(self._idle))]
                self._idle += kept
                cells = [cell for cell in cells if cell not in kept]
            self._changed.notify()
        for cell in cells:
            cell.close()

    def replace(self, cells: list[Cell], broken: Cell) -> Cell:
        """End a broken cell of the caller's lease and put a fresh one in its place. Raises CellError when none can be started."""
        with self._changed:
            self._busy.discard(broken)
            self.cells_replaced += 1
        cells.remove(broken)
        broken.close()
        self._add(cells, 1)
        return cells[-1]

    def idle_cells(self) -> list[Cell]:
        """The cells that no lease holds now."""
        with self._changed:
            return list(self._idle)

    def close(self) -> None:
        """End every cell; jobs that run raise CellError in their threads. Safe to call twice."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            for cell in self._busy:
                cell.kill()
            self._changed.notify_all()
        for cell in idle:
            cell.close()
        self._keeper.shutdown()


def interpreter_trees() -> list[str]:
    """Directories outside /usr that the interpreter of a cell needs."""
    base = sys.base_prefix
    return [] if base == "/usr" or base.startswith("/usr/") else [base]


def find_packages(names: Sequence[str]) -> dict[str, str]:
    """Name -> directory of each installed package of `names`, with the shared libraries that wheels keep beside it."""
    found = {}
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            directory = Path(spec.submodule_search_locations[0])
            found[name] = str(directory)
            libraries = directory.with_name(f"{name}.libs")
            if libraries.is_dir():
                found[libraries.name] = str(libraries)
    return found


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
