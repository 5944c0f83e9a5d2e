"""TensorBoard beside a run: on loopback, on a free port, and gone with the run."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import pytest

from rlsys.board import Board
from rlsys.loggers import LoggedRun
from rlsys.loggers.tensorboard import TensorBoardLogger


def test_it_serves_while_the_run_lasts_and_not_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlsys.board.START_S", 600.0)
    logger = TensorBoardLogger(LoggedRun(name="r", run_dir=tmp_path))
    logger.scalars(0, 1.0, {"reward/mean": 0.5})
    logger.close()
    told: list[str] = []
    with Board(tmp_path / "tensorboard", told.append) as board:
        address = board.wait()
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address, timeout=300) as response:
            assert response.status == 200
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address, timeout=5)
