"""`rlsys doctor`: what this machine can do for a run, each line found by trying, with the remedy where something is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from protocol.errors import InfrastructureFault

State = Literal["ok", "missing", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    state: State
    text: str


def doctor(*, as_json: bool) -> int:
    """Print the report; exit code 1 when model-written code could not be run in isolation."""
    findings = [_machine(), _memory(), *isolation(), *_languages(), _devices(), *_engines(), *_packages()]
    if as_json:
        print(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        for finding in findings:
            print(f"{finding.state:<8} {finding.name:<24} {finding.text}")
    return 1 if any(f.name == "isolation" and f.state == "missing" for f in findings) else 0


def isolation() -> list[Finding]:
    """Each profile tried on this machine: its probe program must fail at everything. The strongest that holds is used."""
    from actors.sandbox.confine import PROFILES
    from actors.sandbox.pool import CellPool

    who = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    findings: list[Finding] = []
    chosen = ""
    for profile in PROFILES:
        try:
            CellPool(1, profile).close()
        except InfrastructureFault as fault:
            findings.append(Finding(f"isolation: {profile}", "note", str(fault)))
            continue
        chosen = chosen or profile
        findings.append(Finding(f"isolation: {profile}", "ok", f"holds for {who}: a probe failed to escape"))
    text = f"model-written code runs under {chosen}" if chosen else "none: rewards that run code will refuse to start"
    return [Finding("isolation", "ok" if chosen else "missing", text), *findings]


def _machine() -> Finding:
    cores = len(os.sched_getaffinity(0))
    return Finding(
        "machine", "ok", f"{platform.system()} {platform.release()} {platform.machine()}, {cores} cores, Python {platform.python_version()}"
    )


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return Finding("memory", "ok", f"{total / 1e9:.1f} GB, {shm / 1e9:.1f} GB free in /dev/shm for published weights")


def _languages() -> list[Finding]:
    from actors.sandbox.languages import LANGUAGES
    from protocol.registry import resolve

    findings = []
    for name in LANGUAGES:
        missing = resolve(name, LANGUAGES, "language")().missing()
        findings.append(Finding(f"language: {name}", "note" if missing else "ok", missing or "can be judged"))
    return findings


def _devices() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("devices", "note", f"no CUDA device; torch {torch.__version__} uses the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("devices", "ok", f"{', '.join(names)}; torch {torch.__version__}")


def _engines() -> list[Finding]:
    from actors.engines.environments import environment_dir, read_environment
    from rlsys.engines import ENGINES

    findings = []
    for engine, devices in ENGINES.items():
        for device in devices:
            found = read_environment(environment_dir(engine, device))
            text = f"{found.version}, {found.python}" if found else f"not installed: rlsys engines install {engine} --device {device}"
            findings.append(Finding(f"engine: {engine} {device}", "ok" if found else "note", text))
    return findings


def _packages() -> list[Finding]:
    names = ("rlsys", "transformers", "pyzmq", "tensorboard")
    return [Finding(f"package: {name}", "ok", importlib.metadata.version(name)) for name in names]
