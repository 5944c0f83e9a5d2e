"""Loggers behind one interface: those whose library is here write and can be read back; one that breaks does not end a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from protocol.errors import ConfigError
from protocol.messages import Distribution, Event, Metrics
from protocol.registry import resolve
from rlsys.config import parse_config
from rlsys.dashboard import Dashboard, _fenced
from rlsys.loggers import LOGGERS, LoggedRun, Logger
from rlsys.metrics import exposed, section, tag
from rlsys.prometheus import Exporter
from tests.configuration import minimal
from tests.ring import Ring

LIBRARY = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}


class BrokenLogger:
    """Fails at the second iteration."""

    def __init__(self, run: LoggedRun) -> None:
        self._file = run.run_dir / "broken.txt"

    def scalars(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        if step:
            raise OSError("the disk is full")
        self._file.write_text(json.dumps(sorted(values)))

    def histogram(self, step: int, time_s: float, name: str, edges: Sequence[float], counts: Sequence[int]) -> None: ...

    def text(self, step: int, time_s: float, name: str, markdown: str) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoggedRun:
    monkeypatch.chdir(tmp_path)
    for name, value in (
        ("WANDB_MODE", "offline"),
        ("WANDB_SILENT", "true"),
        ("MLFLOW_ALLOW_FILE_STORE", "true"),
        ("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri()),
    ):
        monkeypatch.setenv(name, value)
    return LoggedRun(name="r", run_dir=tmp_path, config={"learner": {"lr": 0.1, "name": "grpo", "on": True, "none": None}, "list": [1, 2]})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOGGERS)
def test_every_logger_takes_everything(run: LoggedRun, name: str) -> None:
    try:
        logger: Logger = resolve(name, LOGGERS, "logger")(run)
    except ConfigError as error:
        assert f"pip install 'rlsys[{name}]'" in str(error)
        pytest.skip(f"{LIBRARY[name]} is not installed")
    logger.scalars(0, 1.0, {"reward/mean": 0.5, "train/loss": float("nan")})
    logger.histogram(0, 1.0, "data/completion_lengths", [0.0, 1.0, 2.0], [3, 4])
    logger.text(0, 1.0, "samples/0", "**text**")
    logger.scalars(1, 2.0, {"reward/mean": 0.75})
    logger.close()
    written = [path for path in run.run_dir.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in written) > 0


def test_what_tensorboard_reads_back(run: LoggedRun) -> None:
    logger: Logger = resolve("tensorboard", LOGGERS, "logger")(run)
    for step in range(3):
        logger.scalars(step, float(step), {"reward/mean": step / 2, "memory/learner_0": 1e6})
        logger.histogram(step, float(step), "train/ratios", [0.0, 1.0, 2.0], [step, 4])
        logger.text(step, float(step), "samples/0", f"text {step}")
    logger.close()
    board = EventAccumulator(str(run.run_dir / "tensorboard"), size_guidance={"tensors": 0})
    board.Reload()
    assert [float(make_ndarray(e.tensor_proto)) for e in board.Tensors("1_learning/reward/mean")] == [0.0, 0.5, 1.0]
    assert [e.wall_time for e in board.Tensors("9_processes/memory/learner_0")] == [0.0, 1.0, 2.0]
    np.testing.assert_array_equal(make_ndarray(board.Tensors("2_optimisation/train/ratios")[2].tensor_proto), [[0, 1, 2], [1, 2, 4]])
    assert make_ndarray(board.Tensors("samples/0")[1].tensor_proto)[0] == b"text 1"


def test_a_logger_that_breaks_is_reported_and_left_out(ring: Ring, tmp_path: Path) -> None:
    config = parse_config({**minimal(tmp_path), "observe": {"loggers": ["tests.rlsys.test_loggers:BrokenLogger", "tensorboard"]}}, "test")
    role = ring.run("dashboard", lambda node: Dashboard(node, config).run())
    learner = ring.link("learner-0@1", "observe", "dashboard-0@1")
    for step in range(3):
        learner.tell(Metrics(identity="learner-0@1", iteration=step, time_s=float(step), values={"reward/mean": 0.5}))
    spread = {"name": "train/ratios", "edges": np.array([0, 1], np.float32), "counts": np.array([7], np.int64)}
    learner.tell(Distribution(identity="learner-0@1", iteration=2, time_s=2.0, **spread))
    ring.until(lambda: [e for e in ring.control.of(Event) if e.name == "logger failed"], "the failure is told")
    [event] = [e for e in ring.control.of(Event) if e.name == "logger failed"]
    assert "the disk is full" in event.data["error"]
    ring.end(role)
    assert "reward/mean" in json.loads((tmp_path / "broken.txt").read_text())
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    board.Reload()
    assert [e.step for e in board.Tensors("1_learning/reward/mean")] == [0, 1, 2], "the others go on"
    assert [e.step for e in board.Tensors("2_optimisation/train/ratios")] == [2]


def test_parameters_are_flat(run: LoggedRun) -> None:
    assert run.parameters() == {"learner.lr": 0.1, "learner.name": "grpo", "learner.on": True, "list": "[1, 2]"}


def test_names_of_a_metric() -> None:
    assert (section("verdict/wrong"), section("nobody/knows")) == ("7_sandbox", "z_more")
    assert tag("reward/mean") == "1_learning/reward/mean"
    assert exposed("idle/generator_tasks") == "rlsys_idle_generator_tasks"


def test_an_exporter_ends_and_keeps_to_loopback() -> None:
    exporter = Exporter({"run": "a"})
    try:
        exporter.update({"reward/mean": 0.5, "train/loss": float("nan")})
        assert [metric.name for metric in exporter.collect()] == ["rlsys_reward_mean"]
        assert exporter.address.startswith("http://127.0.0.1:")
    finally:
        exporter.close()


def test_text_with_fences_stays_text() -> None:
    assert _fenced("prompt", "a ``` b ````").count("`````") == 2
