"""The quickstart's base model: made once, found in the cache afterwards.

It is trained in a child process, so that the caller stays small and never imports torch.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from protocol.errors import DeadlineExceeded, RlsysError
from rlsys.quickstart.cache import ensure_entry, fingerprint

_SOURCES = (
    "learner/objectives/likelihood.py",
    "learner/optimizers/adamw.py",
    "learner/optimizers/muon.py",
    "rlsys/quickstart/operations.py",
    "rlsys/quickstart/tasks.py",
    "rlsys/quickstart/tokenizer.py",
    "rlsys/quickstart/warm_start.py",
    "rlsys/sft/examples.py",
    "rlsys/sft/training.py",
)
"""What decides which model comes out. The rest of the learner's step is held to its formulas by its tests: a change there moves the last
bits, not the model, and is not worth making it anew."""
_DEADLINE_S = 3600.0
"""The warm start takes about two minutes of one free core; this bounds a machine that is very busy or stuck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the warm start runs. Its length sets the ceiling of what reinforcement learning reaches afterwards."""

    steps: int = 1275
    batch_size: int = 16
    seed: int = 0
    threads: int = 1
    """Part of the recipe because sums in another order give other bits. Two are 1.4 times as fast on idle cores, but the steps are short
    and full of barriers: where other work takes turns on the cores, two threads were measured 4 to 20 times slower than one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A Hugging Face directory with model, tokenizer and generation config."""

    path: Path
    cached: bool
    """Whether it was made by an earlier call."""
    seconds: float
    """What this call took."""


def ensure_base_model(progress: Callable[[str], None] | None = None, recipe: Recipe | None = None) -> BaseModel:
    """The base model of the recipe, from the cache or else trained now: about two minutes on one core, with news to `progress`.

    Raises DataError when the cache cannot be written, RlsysError with the child's last words when training fails, DeadlineExceeded
    when it takes more than an hour.
    """
    started_s = time.monotonic()
    recipe = recipe or Recipe()
    report = progress or (lambda line: None)

    def build(directory: Path) -> None:
        report("making the quickstart's base model; it is kept for the next run")
        _train(directory, recipe, report)

    name = f"base-{fingerprint(_SOURCES, ('torch', 'transformers', 'tokenizers'), recipe)}"
    path, cached = ensure_entry(name, build)
    return BaseModel(path=path, cached=cached, seconds=time.monotonic() - started_s)


@contextmanager
def _held() -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM wait until what this gives is called, and then do what they do; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    come: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def release() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        while come:
            signal.raise_signal(come.pop())

    for number in before:
        signal.signal(number, lambda number, _: come.append(number))
    try:
        yield release
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(directory: Path, recipe: Recipe, report: Callable[[str], None]) -> None:
    """Run `warm_start` in a child, pass its lines on, and end it whatever happens."""
    command = [sys.executable, "-P", "-m", "rlsys.quickstart.warm_start", str(directory), json.dumps(asdict(recipe))]
    expired = threading.Event()
    # A signal that ends this process must find the child inside the `try` that ends it, and not between its start and there.
    with (
        _held() as release,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True) as child,
    ):

        def expire() -> None:
            expired.set()
            child.kill()

        timer = threading.Timer(_DEADLINE_S, expire)
        timer.start()
        try:
            release()
            for line in child.stdout or ():
                report(line.rstrip())
            status = child.wait()
        finally:
            timer.cancel()
            child.kill()
        if expired.is_set():
            raise DeadlineExceeded(f"the quickstart's warm start (process {child.pid}) had not ended after {_DEADLINE_S:.0f} s.")
        if status != 0:
            complaints.seek(0)
            raise RlsysError(f"the quickstart's warm start ended with status {status}, expected 0: {complaints.read()[-2000:].strip()}")
