"""Directories stay while any process holds them, and are swept once the last one was killed; nothing else is ever removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol import holds
from protocol.holds import PREFIX, USERS, Hold, inherited, sweep

ROOT = Path(__file__).resolve().parents[2]
OWNER = """
import subprocess, sys, time
from pathlib import Path
from protocol.holds import Hold, inherited
hold = Hold.of_new("rlsys-", Path(sys.argv[1]))
child = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=sys.stdin, pass_fds=inherited())
print(hold.directory, child.pid, flush=True)
time.sleep(600)
"""


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def left_in(parent: Path, name: str) -> Path:
    """What a killed process of this host leaves."""
    hold = Hold(parent / name)
    (hold.directory / "keys.json").write_text("{}")
    (hold.directory / "logs").mkdir()
    hold.release()
    return hold.directory


def test_a_directory_stays_until_the_last_child_of_a_killed_owner_has_ended(tmp_path: Path) -> None:
    reader, writer = os.pipe()  # the child ends when the writing end is closed
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdin=reader, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        os.close(reader)
        assert owner.stdout is not None
        directory = Path(owner.stdout.readline().split()[0])
        (directory / "keys.json").write_text("{}")
        assert directory.stat().st_mode & 0o777 == 0o700
        assert sweep(tmp_path) == [], "its owner lives"
        owner.send_signal(signal.SIGKILL)
        owner.wait(60)
        assert sweep(tmp_path) == [], "its child lives"
        assert (directory / "keys.json").exists()
    finally:
        os.close(writer)
        owner.kill()
        owner.wait(60)
        if owner.stdout:
            owner.stdout.close()
    until(lambda: sweep(tmp_path) == [directory], "nobody holds it any more")
    assert not directory.exists()


def test_what_is_not_surely_ours_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept = left_in(tmp_path, f"{PREFIX}left")
    elsewhere = tmp_path / "elsewhere"
    kept = [
        left_in(tmp_path, "another-prefix"),
        left_in(elsewhere, f"{PREFIX}elsewhere"),
        tmp_path / f"{PREFIX}without-users",
        left_in(tmp_path, f"{PREFIX}of-another-host"),
        left_in(tmp_path, f"{PREFIX}never-locked"),
    ]
    kept[2].mkdir()
    (kept[3] / USERS).write_text("00000000-0000-4000-8000-000000000000\nanother-host\n")
    (kept[4] / USERS).write_text("")
    link = tmp_path / f"{PREFIX}link"
    link.symlink_to(kept[1])
    (tmp_path / f"{PREFIX}file").touch()
    assert sweep(tmp_path) == [swept]
    assert all(path.is_dir() for path in kept) and link.is_symlink()
    foreign = left_in(tmp_path, f"{PREFIX}foreign")
    with monkeypatch.context() as another_user:
        another_user.setattr(os, "getuid", lambda: foreign.stat().st_uid + 1)
        assert sweep(tmp_path) == []
    assert sweep(tmp_path) == [foreign]
    assert sweep(tmp_path / "nothing here") == []


def test_another_boot_of_this_host_and_another_container_of_this_machine_are_swept(tmp_path: Path) -> None:
    boot, name = holds._host().splitlines()
    for i, text in enumerate((f"00000000-0000-4000-8000-000000000000\n{name}\n", f"{boot}\nanother-container\n")):
        (left_in(tmp_path, f"{PREFIX}{i}") / USERS).write_text(text)
    assert len(sweep(tmp_path)) == 2


def test_nothing_that_is_held_is_swept_however_the_two_meet(tmp_path: Path) -> None:
    before, over = inherited(), threading.Event()  # other tests of this process may hold something
    sweeper = threading.Thread(target=lambda: [sweep(tmp_path) for _ in iter(over.is_set, True)])
    found: list[str] = []

    def make() -> None:
        for i in range(32):
            hold = Hold.of_new(PREFIX, tmp_path) if i % 2 else Hold(tmp_path / f"{PREFIX}shared")
            mark = hold.directory / f"mark-{threading.get_ident()}"
            mark.touch()
            sweep(tmp_path)
            if not mark.exists():
                found.append(str(mark))
            hold.remove() if i % 4 == 1 else hold.leave() if i % 4 == 2 else hold.release()

    makers = [threading.Thread(target=make) for _ in range(3)]
    for thread in (sweeper, *makers):
        thread.start()
    for thread in makers:
        thread.join(300)
    over.set()
    sweeper.join(300)
    sweep(tmp_path)
    assert (found, list(tmp_path.iterdir()), sorted(inherited())) == ([], [], sorted(before))


def test_one_may_hold_what_others_made_and_the_last_to_leave_removes_it(tmp_path: Path) -> None:
    before = inherited()
    first = Hold(tmp_path / f"{PREFIX}cache")
    second = Hold.beside(first.directory)
    assert second is not None
    assert len(inherited()) == len(before) + 2
    first.leave()
    assert first.directory.exists()
    second.leave()
    assert not first.directory.exists() and sorted(inherited()) == sorted(before)
    assert Hold.beside(first.directory) is None
    (tmp_path / "plain").mkdir()
    assert Hold.beside(tmp_path / "plain") is None and list((tmp_path / "plain").iterdir()) == []
    with Hold.of_new(PREFIX, tmp_path) as directory:
        (directory / "file").touch()
    assert not directory.exists()


def test_an_interrupt_as_soon_as_the_directory_stands_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, made, mkdir = inherited(), list[str](), os.mkdir

    def interrupted(path: str, *arguments: int) -> None:
        mkdir(path, *arguments)
        made.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Hold.of_new(PREFIX, tmp_path)
    assert len(made) == 1 and list(tmp_path.iterdir()) == [] and sorted(inherited()) == sorted(before)
