"""Directories that are made once and found again: ~/.cache/rlsys/quickstart/<name>, or below RLSYS_CACHE.

The name carries a fingerprint of everything that determines the content. An entry is written aside and renamed, and lists the SHA-256
of its files, so that a torn or edited one is noticed and made anew. Two processes that miss at the same time both build; the first wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from protocol.errors import DataError

_LISTING = "entry.json"


def fingerprint(sources: Iterable[str], distributions: Iterable[str], *settings: object) -> str:
    """16 hex digits that change with our source files ("package/file.py"), the versions of libraries and Python, and the settings.

    Whole files are hashed: a changed comment costs one rebuild, a missed change would cost a wrong model.
    """
    digest = hashlib.sha256()
    for source in sources:
        package, _, name = source.rpartition("/")
        digest.update(f"{source} ".encode() + (importlib.resources.files(package.replace("/", ".")) / name).read_bytes())
    facts = [f"{name} {version(name)}" for name in distributions] + [f"python {platform.python_version()}"]
    digest.update(repr((facts, settings)).encode())
    return digest.hexdigest()[:16]


def cache_root() -> Path:
    """Where the quickstart's entries lie."""
    return Path(os.environ.get("RLSYS_CACHE") or "~/.cache/rlsys").expanduser() / "quickstart"


STALE_S = 7200.0


def ensure_entry(name: str, build: Callable[[Path], None]) -> tuple[Path, bool]:
    """The directory of entry `name`, and whether it was there already.

    If it was not, or was broken, `build` fills an empty directory, which then takes its place. Raises DataError when the cache
    cannot be written; what `build` raises passes through and leaves no trace.
    """
    target = cache_root() / name
    if is_whole(target):
        return target, True
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob("*.building"):  # of a builder that was killed: none takes an hour
            with contextlib.suppress(FileNotFoundError):  # its builder, or another one's sweep, came first
                if time.time() - stale.stat().st_mtime > STALE_S:
                    shutil.rmtree(stale, ignore_errors=True)
    except OSError as error:
        raise _unwritable(target.parent, error) from error
    aside = _beside(target)
    try:  # the directory is made inside: an interrupt may come as soon as it stands, before a call that made it returns its name
        try:
            aside.mkdir(mode=0o700)
        except OSError as error:
            raise _unwritable(target.parent, error) from error
        build(aside)
        files = {str(path.relative_to(aside)): _sha256(path) for path in sorted(aside.rglob("*")) if path.is_file()}
        (aside / _LISTING).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
        _install(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target, False


def is_whole(directory: Path) -> bool:
    """Whether the entry's listing can be read and every file in it has its recorded content."""
    try:
        files = json.loads((directory / _LISTING).read_text(encoding="utf-8"))["files"]
        return all(_sha256(directory / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _install(aside: Path, target: Path) -> None:
    """Rename `aside` to `target`, in place of a broken entry, unless another process has put a whole one there meanwhile."""
    if target.exists() and not is_whole(target):
        broken = _beside(target)
        with contextlib.suppress(FileNotFoundError):  # another process came first
            target.replace(broken)
        shutil.rmtree(broken, ignore_errors=True)
    try:
        aside.replace(target)
    except OSError:
        if not is_whole(target):
            raise


def _beside(target: Path) -> Path:
    """A name that nobody else has, which a later call sweeps away should this process be killed."""
    return target.with_name(f"{target.name}.{secrets.token_hex(4)}.building")


def _unwritable(cache: Path, error: OSError) -> DataError:
    return DataError(f"cannot write the quickstart's cache {cache}: {error.strerror}; name another place in RLSYS_CACHE.")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
