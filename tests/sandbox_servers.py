"""Real `rlsys sandbox serve` processes for tests, ended with everything that they started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.actors.processes import alive, born, descendants, wait_until


@dataclass(slots=True)
class Served:
    """A server that listens."""

    process: subprocess.Popen[str]
    url: str
    token_file: Path
    errors: Path

    @property
    def token(self) -> str:
        return self.token_file.read_text().strip()

    def end(self, deadline_s: float = 120.0) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(timeout=deadline_s)


@contextmanager
def served(directory: Path, *arguments: str) -> Iterator[Served]:
    """A server with a token of its own; fails when it leaves a process behind."""
    token_file, errors = directory / "token", directory / "server.err"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [
                sys.executable, "-P", "-m", "rlsys", "sandbox", "serve", "--listen", "127.0.0.1:0", "--token-file", str(token_file), "--json",
                *arguments,
            ],
            stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, errors.read_text()
        started = born(descendants(process.pid))
        yield Served(process, json.loads(line)["address"], token_file, errors)
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=120)
        wait_until(lambda: not alive(started), "every cell of the server ended")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=120)
        if process.stdout is not None:
            process.stdout.close()
