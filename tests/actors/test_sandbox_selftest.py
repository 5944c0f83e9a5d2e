"""Isolation is proved before use, and refused with a remedy where the proof fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from actors.sandbox import selftest
from actors.sandbox.cell import Cell
from actors.sandbox.confine import PROFILES
from actors.sandbox.doctor import doctor_report
from actors.sandbox.pool import interpreter_trees
from actors.sandbox.runner import Sandbox
from protocol.errors import InfrastructureFault

ROOT = Path(__file__).resolve().parents[2]


def test_the_report_says_what_holds_and_why() -> None:
    report = doctor_report()
    assert set(report.profiles) == set(PROFILES) and report.profile in PROFILES
    assert report.profiles[report.profile] == "holds" and report.languages["python"] == "ready"
    assert report.profile in str(report) and f"{report.cells} cells" in str(report)


def test_a_probe_that_manages_something_is_told_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    leaky = selftest.PROBE.replace("did(child)", "True").replace('"mount": libc', '"mount": True or libc')
    monkeypatch.setattr(selftest, "PROBE", leaky)
    with pytest.raises(InfrastructureFault) as error:
        Sandbox(1)
    text = str(error.value)
    assert "a program could start a process, mount" in text and "user namespaces" in text and "landlock" in text


def test_a_probe_that_does_not_run_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "PROBE", "1 / 0")
    with pytest.raises(InfrastructureFault, match="run the probe"):
        Sandbox(1)


def test_a_cell_that_shows_a_host_directory_is_found_out() -> None:
    """The same probe, on a cell that was given /tmp's parent of the probe's secret: it must notice."""
    cell = Cell("namespaces", [*interpreter_trees(), "/home"], {})
    try:
        cell.wait_ready()
        holes = selftest.failures(cell)
    except InfrastructureFault as error:
        pytest.skip(f"no namespaces here: {error}")
    finally:
        cell.close()
    expected = ["list the home directories"] if any(Path("/home").iterdir()) else []
    assert holes == expected


WITHOUT_NAMESPACES = """
import sys
from actors.sandbox.doctor import doctor_report
from actors.sandbox.runner import Sandbox
from actors.sandbox import wire
from actors.sandbox.execution import Program
print(doctor_report().profile)
with Sandbox(1) as sandbox:
    print(sandbox.run(Program(kind=wire.PYTHON, content=b"print(6 * 7)")).stdout.decode())
"""


@pytest.mark.skipif(not all(map(shutil.which, ("unshare", "setpriv", "sysctl"))) or os.geteuid() != 0, reason="needs root and util-linux")
def test_landlock_where_namespaces_are_not_allowed() -> None:
    """In a user namespace in which no further one may be made, as in many containers."""
    command = 'echo 0 > /proc/sys/user/max_user_namespaces && echo 0 > /proc/sys/user/max_mnt_namespaces && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "bash", "-c", command, "bash", sys.executable, "-c", WITHOUT_NAMESPACES]
    finished = subprocess.run(inside, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    if "profile" not in finished.stderr and finished.returncode != 0 and "Permission denied" in finished.stderr:
        pytest.skip("this machine does not let namespaces be limited")
    assert finished.stdout.split() == ["landlock", "42"], finished.stderr[-2000:]
