"""Where the environments of engines lie that run in an interpreter of their own. `rlsys engines install` makes them, the engines find them."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import ConfigError

READY = "rlsys-engine.json"
"""Written last: an environment without it is unfinished."""


@dataclass(frozen=True, slots=True)
class Environment:
    """A finished environment."""

    engine: str
    device: str
    python: Path
    version: str
    """Of the engine's server."""
    lock: str
    """SHA-256 of what it was installed from."""


def environments_root() -> Path:
    """`engines` below RLSYS_CACHE, by default ~/.cache/rlsys."""
    return Path(os.environ.get("RLSYS_CACHE") or "~/.cache/rlsys").expanduser() / "engines"


def environment_dir(engine: str, device: str) -> Path:
    """Where `rlsys engines install ENGINE --device DEVICE` puts an environment unless told otherwise."""
    return environments_root() / f"{engine}-{device}"


def read_environment(directory: Path) -> Environment | None:
    """The environment in `directory`; None when there is none, or an unfinished one."""
    try:
        content = json.loads((directory / READY).read_text())
        found = Environment(content["engine"], content["device"], directory / "bin" / "python", content["version"], content["lock"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.python.exists() else None


def find_python(engine: str, device: str, given: Path | None) -> Path:
    """The interpreter of an engine's server: the one that is configured, or that of the environment of this device.

    Raises ConfigError that says how to get one.
    """
    if given is not None:
        _demand_package(engine, given)
        return given
    found = read_environment(environment_dir(engine, device))
    if found is None:
        raise ConfigError(f"{engine} engine: {missing_environment(engine, device)}")
    return found.python


def missing_environment(engine: str, device: str) -> str:
    """Empty if the environment is there, else how to get it."""
    directory = environment_dir(engine, device)
    if read_environment(directory) is not None:
        return ""
    return f"no environment in {directory}; make it with: rlsys engines install {engine} --device {device} (or make {engine} SGLANG_DEVICE={device})"


def _demand_package(engine: str, python: Path) -> None:
    """Raise ConfigError for an interpreter that is none, or lacks the engine's package. Imports nothing there: that would take seconds."""
    where = f"{engine} engine: python is {python}"
    if not python.is_file() or not os.access(python, os.X_OK):
        raise ConfigError(f"{where}, which is no program that can be run")
    code = "import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]) is not None)"
    try:
        done = subprocess.run(
            [str(python), "-I", "-c", code, engine], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{where}, which cannot be run ({error})") from None
    if done.stdout.strip() == "False":
        raise ConfigError(f"{where}, which has no {engine}; make an environment with: rlsys engines install {engine}")
    if done.returncode or done.stdout.strip() != "True":
        raise ConfigError(f"{where}, which is no Python interpreter")
