"""A process that compares mathematical answers. The only module that imports sympy and math-verify, and only in such a process.

Consumes: questions on one socket, each {"references": [latex], "answers": [latex]}. Produces: {"verdict", "detail"}. Frames are four bytes
of length, then JSON. It is a file that runs by itself (`python -I math_judge.py FD OWNER CPU_S MEMORY_BYTES`).

LaTeX goes through latex2sympy's grammar (antlr), which builds expressions from its tree. sympy's own parser of strings, which ends in
`eval` and which that grammar's numbers reach, is replaced by a reader of decimals before the first question. A question that
spends its processor time is ended by the kernel (SIGPROF), whatever code it hangs in; the address space is bounded; no file can
be written, no process started.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import socket
import sys
from functools import lru_cache
from importlib import import_module
from typing import Any

MAX_FRAME_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1
_RELATIVE_TOLERANCE = 2e-5  # decimals of five digits and more are taken for the number that they round
_DECIMAL = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_RECURSION_LIMIT = 3000  # antlr takes about ten Python calls for each level of nesting; answers have a handful of levels


def send_frame(connection: socket.socket, value: dict[str, Any]) -> None:
    """Send a value as one frame."""
    data = json.dumps(value).encode()
    connection.sendall(len(data).to_bytes(4, "big") + data)


def receive_frame(connection: socket.socket) -> dict[str, Any] | None:
    """The next frame's value; None at the end of the stream. Raises ValueError for a frame that is too long or not an object."""
    head = _receive_exactly(connection, 4)
    if len(head) < 4:
        return None
    length = int.from_bytes(head, "big")
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes, at most {MAX_FRAME_BYTES} expected")
    data = _receive_exactly(connection, length)
    if len(data) < length:
        return None
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"a frame that holds a {type(value).__name__}, expected an object")
    return value


def _receive_exactly(connection: socket.socket, length: int) -> bytes:
    parts = []
    while length:
        part = connection.recv(min(length, 1 << 16))
        if not part:
            break
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


class Judge:
    """Parses and compares. Building it imports the libraries, which takes half a second."""

    def __init__(self) -> None:
        converter: Any = import_module("latex2sympy2_extended.latex2sympy2")
        grader: Any = import_module("math_verify.grader")
        self._sympy: Any = import_module("sympy")
        import_module("sympy.physics.units")  # simplify imports it late, and its names are read by the parser that goes now
        forbid_eval()
        # units stay out: the library would drop the last letter of 3t, and text units are gone already
        config = converter.NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
        self._verify = grader.verify

        def parse(latex: str) -> Any:
            normalised = converter.normalize_latex(latex, config)
            is_real = not grader.should_treat_as_complex(normalised)
            return converter.latex2sympy(normalised, is_real=is_real, normalization_config=None)

        self._parse = parse
        self._parse_reference = lru_cache(64)(parse)  # the samples of a group share their reference

    def compare(self, references: list[str], answers: list[str]) -> tuple[str, str]:
        """("equal" | "different" | "unreadable", why): whether any answer equals any reference."""
        try:
            parsed = [self._parse(answer) for answer in answers]
        except MemoryError:
            raise
        except Exception as error:  # the text is the model's: whatever it breaks in a parser is its own fault
            return "unreadable", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        for reference in references:
            try:
                wanted = self._parse_reference(reference)
            except MemoryError:
                raise
            except Exception:  # a reference in words or in a notation of its own: equal texts were accepted before
                continue
            if any(self._equal(wanted, answer) for answer in parsed):
                return "equal", ""
        return "different", ""

    def _equal(self, wanted: Any, answer: Any) -> bool:
        if not self._verify(wanted, answer, allow_set_relation_comp=True, timeout_seconds=None):
            return False
        return self._close(wanted, answer)

    def _close(self, wanted: Any, answer: Any) -> bool:
        """math-verify compares decimals after rounding to six places, which makes all tiny numbers equal: look at the ratio too."""
        sympy = self._sympy
        if not all(isinstance(side, sympy.Expr) and not side.free_symbols for side in (wanted, answer)):
            return True
        if not (wanted.has(sympy.Float) or answer.has(sympy.Float)):
            return True
        hundredth = sympy.UnevaluatedExpr(sympy.Rational(1, 100))
        if wanted.has(hundredth) or answer.has(hundredth):
            return True
        try:
            left, right = complex(wanted.evalf()), complex(answer.evalf())
        except (TypeError, ValueError, OverflowError):
            return True
        return abs(left - right) <= _RELATIVE_TOLERANCE * max(abs(left), abs(right))


def forbid_eval() -> None:
    """Replace sympy's parser of strings, the one way from a text to `eval`, by one of plain decimal numbers, for the rest of this process.

    latex2sympy reads each number with `sympy.Number(text)`, which ends in that parser.
    """
    sympy: Any = import_module("sympy")
    sympy_parser = import_module("sympy.parsing.sympy_parser")

    def parse_number(text: Any, *_: Any, **__: Any) -> Any:
        if not isinstance(text, str) or not _DECIMAL.fullmatch(text):
            raise ValueError(f"{str(text)[:40]!r} is no decimal number, and a text is never evaluated here")
        return sympy.Float(text) if "." in text else sympy.Integer(int(text))

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("a text is never evaluated here")

    sympy_parser.parse_expr = parse_number  # type: ignore[attr-defined]
    sympy_parser.stringify_expr = sympy_parser.eval_expr = refuse  # type: ignore[attr-defined]


def _confine(owner: int, memory_bytes: int) -> None:
    """End with the owner; write nothing, start nothing, hold no more than `memory_bytes` of addresses."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != owner:
        sys.exit("the owner is gone")
    for kind, limit in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    sys.addaudithook(_refuse_processes)


def _refuse_processes(event: str, _: tuple[Any, ...]) -> None:
    if event in ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.bind"):
        raise PermissionError(f"{event} is not for a judge of answers")


def main(connection: socket.socket, owner: int, cpu_s: float, memory_bytes: int) -> None:
    """Answer questions until the stream ends."""
    _confine(owner, memory_bytes)
    sys.setrecursionlimit(_RECURSION_LIMIT)
    judge = Judge()
    send_frame(connection, {"verdict": "ready", "detail": ""})
    while (question := receive_frame(connection)) is not None:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        try:
            verdict, detail = judge.compare(question["references"], question["answers"])
        except MemoryError:
            verdict, detail = "memory_limit", ""
        signal.setitimer(signal.ITIMER_PROF, 0)
        send_frame(connection, {"verdict": verdict, "detail": detail})


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
