"""A run as a benchmark has it: `rlsys up` in a process of its own, its status while it works, its end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlsys.rundir import read_json

ROOT = Path(__file__).parent.parent
END_S = 180.0
LOOK_S = 0.05


@contextmanager
def running(config: Path, run: Path, changes: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """`config` with `changes` ("key=value") in the directory `run`; what it says is in `log` beside that.

    Ended in order when the benchmark leaves, and by force if it does not end.
    """
    command = [sys.executable, "-P", "-m", "rlsys", "up", str(config.resolve()), "--run-dir", str(run.resolve()), "--plain"]
    command += [word for change in changes for word in ("--set", change)]
    run.parent.mkdir(parents=True, exist_ok=True)
    with (run.parent / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def status_when(
    run: Path, process: subprocess.Popen[bytes], condition: Callable[[dict[str, Any]], Any], deadline_s: float
) -> dict[str, Any]:
    """The first status of which `condition` holds, {} while there is none. Raises RuntimeError, with the end of what the run said."""
    deadline = time.monotonic() + deadline_s
    while True:
        status = read_json(run / "status.json") or {}
        if condition(status):
            return status
        if process.poll() is not None:
            raise RuntimeError(f"the run ended: {_said(run)}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {deadline_s:g} s: {_said(run)}")
        time.sleep(LOOK_S)


def _said(run: Path) -> str:
    return (run.parent / "log").read_text(errors="replace")[-2000:]
