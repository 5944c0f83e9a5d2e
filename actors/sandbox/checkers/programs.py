"""Programs that judge: checkers and interactors in the two conventions that contests use.

testlib   `checker input output answer`, `interactor input output [answer]`; exit code 0 right, 1 wrong, 2 badly formed, 3 the jury's fault.
          Source: testlib.h, codeforces.com/testlib.
kattis    `validator input answer feedback/` with the output on stdin; exit code 42 right, 43 wrong.
          Source: the Problem Package Format, "Output Validators".

They come with the data, run in a cell of their own, and see the secrets; the judged program never shares a cell with them.
"""

from __future__ import annotations

import dataclasses
import signal
from dataclasses import dataclass

from actors.sandbox import MIB, Execution, Limits
from actors.sandbox.execution import Program
from actors.sandbox.runner import Sandbox

LIMITS = Limits(cpu_s=30, memory_bytes=1024 * MIB)


class CheckerFailed(Exception):
    """The checker itself broke: neither of its answers. The data are at fault."""


@dataclass(frozen=True, slots=True)
class Convention:
    """How a judging program is called and what its exit codes say."""

    arguments: tuple[str, ...]
    """Names among "input", "output", "answer", "feedback/"."""
    output_on_stdin: bool
    right: int
    wrong: tuple[int, ...]


CONVENTIONS = {
    "testlib": Convention(("input", "output", "answer"), False, 0, (1, 2)),
    "kattis": Convention(("input", "answer", "feedback/"), True, 42, (43,)),
}


_CRASHED, _PIPE_CLOSED = 101, 102
_GUARD = """
try:
    exec(compile({source!r}, "checker.py", "exec"), {{"__name__": "__main__", "__builtins__": __builtins__}})
    __import__("sys").stdout.flush()
except BrokenPipeError:
    raise SystemExit({pipe_closed})
except Exception:
    __import__("traceback").print_exc()
    raise SystemExit({crashed})
"""


def guarded(source: str, language: str) -> str:
    """`source` such that a crash is not taken for a verdict: an uncaught exception ends Python with code 1, testlib's "wrong"."""
    return _GUARD.format(source=source, crashed=_CRASHED, pipe_closed=_PIPE_CLOSED) if language == "python" else source


def equip(program: Program, convention: Convention, files: dict[str, bytes]) -> Program:
    """`program` with the convention's arguments and files."""
    present = {name: files.get(name, b"") for name in convention.arguments}
    return dataclasses.replace(program, arguments=convention.arguments, files=present)


def check_output(sandbox: Sandbox, program: Program, name: str, test_input: bytes, output: bytes, answer: bytes) -> str:
    """Empty when the checker accepts, else its reason. Raises CheckerFailed, and InfrastructureFault."""
    convention = CONVENTIONS[name]
    equipped = equip(program, convention, {"input": test_input, "output": output, "answer": answer})
    return read_verdict(sandbox.run(equipped, output if convention.output_on_stdin else b"", LIMITS), convention)


def read_verdict(execution: Execution, convention: Convention) -> str:
    """Empty for right, else the reason. Raises CheckerFailed for an end that the convention does not know."""
    said = execution.stderr.decode(errors="replace").strip().splitlines()
    if execution.outcome in ("ok", "runtime_error"):
        if execution.exit_code == convention.right:
            return ""
        # it may have written to a program that had ended
        if execution.exit_code in (*convention.wrong, -signal.SIGPIPE, _PIPE_CLOSED):
            return said[-1][:200] if said else "the checker refused it"
    raise CheckerFailed(f"{execution.outcome}, exit code {execution.exit_code}, {said[-1][:200] if said else 'nothing on stderr'}")
