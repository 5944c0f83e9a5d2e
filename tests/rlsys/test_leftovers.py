"""What a dead supervisor may leave behind is ended by pid and start time, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rlsys.launchers.local import end_leftover, start_ticks

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(SLEEP, start_new_session=True)
    yield process
    process.kill()
    process.wait(timeout=30)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_very_process_is_ended_also_when_it_is_stopped(child: subprocess.Popen[bytes], stopped: bool) -> None:
    if stopped:
        os.kill(child.pid, signal.SIGSTOP)
    ticks = start_ticks(child.pid)
    assert ticks > 0
    assert end_leftover(child.pid, ticks)
    assert child.wait(timeout=30) == -signal.SIGKILL
    assert not end_leftover(child.pid, ticks), "it is gone"


def test_a_pid_that_was_given_to_another_process_is_left_alone(child: subprocess.Popen[bytes]) -> None:
    ticks = start_ticks(child.pid)
    assert not end_leftover(child.pid, ticks - 1)
    assert not end_leftover(child.pid, 0), "a start that was never written down"
    assert not end_leftover(0, ticks)
    assert start_ticks(child.pid) == ticks
