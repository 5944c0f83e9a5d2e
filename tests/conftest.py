"""What every package's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ring import Ring


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[Ring]:
    """The rest of a run; what was started on it is ended, also when the test fails."""
    with Ring(tmp_path) as ring:
        yield ring
