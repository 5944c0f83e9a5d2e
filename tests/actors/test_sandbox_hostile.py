"""Hostile programs: the verdict is the expected one, the cell lives, nothing is left behind. As root and as an ordinary user."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from actors.sandbox import MIB, Execution, Limits, wire
from actors.sandbox.execution import Program
from actors.sandbox.languages import CompileError
from actors.sandbox.languages.cpp import Cpp
from actors.sandbox.runner import Sandbox
from protocol.errors import InfrastructureFault
from tests.actors import hostile_cpp, hostile_python
from tests.actors.processes import descendants

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(cpu_s=0.5, wall_s=1.5, memory_bytes=128 * MIB, output_bytes=4 * MIB)
UNDER_LANDLOCK_OTHERWISE = {"kill everybody", "kill the own group", "kill the zygote", "fill tmp", "fill the inodes"}
NO_WORD = {"close everything", "exit code 0 after a crash"}
"""Programs that end with exit code 0 but cannot say SAFE."""
assert len(hostile_python.HOSTILE) + len(hostile_cpp.HOSTILE) + len(hostile_cpp.COMPILE_BOMBS) >= 100


@pytest.fixture(scope="module", params=["namespaces", pytest.param("landlock", marks=pytest.mark.slow)])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    try:
        sandbox = Sandbox(1, profile=request.param)
    except InfrastructureFault as error:
        pytest.skip(f"this machine has no {request.param}: {error}")
    with sandbox:
        yield sandbox


def run_and_inspect(sandbox: Sandbox, program: Program) -> Execution:
    """Run it; the cell must be the same as before, without processes or files of the program."""
    (cell,) = sandbox.pool.idle_cells()
    before = descendants(cell.pid)
    execution = sandbox.run(program, b"stdin\n", LIMITS)
    assert sandbox.pool.idle_cells() == [cell] and sandbox.pool.cells_replaced == 0
    assert descendants(cell.pid) == before
    clean = sandbox.run(
        Program(kind=wire.PYTHON, content=b"import os, heapq\nprint(os.listdir('.'), heapq.nsmallest(1, [2, 1]))"), b"", LIMITS
    )
    assert clean.stdout == b"[] [1]\n", clean
    return execution


def check(sandbox: Sandbox, name: str, execution: Execution, outcome: str) -> None:
    assert b"BROKEN" not in execution.stdout, name
    if sandbox.pool.profile == "landlock" and name in UNDER_LANDLOCK_OTHERWISE:
        return  # there /tmp cannot be written and other processes cannot be signalled: it fails earlier, in its own way
    assert execution.outcome in outcome.split("|"), execution
    if outcome == "ok" and name not in NO_WORD:
        assert execution.stdout.startswith(b"SAFE"), execution


@pytest.mark.parametrize("name", hostile_python.HOSTILE)
def test_python(sandbox: Sandbox, name: str) -> None:
    source, outcome = hostile_python.HOSTILE[name]
    source = source.replace("PROJECT", str(ROOT))
    check(sandbox, name, run_and_inspect(sandbox, Program(kind=wire.PYTHON, content=source.encode())), outcome)


@pytest.fixture(scope="module")
def compiled() -> dict[str, Program]:
    """All C++ programs, compiled side by side."""
    language = Cpp()
    if missing := language.missing():
        pytest.skip(missing)
    with Sandbox(2) as sandbox, ThreadPoolExecutor(2) as threads:
        names = list(hostile_cpp.HOSTILE)
        return dict(zip(names, threads.map(lambda name: language.prepare(hostile_cpp.HOSTILE[name][0], sandbox), names), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", hostile_cpp.HOSTILE)
def test_cpp(sandbox: Sandbox, compiled: dict[str, Program], name: str) -> None:
    check(sandbox, name, run_and_inspect(sandbox, compiled[name]), hostile_cpp.HOSTILE[name][1])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "random" in name else name for name in hostile_cpp.COMPILE_BOMBS]
)
def test_compile_bombs(sandbox: Sandbox, name: str) -> None:
    if missing := Cpp().missing():
        pytest.skip(missing)
    (cell,) = sandbox.pool.idle_cells()
    with pytest.raises(CompileError) as error:
        Cpp().prepare(hostile_cpp.COMPILE_BOMBS[name], sandbox)
    assert b"root:" not in error.value.execution.stderr and sandbox.pool.idle_cells() == [cell]


def as_ordinary_user(command: list[str]) -> list[str]:
    """`command` run as user 65534 in a mount namespace in which it can reach the interpreter, wherever root keeps it."""
    base = Path(sys.base_prefix)
    hidden = next((place for place in (base, *base.parents) if place.stat().st_mode & 0o005 != 0o005), None)
    script = "set -e; "
    if hidden is not None:  # a tmpfs over the closed directory, with the interpreter alone bound back into it
        script += f"mount --make-rprivate /; mount --bind {base} /mnt; mount -t tmpfs -o mode=755 none {hidden}; "
        script += f"mkdir -p {base}; mount --move /mnt {base}; "
    script += 'exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@"'
    return ["unshare", "--mount", "bash", "-c", script, "bash", *command]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the suite runs as an ordinary user already")
@pytest.mark.skipif(not all(map(shutil.which, ("unshare", "setpriv"))), reason="needs unshare and setpriv of util-linux")
def test_the_whole_suite_as_an_ordinary_user(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    tests = ["tests/actors/test_sandbox_hostile.py", "tests/actors/test_sandbox_runner.py", "tests/actors/test_sandbox_calls.py"]
    options = ["-q", "-p", "no:cacheprovider", "-m", "not gpu", "-k", "not property", f"--basetemp={tmp_path}/t"]
    command = [sys.executable, "-P", "-m", "pytest", *options, *tests]
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(ROOT),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path),
    }
    finished = subprocess.run(
        as_ordinary_user(command), check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]
    passed = re.search(r"(\d+) passed", finished.stdout)
    assert passed is not None and int(passed[1]) >= 150
