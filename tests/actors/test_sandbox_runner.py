"""The sandbox as its owner sees it: outcomes, limits, broken cells, and what it leaves behind."""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from actors.sandbox import MIB, Limits, wire
from actors.sandbox.cell import Cell
from actors.sandbox.confine import SANDBOX_UID
from actors.sandbox.conversation import run_interactive
from actors.sandbox.execution import Program
from actors.sandbox.runner import Sandbox
from protocol.errors import InfrastructureFault
from protocol.holds import sweep
from tests.actors.processes import descendants, wait_until


def python(source: str) -> Program:
    return Program(kind=wire.PYTHON, content=source.encode())


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    try:
        sandbox = Sandbox(2, profile=request.param)
    except InfrastructureFault as error:
        pytest.skip(f"this machine has no {request.param}: {error}")
    with sandbox:
        yield sandbox


OUTCOMES = [
    ("print(int(input()) + 1)", b"41\n", "ok", b"42\n"),
    ("import sys; print(sys.stdin.read(), end='')", b"a\r\nb", "ok", b"a\nb"),
    ("print(open(0).read())", b"x", "ok", b"x\n"),
    ("import os; print(os.read(0, 9))", b"x", "ok", b"b'x'\n"),
    ("import sys\nf = sys.stdin.buffer.readline\nprint(f(), f())", b"1\n2\n", "ok", b"b'1\\n' b'2\\n'\n"),
    ("for line in __import__('sys').stdin: print(line.strip())", b"1\n2\n", "ok", b"1\n2\n"),
    ("global n\nn = 3\nif __name__ == '__main__': print(n)", b"", "ok", b"3\n"),
    ("print(f'{1_000:,}', 10 ** 3, sorted({'b', 'a'}))", b"", "ok", b"1,000 1000 ['a', 'b']\n"),
    ("import asyncio\nasync def f(): print(1)\nasyncio.run(f())", b"", "ok", b"1\n"),
    ("import numpy, sortedcontainers\nprint(int(numpy.arange(3).sum()), sortedcontainers.SortedList([2, 1])[0])", b"", "ok", b"3 1\n"),
    ("import atexit; atexit.register(print, 'bye')", b"", "ok", b"bye\n"),
    ("import os; print('lost'); os._exit(0)", b"", "ok", b""),
    ("import sys; print('kept'); sys.exit()", b"", "ok", b"kept\n"),
    ("import sys; sys.exit(3)", b"", "runtime_error", b""),
    ("import sys; sys.exit('no')", b"", "runtime_error", b""),
    ("1 / 0", b"", "runtime_error", b""),
    ("print(", b"", "runtime_error", b""),
    ("import os; os.kill(os.getpid(), 9)", b"", "runtime_error", b""),
    ("import ctypes; ctypes.string_at(0)", b"", "runtime_error", b""),
    ("x = 'a' * (2 << 30)", b"", "memory_limit", b""),
]


@pytest.mark.parametrize(("source", "stdin", "outcome", "stdout"), OUTCOMES, ids=[case[0][:40] for case in OUTCOMES])
def test_outcomes_and_output(sandbox: Sandbox, source: str, stdin: bytes, outcome: str, stdout: bytes) -> None:
    execution = sandbox.run(python(source), stdin, Limits(cpu_s=5))
    assert (execution.outcome, execution.stdout) == (outcome, stdout), execution


DEEP_RECURSION = """
import sys, threading
sys.setrecursionlimit(1 << 25)
threading.stack_size(256 << 20)
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
def main(): print(depth(20_000))
thread = threading.Thread(target=main)
thread.start()
thread.join()
"""


def test_a_thread_with_a_large_stack_recurses(sandbox: Sandbox) -> None:
    assert sandbox.run(python(DEEP_RECURSION)).stdout == b"20000\n"


def test_limits_are_verdicts(sandbox: Sandbox) -> None:
    short = Limits(cpu_s=0.2, wall_s=2, output_bytes=MIB, memory_bytes=256 * MIB)
    spinning = sandbox.run(python("while True: pass"), limits=short)
    assert spinning.outcome == "time_limit" and 0.2 < spinning.cpu_s < 2.5
    deaf = "import signal\nsignal.signal(signal.SIGXCPU, lambda *_: None)\nwhile True: pass"
    assert sandbox.run(python(deaf), limits=short).outcome == "time_limit"
    asleep = sandbox.run(python("import time; time.sleep(60)"), limits=Limits(cpu_s=5, wall_s=0.3))
    assert asleep.outcome == "time_limit" and asleep.cpu_s < 1
    flood = sandbox.run(python("while True: print('x' * 1000)"), limits=short)
    assert flood.outcome == "output_limit" and len(flood.stdout) == MIB
    assert sandbox.run(python("import sys\nwhile True: sys.stderr.write('x' * 1000)"), limits=short).outcome == "output_limit"
    assert sandbox.run(python("print('x' * (1 << 19))"), limits=short).outcome == "ok"


def test_a_large_input_that_is_never_read(sandbox: Sandbox) -> None:
    assert sandbox.run(python("print(1)"), b"x" * (50 * MIB)).stdout == b"1\n"


def test_nothing_is_left_for_the_next_job(sandbox: Sandbox) -> None:
    litter = """
import os
os.makedirs("a/deep/er")
open("a/deep/file", "w").write("x" * 1000)
os.umask(0)
os.mkdir("unreadable", 0o300)
open("unreadable/file", "w").write("x")
os.mkdir("locked", 0)
"""
    for _ in range(2 * sandbox.pool.num_cells):
        # under landlock, where /tmp has no quota, a program cannot write at all
        assert sandbox.run(python(litter)).outcome == ("ok" if sandbox.pool.profile == "namespaces" else "runtime_error")
        assert sandbox.run(python("import os; print(os.getcwd() and os.listdir('.'))")).stdout == b"[]\n"


def test_a_full_tmp_is_the_programs_own_fault_and_gone_afterwards() -> None:
    with Sandbox(1, profile="namespaces") as sandbox:
        fill = "f = open('/tmp/x', 'wb')\nwhile True: f.write(b'x' * 65536)"
        assert sandbox.run(python(fill), limits=Limits(output_bytes=64 * MIB)).outcome == "runtime_error"
        assert sandbox.run(python("open('/tmp/x', 'w').write('y' * 1000); print(1)")).stdout == b"1\n"


def test_run_each_keeps_the_order_and_can_stop_early(sandbox: Sandbox) -> None:
    double = python("print(2 * int(input()))")
    executions = sandbox.run_each(double, [f"{n}\n".encode() for n in range(20)])
    assert [int(execution.stdout) for execution in executions] == [2 * n for n in range(20)]
    stops = python("import time\nif input() == 'wait': time.sleep(60)")
    with closing(sandbox.run_each(stops, [b"go", b"wait", b"wait"], Limits(cpu_s=30))) as early:
        assert next(early).outcome == "ok"
    assert sandbox.run(double, b"1\n").stdout == b"2\n"


def test_threads_share_the_cells(sandbox: Sandbox) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        for step in range(10):
            execution = sandbox.run(python("print(int(input()) ** 2)"), b"%d\n" % (number + step))
            if execution.stdout != b"%d\n" % (number + step) ** 2:
                wrong.append(execution)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_hashes_and_random_numbers_are_the_same_in_every_cell() -> None:
    source = python("import random\nprint(hash('a word'), random.random(), list({'b', 'c', 'd', 'e'}))")
    outputs = set()
    for _ in range(2):
        with Sandbox(1) as sandbox:
            outputs.add(sandbox.run(source).stdout)
    assert len(outputs) == 1


def test_limits_that_no_kernel_takes_are_a_fault() -> None:
    with Sandbox(1) as sandbox:
        for limits in (Limits(memory_bytes=-(1 << 40)), Limits(output_bytes=-1)):
            with pytest.raises(InfrastructureFault, match="could not start"):
                sandbox.run(python("print(1)"), limits=limits)
        assert sandbox.run(python("print(1)")).stdout == b"1\n"


def test_a_job_of_a_killed_cell_runs_again_on_a_fresh_one() -> None:
    with Sandbox(1) as sandbox:
        (cell,) = sandbox.pool.idle_cells()
        family = descendants(cell.pid)
        os.kill(cell.pid, signal.SIGKILL)
        wait_until(lambda: not any(_alive(pid) for pid in family), "the cell is dead")
        assert sandbox.run(python("print(1)")).stdout == b"1\n"
        assert sandbox.pool.cells_replaced == 1
        assert sandbox.pool.idle_cells()[0].pid != cell.pid


def test_cells_that_keep_dying_are_a_fault_and_never_a_verdict() -> None:
    with Sandbox(1) as sandbox:
        stop = threading.Event()

        def kill_cells() -> None:
            while not stop.is_set():
                for pid in descendants(os.getpid()):
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                stop.wait(0.02)

        killer = threading.Thread(target=kill_cells)
        killer.start()
        try:
            with pytest.raises(InfrastructureFault):
                sandbox.run(python("import time; time.sleep(20)"), limits=Limits(wall_s=30))
        finally:
            stop.set()
            killer.join(120)


def test_a_fork_that_fails_is_a_fault() -> None:
    with Sandbox(1) as sandbox:
        (cell,) = sandbox.pool.idle_cells()
        (zygote,) = descendants(cell.pid)
        account = SANDBOX_UID if os.geteuid() == 0 else None
        subprocess.run(["prlimit", "--pid", str(zygote), "--nproc=0:0"], check=True, user=account, group=account)
        assert sandbox.run(python("print(1)")).stdout == b"1\n"
        assert sandbox.pool.cells_replaced == 1
        with pytest.raises(InfrastructureFault, match="could not start"):
            sandbox.run(python("print(1)"), limits=Limits(num_threads=-2))
        assert not sandbox.pool.idle_cells()
        assert sandbox.run(python("print(1)")).stdout == b"1\n"


def open_descriptors() -> set[tuple[str, str]]:
    """Number and file of each that this process has open."""
    return {(fd.name, str(fd.readlink())) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}


def test_close_leaves_no_process_and_no_descriptor() -> None:
    gc.collect()  # what tests before this one dropped is closed now, so that no number is taken anew
    descriptors = open_descriptors()
    before = descendants(os.getpid())
    sandbox = Sandbox(2)
    assert len(descendants(os.getpid()) - before) >= 4
    sandbox.run(python("print(1)"))
    sandbox.close()
    sandbox.close()
    wait_until(lambda: not descendants(os.getpid()) - before, "all processes of the sandbox ended")
    assert open_descriptors() <= descriptors, "what other tests still had may be closed meanwhile"
    with pytest.raises(InfrastructureFault, match="closed"):
        sandbox.run(python("print(1)"))


OWNER = """
import os, sys
from actors.sandbox import wire
from actors.sandbox.execution import Program
from actors.sandbox.runner import Sandbox
sandbox = Sandbox(2, profile=sys.argv[1])
print("ready", flush=True)
sandbox.run(Program(kind=wire.PYTHON, content=b"while True: pass"))
"""


def test_an_owner_of_very_many_descriptors_is_served_as_any() -> None:
    """Hundreds of cells take more than 1,024 of them, the most that `select` knows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"this machine allows {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    others = [os.open("/dev/null", os.O_RDONLY)]
    try:
        while others[-1] < 1100:
            others.append(os.open("/dev/null", os.O_RDONLY))
        with Sandbox(2) as sandbox:
            each = sandbox.run_each(python("import time; time.sleep(0.1); print(input())"), [b"1", b"2", b"3"], Limits())
            assert [execution.stdout for execution in each] == [b"1\n", b"2\n", b"3\n"]
            judge = python("line = input()\nprint('accept' if line == 'hello' else 'reject')")
            assert run_interactive(sandbox.pool, python("print('hello')"), judge, Limits())[0].outcome == "ok"
    finally:
        for descriptor in others:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("profile", ["namespaces", "landlock"])
def test_cells_die_with_an_owner_that_is_killed_and_what_they_leave_is_swept(sandbox: Sandbox, profile: str, tmp_path: Path) -> None:
    if sandbox.pool.profile != profile:
        pytest.skip("tested with the other sandbox")
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    owner = subprocess.Popen([sys.executable, "-c", OWNER, profile], stdout=subprocess.PIPE, cwd=root, env=environment)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == b"ready\n"
        wait_until(lambda: len(descendants(owner.pid)) > 2, "a job runs")
        family = descendants(owner.pid)
        assert (sweep(tmp_path), len(list(tmp_path.iterdir()))) == ([], 2 if profile == "landlock" else 0), "one for each cell, held"
    finally:
        owner.kill()
        owner.wait(120)
        if owner.stdout:
            owner.stdout.close()
    wait_until(lambda: not any(_alive(pid) for pid in family), "all cells of the dead owner ended")
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cell_that_cannot_be_started_is_an_infrastructure_fault_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def memory_files() -> list[str]:
        return [name for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and "memfd" in (name := str(fd.readlink()))]

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", refused)
    before = memory_files()
    with pytest.raises(InfrastructureFault, match=r"a sandbox cell cannot be started: .*Resource temporarily unavailable"):
        Cell("landlock", [], {})
    gc.collect()
    assert (memory_files(), list(tmp_path.iterdir())) == (before, [])


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
