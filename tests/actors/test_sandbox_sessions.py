"""Interpreter sessions: state over calls, limits of a call, and the end that leaves nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors.sandbox import MIB, sessions, wire
from actors.sandbox.execution import Program
from actors.sandbox.runner import Sandbox
from actors.sandbox.sessions import Session, shorten
from protocol.errors import InfrastructureFault
from tests.actors.processes import descendants


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(2) as sandbox:
        yield sandbox


def test_state_is_kept_between_calls(sandbox: Sandbox) -> None:
    with sandbox.session() as session:
        assert session.run("import math\nx = 20").output == ""
        turn = session.run("x += 1\nprint('twice')\n2 * x")
        assert (turn.output, turn.status) == ("twice\n42\n", "ok")
        failed = session.run("math.sqrt(-1)")
        assert failed.status == "error" and "ValueError: math domain error" in failed.output and "call-3" in failed.output
        assert session.run("def f(n): return n + x\nf(1)").output == "22\n"
        assert session.run("class (:").status == "error"
        assert session.run("import sys; print('to stderr', file=sys.stderr); x").output == "to stderr\n21\n"
        assert session.run("exit()").status == "ok"
        assert session.run("x").output == "21\n"
        assert session.run("x").status == "too_many_calls"


def test_two_sessions_do_not_meet(sandbox: Sandbox) -> None:
    with sandbox.session() as first, sandbox.session() as second:
        first.run("x = 1\nopen('/tmp/note', 'w').write('mine')" if sandbox.pool.profile == "namespaces" else "x = 1")
        assert "NameError" in second.run("x").output
        assert second.run("import os; os.listdir('/tmp')").output == "[]\n" or sandbox.pool.profile != "namespaces"
        assert first.run("x").output == "1\n"


@contextmanager
def limited(session: Session, call_limit_s: float) -> Iterator[None]:
    """Calls of the block alone have this limit: those before and after it are not held to it on a machine that stalls."""
    before, session._call_limit_s = session._call_limit_s, call_limit_s
    try:
        yield
    finally:
        session._call_limit_s = before


def test_a_call_that_takes_too_long_is_interrupted_and_state_survives(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_INTERRUPT_GRACE_S", 120.0)
    with sandbox.session() as session:
        session.run("import signal\nx = 5\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])")
        with limited(session, 0.3):  # not interrupted before it has printed, however slowly it comes to that
            late = session.run("print('before')\nsignal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])\nwhile True: pass")
        assert late.status == "time_limit" and "before" in late.output and "TimeoutError" in late.output
        assert session.run("x").output == "5\n"


def test_a_call_that_cannot_be_interrupted_ends_the_session(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    with sandbox.session() as session:
        assert session.run("import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM]) and None").status == "ok"
        monkeypatch.setattr(sessions, "_INTERRUPT_GRACE_S", 0.5)
        with limited(session, 0.2):
            assert session.run("while True: pass").status == "time_limit"
        assert session.run("1").status == "ended"


@pytest.mark.parametrize(
    "source", ["import os; os._exit(0)", "import ctypes; ctypes.string_at(0)", "import os; os.write(3, b'\\xff' * 9); 1"]
)
def test_a_process_that_ends_or_lies(sandbox: Sandbox, source: str) -> None:
    with sandbox.session() as session:
        assert session.run(source).status == "ended"
        assert session.run("1").status == "ended"


def test_memory_is_bounded(sandbox: Sandbox) -> None:
    with sandbox.session(memory_bytes=128 * MIB) as session:
        turn = session.run("x = bytearray(1 << 30)")
        assert turn.status == "error" and "MemoryError" in turn.output
        assert session.run("1 + 1").output == "2\n"


def test_output_is_cut_with_a_mark(sandbox: Sandbox) -> None:
    with sandbox.session() as session:
        turn = session.run("print('a' * 100_000, 'z' * 100_000)")
        assert turn.status == "ok" and len(turn.output) < 9000
        assert turn.output.startswith("aaa") and "characters left out" in turn.output and turn.output.endswith("zz\n")
        assert session.run("for _ in range(20_000): print('x' * 1000)").status == "ok"
    assert shorten("x" * 100, 10) == "xxxxx\n[... 90 characters left out ...]\nxxxxx"
    assert shorten("short") == "short"


def test_a_closed_session_leaves_a_clean_cell(sandbox: Sandbox) -> None:
    before = descendants(os.getpid())
    session = sandbox.session()
    session.run("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()")
    if sandbox.pool.profile == "namespaces":
        assert session.run("open('/tmp/x', 'w').write('x')").output == "1\n"
    session.close()
    session.close()
    assert descendants(os.getpid()) <= before and sandbox.pool.cells_replaced == 0
    clean = sandbox.run(Program(kind=wire.PYTHON, content=b"import os; print(os.listdir('.'))"))
    assert clean.stdout == b"[]\n"


def test_a_call_whose_time_ends_with_it_ends_no_session(sandbox: Sandbox) -> None:
    """The alarm finds the call over, or in what it does after an error: such a call is late, or was in time."""
    with sandbox.session(max_calls=20) as session:
        for step in range(16):
            wait = f"import time\nuntil = time.monotonic() + {0.04 + step / 4000}\nwhile time.monotonic() < until: pass\n1 / {step % 2}"
            with limited(session, 0.042):
                assert session.run(wait).status in ("ok", "error", "time_limit")
        assert session.run("2").output == "2\n"


def test_a_session_needs_an_open_sandbox() -> None:
    sandbox = Sandbox(1)
    sandbox.close()
    with pytest.raises(InfrastructureFault, match="closed"):
        sandbox.session()


def test_the_example_of_the_documentation_holds() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/extending.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "sandbox.session(" in block]
    exec(compile(example, "extending.md", "exec"), {})
