"""For `benchmarks.commit --rounds`: processes that put nothing on record. Such a run cannot survive a death; it only shows what the record costs.

`blank` makes a directory whose `sitecustomize` calls `remove` in every process of a run that has it on its PYTHONPATH.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STARTED_BY = """import sys
if "rlsys" in sys.orig_argv:
    from benchmarks.without_record import remove
    remove()
"""


def remove() -> None:
    """Journal and ledger of this process take everything and write nothing; a version still appears."""
    from protocol.journal import Journal
    from protocol.ledger import Ledger

    def publish(self: Ledger, number: int, incarnation: int, manifest_sha256: str, make_visible: Callable[[], object]) -> None:
        make_visible()

    changes: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (Journal, "append", lambda self, frames: self.position),
        (Journal, "sync", lambda self: None),
        (Ledger, "_write", lambda self, statement, rows: None),
        (Ledger, "publish", publish),
    )
    for owner, name, replacement in changes:
        getattr(owner, name)  # it must be there to be replaced
        setattr(owner, name, replacement)


@contextmanager
def blank(directory: Path) -> Iterator[None]:
    """Processes that are started in the block record nothing."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(STARTED_BY)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(directory), str(Path(__file__).parents[1]), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
