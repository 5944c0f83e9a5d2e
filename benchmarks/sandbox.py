"""What an isolated execution costs, beside the two usual ways. Run: `python benchmarks/sandbox.py`.

Prints executions per CPU-second of all processes involved (owner, zygote, program), for a trivial program of stdin and stdout:

    sandbox      one job per execution: namespaces, seccomp, limits, checked clean (`Sandbox.run`)
    series       a problem of 15 tests by `Sandbox.run_each`, as the reward runs it
    fresh        `python -I -S file.py`, no isolation
    in-process   the common checker, as LiveCodeBench ships it and verl and others carry it: for each problem a multiprocessing.Manager
                 for the result and a Process that sets limits, disables functions and runs `exec`; one test each. Its
                 parent is this small process: forked from a trainer's, with torch in it, it costs more

CPU time and not wall time, because a machine that trains has no idle cores. Exits with 1 when a bound of BOUNDS is not met.
"""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import importlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import mock_open, patch

from actors.sandbox import wire
from actors.sandbox.cell import interpreter
from actors.sandbox.execution import Program
from actors.sandbox.runner import Sandbox

SOURCE = "a, b = map(int, input().split())\nprint(a + b)\n"
ROUNDS = 5
"""Each way is measured so often, in turns, and its best round counts: other load on the machine only ever adds."""
USUAL_MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json typing".split()  # noqa: SIM905 - 17 names
)
USUAL_PREAMBLE = "\n".join(f"from {name} import *" for name in USUAL_MODULES)
"""What those checkers put before every program."""
BOUNDS = {"executions per CPU-second": 350.0, "times fresh": 3.0, "times in-process": 8.0}


def cpu_seconds(pids: set[int]) -> float:
    """Of this process and its ended children, and of `pids` and theirs."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(int(field) for field in fields[11:15])
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def children_of(pid: int) -> set[int]:
    """Processes below `pid`."""
    direct = {int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()}
    return direct | {deep for child in direct for deep in children_of(child)}


def per_cpu_second(work: Callable[[int], None], number: int) -> float:
    """Executions of `work` per CPU-second, over `number` of them."""
    pids = children_of(os.getpid())
    start = cpu_seconds(pids)
    work(number)
    return number / (cpu_seconds(pids) - start)


def usual_checker(result: list[bool]) -> None:
    """What the process of the `run_test` of LiveCodeBench does, which trainers carry: limits, guards, parse, exec. Imports are done."""
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(1))
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        resource.setrlimit(limit, (4 << 30, 4 << 30))
    faulthandler.disable()
    for module, names in ((os, "kill system fork removedirs rmdir chmod chown unlink chdir"), (shutil, "rmtree move chown")):
        for name in names.split():
            setattr(module, name, None)
    tree = ast.parse(SOURCE)  # once for a main guard, once more to wrap the body in a function
    tree = ast.parse(USUAL_PREAMBLE + "\ndef wrapped():\n" + "".join(f"    {line}\n" for line in ast.unparse(tree).splitlines()))
    names_of_module: dict[str, object] = {}
    exec(compile(tree, "<string>", "exec"), names_of_module)
    wrapped = names_of_module["wrapped"]
    assert callable(wrapped)
    out = io.StringIO()
    signal.alarm(6)
    given = io.StringIO("1 2\n")
    with patch("builtins.open", mock_open(read_data="1 2\n")), patch("sys.stdin", given), contextlib.redirect_stdout(out):
        wrapped()
    signal.alarm(0)
    result.append([line.strip() for line in out.getvalue().strip().split("\n")] == ["3"])


def in_process(number: int) -> None:
    """One Manager and one Process per problem."""
    for name in USUAL_MODULES:
        importlib.import_module(name)
    context = multiprocessing.get_context("fork")
    for _ in range(number):
        with context.Manager() as manager:
            result = manager.list()
            process = context.Process(target=usual_checker, args=(result,))
            process.start()
            process.join(30)
            if list(result) != [True]:
                raise SystemExit("the in-process checker refused a right program")


def main() -> int:
    """Measure, print one JSON line, check the bounds."""
    program = Program(kind=wire.PYTHON, content=SOURCE.encode())
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file, Sandbox(1) as sandbox:
        file.write(SOURCE)
        file.flush()

        def isolated(number: int) -> None:
            for _ in range(number):
                if sandbox.run(program, b"1 2\n").stdout != b"3\n":
                    raise SystemExit("the sandbox gave a wrong output")

        def series(number: int) -> None:
            for _ in range(number // 15):
                for execution in sandbox.run_each(program, [b"1 2\n"] * 15, is_right=lambda _, execution: execution.stdout == b"3\n"):
                    if execution.stdout != b"3\n":
                        raise SystemExit("a series gave a wrong output")

        def fresh(number: int) -> None:
            for _ in range(number):
                subprocess.run([interpreter(), "-I", "-S", file.name], input=b"1 2\n", stdout=subprocess.DEVNULL, check=True)

        ways: dict[str, tuple[Callable[[int], None], int]] = {
            "sandbox": (isolated, 300),
            "series": (series, 1500),
            "fresh": (fresh, 60),
            "in-process": (in_process, 30),
        }
        best = dict.fromkeys(ways, 0.0)
        for _ in range(ROUNDS):
            for name, (work, number) in ways.items():
                best[name] = max(best[name], per_cpu_second(work, number))
        profile = sandbox.pool.profile
    measured = {
        "executions per CPU-second": best["sandbox"],
        "times fresh": best["sandbox"] / best["fresh"],
        "times in-process": best["sandbox"] / best["in-process"],
    }
    print(json.dumps({"profile": profile, **{name: round(value, 1) for name, value in (best | measured).items()}}))
    missed = [f"{name}: {measured[name]:.1f}, expected at least {bound:g}" for name, bound in BOUNDS.items() if measured[name] < bound]
    print("\n".join(missed) or "all bounds are met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
