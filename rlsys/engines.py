"""`rlsys engines install`: the environment of an engine whose server cannot live in ours, from a lock file in `rlsys/engine_files`.

    <engine>-<device>.txt   what goes in: lines of pip, and `#: key value` lines about the whole
    standins.py             (cpu) packages that only a GPU needs, as modules that import and do nothing
    seeds.py                a plug-in of the SGLang server that draws each sample from its own seed

Every step can be repeated: pip skips what is there, and the record of success is written last. So an install that broke off is
continued by running it again, and one that is complete is left alone unless the files changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.resources
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from actors.engines.environments import READY, environment_dir, read_environment
from protocol.errors import ConfigError

ENGINES = {"sglang": ("cpu", "cuda")}
"""Engines that live in an environment of their own -> devices there is a lock file for."""

_FILES = importlib.resources.files("rlsys") / "engine_files"
_PLUGIN = """Metadata-Version: 2.1
Name: rlsys-sglang
Version: {version}
Summary: Draws each sample of an SGLang server from its own seed.
"""


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock file: `requirements` go in without their dependencies, after `torch`, which brings its own."""

    engine: str
    device: str
    server: str
    torch: str
    requirements: str
    num_packages: int
    download_mb: int
    disk_mb: int
    digest: str
    """Of everything that the environment is made from."""


def read_lock(engine: str, device: str) -> Lock:
    """The lock file of an engine. Raises ConfigError for one that there is not."""
    if engine not in ENGINES:
        raise ConfigError(f"engine {engine!r} has no environment of its own; those that do: {', '.join(ENGINES)}")
    if device not in ENGINES[engine]:
        raise ConfigError(f"device {device!r}: {engine} has lock files for {', '.join(ENGINES[engine])}")
    text = (_FILES / f"{engine}-{device}.txt").read_text()
    facts = dict(line[3:].split(None, 1) for line in text.splitlines() if line.startswith("#: "))
    requirements = "".join(f"{line}\n" for line in text.splitlines() if line and not line.startswith("#"))
    digest = hashlib.sha256(text.encode())
    for name in ("standins.py", "seeds.py"):
        digest.update((_FILES / name).read_bytes())
    return Lock(
        engine, device, facts["server"].split()[-1], facts["torch"], requirements, requirements.count("\n"),
        int(facts["download_mb"]), int(facts["disk_mb"]), digest.hexdigest(),
    )  # fmt: skip


def install(engine: str, device: str, directory: Path | None, *, as_json: bool, dry_run: bool = False) -> int:
    """Make the environment, or find it complete. Raises ConfigError when it cannot be made; running it again goes on from there.

    With `dry_run` only say what would be done.
    """
    lock = read_lock(engine, device)
    target = (directory or environment_dir(engine, device)).expanduser().resolve()

    def say(text: str) -> None:
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    started = time.monotonic()
    found = read_environment(target)
    fresh = found is None or found.lock != lock.digest
    if dry_run:
        ready = "there is another state of it, which would be brought up to date" if fresh and found is not None else "it is not there yet"
        say(f"{_plan(lock, target)}: {ready if fresh else 'it is there, nothing would be done'}")
        if as_json:
            print(json.dumps({"engine": engine, "device": device, "version": lock.server, "directory": str(target), "packages": lock.num_packages,
                              "download_mb": lock.download_mb, "disk_mb": lock.disk_mb, "needed": fresh}))  # fmt: skip
        return 0
    if fresh:
        with _only_one(target):
            found = read_environment(target)  # another one may just have made it
            if found is None or found.lock != lock.digest:
                _make(lock, target, say)
        found = read_environment(target)
    if found is None:
        raise ConfigError(f"{target}: the environment vanished while it was made")
    seconds = time.monotonic() - started
    if as_json:
        print(json.dumps({"engine": engine, "device": device, "python": str(found.python), "version": found.version, "installed": fresh,
                          "seconds": round(seconds, 1)}))  # fmt: skip
    else:
        say(f"{engine} {found.version} for {device} is ready: {found.python}" + (f" ({seconds:.0f} s)" if fresh else " (nothing to do)"))
    return 0


def _plan(lock: Lock, target: Path) -> str:
    return (
        f"{lock.engine} {lock.server} for {lock.device}: {lock.torch} with its dependencies and {lock.num_packages} packages, "
        f"about {lock.download_mb} MB to download and {lock.disk_mb} MB on disk, into {target}"
    )


def _make(lock: Lock, target: Path, say: Callable[[str], None]) -> None:
    say(_plan(lock, target))
    room = shutil.disk_usage(_existing(target)).free / 1e6
    if room < lock.disk_mb and not (target / "bin").exists():
        raise ConfigError(f"{target}: {room:.0f} MB are free, {lock.disk_mb} MB are needed")
    (target / READY).unlink(missing_ok=True)
    python = target / "bin" / "python"
    if not (target / "bin" / "pip").exists():  # a virtual environment that was cut off has no pip yet
        _run([sys.executable, "-m", "venv", str(target)], say, "make a virtual environment")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-input"]
    _run([*pip, lock.torch], say, f"install {lock.torch}")
    requirements = target / "requirements.txt"
    requirements.write_text(lock.requirements)
    _run([*pip, "--no-deps", "-r", str(requirements)], say, f"install {lock.num_packages} packages")
    site = Path(_output([str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]))
    write_plugin(site)
    if lock.device == "cpu":
        shutil.copyfile(str(_FILES / "standins.py"), site / "sitecustomize.py")
    say("  look whether it imports")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"SGLANG_USE_CPU_ENGINE": "1"}
    code = "import sglang.srt.entrypoints.http_server; from importlib.metadata import version; print(version('sglang'))"
    version = _output([str(python), "-c", code], environment if lock.device == "cpu" else None).splitlines()[-1]
    content = {"engine": lock.engine, "device": lock.device, "version": version, "lock": lock.digest}
    (target / READY).write_text(json.dumps(content, indent=1) + "\n")


def write_plugin(site: Path) -> None:
    """The plug-in as an installed distribution in `site`, a directory on the server's path, which is where SGLang looks for plug-ins."""
    shutil.copyfile(str(_FILES / "seeds.py"), site / "rlsys_sglang_seeds.py")
    about = site / "rlsys_sglang-1.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(_PLUGIN.format(version=1))
    (about / "entry_points.txt").write_text("[sglang.srt.plugins]\nrlsys_seeds = rlsys_sglang_seeds:register\n")


@contextmanager
def _only_one(target: Path) -> Iterator[None]:
    """Hold the lock of this environment; a second installer waits for the first."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = (target.parent / f".{target.name}.lock").open("w")
    except OSError as error:
        raise ConfigError(f"{target}: cannot be made ({error.strerror})") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _run(command: list[str], say: Callable[[str], None], what: str) -> None:
    say(f"  {what}")
    _output(command)


def _output(command: list[str], environment: dict[str, str] | None = None) -> str:
    """What a command prints. Raises ConfigError with the end of what it said when it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()][-8:]
        raise ConfigError(
            f"{' '.join(command[:5])} ... failed with exit code {done.returncode}; run the same command again to go on from here\n"
            + "\n".join(f"  | {line}" for line in last)
        )
    return done.stdout.strip()
