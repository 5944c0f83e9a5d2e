"""Where the environments of engines lie that run in an interpreter of their own. `rlsys engines install` makes them, the engines find them."""

from __future__ import annotations

import json
import os
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
        if not os.access(given, os.X_OK):
            raise ConfigError(f"{engine} engine: python is {given}, which is no program that can be run")
        return given
    directory = environment_dir(engine, device)
    found = read_environment(directory)
    if found is None:
        raise ConfigError(f"{engine} engine: no environment in {directory}; make it with: rlsys engines install {engine} --device {device}")
    return found.python
