"""TensorBoard as a process beside a run: started on a free port of 127.0.0.1, ended with the run."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from protocol.errors import UserError

_ADDRESS = re.compile(r"TensorBoard \S+ at (http://\S+)")
START_S = 60.0
_PROGRAM = "from protocol.node import die_with_parent; die_with_parent(); from tensorboard.main import run_main; run_main()"
_OPTIONS = ("--host", "127.0.0.1", "--port", "0", "--reload_interval", "5")


class Board:
    """Use as a context manager. `address` is where a browser finds it."""

    def __init__(self, log_dir: Path, on_address: Callable[[str], object] = lambda address: None) -> None:
        """`on_address` is called with the address once it is known, from a thread."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, "--logdir", str(log_dir), *_OPTIONS],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.address = ""
        self._on_address = on_address
        self._known = threading.Event()
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, name="tensorboard", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:  # to its end, else its pipe would fill up
            self._lines = [*self._lines[-20:], line]
            found = _ADDRESS.search(line)
            if found:
                self.address = found[1]
                self._known.set()
                self._on_address(self.address)
        self._known.set()

    def wait(self) -> str:
        """The address once it answers. Raises UserError when TensorBoard ends instead."""
        self._known.wait(START_S)
        if not self.address:
            raise UserError(f"TensorBoard did not start: {''.join(self._lines).strip()[-500:] or f'no address within {START_S:g} s'}")
        return self.address

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its own data server, if that is left
        self._reader.join(5.0)
        if self._process.stderr is not None:
            self._process.stderr.close()
