"""The job of a session: runs pieces of source in one namespace and answers each on descriptor 3 (`sessions.py` is the other end).

request   length of the source, seconds that it may take (double), source
reply     length, then "ok", "error" or "time_limit", a newline, and what was written
"""

from __future__ import annotations

import ast
import contextlib
import gc
import io
import os
import signal
import struct
import sys
import traceback
import types
from typing import NoReturn

_LENGTH = struct.Struct("=I")
_MOST_CHARACTERS = 4 << 20
_leave = os._exit  # a program may replace the attribute


class _Out(io.StringIO):
    """Collects output up to a bound; what comes later is dropped."""

    def write(self, text: str) -> int:
        if self.tell() < _MOST_CHARACTERS:
            super().write(text)
        return len(text)


def _exactly(size: int) -> bytes:
    parts = []
    while size:
        part = os.read(3, size)
        if not part:
            _leave(0)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


_calling = False
"""Only a call is interrupted, not what is done after it."""


def _expire(*_: object) -> None:
    if _calling:
        raise TimeoutError("the call reached its time limit")


def run() -> NoReturn:
    """Answer until the other end closes."""
    global _calling
    gc.enable()
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    signal.signal(signal.SIGALRM, _expire)
    for number in range(1, 1 << 30):
        (length,) = _LENGTH.unpack(_exactly(_LENGTH.size))
        (seconds,) = struct.unpack("=d", _exactly(8))
        source = _exactly(length).decode(errors="surrogatepass")
        out = _Out()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                _calling = True
                signal.setitimer(signal.ITIMER_REAL, seconds)
                status = _run_piece(source, f"call-{number}", vars(module))
                _calling = False
            except TimeoutError:  # while it told of an error; the alarm comes once
                status = "time_limit"
            signal.setitimer(signal.ITIMER_REAL, 0)
            _calling = False
        body = f"{status}\n{out.getvalue()}".encode(errors="replace")
        rest = memoryview(_LENGTH.pack(len(body)) + body)
        while rest:
            rest = rest[os.write(3, rest) :]
    _leave(0)


def _run_piece(source: str, name: str, names: dict[str, object]) -> str:
    """Run statements, print the value of a last expression as a notebook does."""
    try:
        tree = ast.parse(source, name)
        last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None  # type: ignore[attr-defined]
        exec(compile(tree, name, "exec", dont_inherit=True), names)
        if last is not None:
            value = eval(compile(last, name, "eval", dont_inherit=True), names)
            if value is not None:
                print(repr(value))
    except TimeoutError as error:
        traceback.print_exc(limit=-8)
        return "time_limit" if "time limit" in str(error) else "error"
    except SystemExit:
        return "ok"
    except BaseException:
        traceback.print_exc(limit=-8)
        return "error"
    return "ok"
