"""The dashboard's real loop: what is sent to it stands in the files that people and tools read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from protocol.messages import Event, Intervals, Metrics, Snapshot
from rlsys import dashboard
from rlsys.config import parse_config
from rlsys.dashboard import Dashboard
from rlsys.fleets import RATE_WINDOW_S, Fleets, role_of
from rlsys.overlap import idle_share, read_intervals
from rlsys.report import read_iterations
from tests.configuration import minimal
from tests.ring import Ring

DASHBOARD = "dashboard-0@1"


def metrics(identity: str, iteration: int, time_s: float = 0.0, **values: float) -> Metrics:
    return Metrics(identity=identity, iteration=iteration, time_s=time_s, values={k.replace("__", "/"): v for k, v in values.items()})


def intervals(identity: str, *rows: tuple[str, float, float]) -> Intervals:
    names = sorted({name for name, *_ in rows})
    table = np.array([(names.index(name), start * 1e6, end * 1e6, -1, -1) for name, start, end in rows], np.int64)
    return Intervals(identity=identity, names=names, rows=table, offset_s=1000.0)


def test_counters_become_rates_and_waits_become_idle_shares() -> None:
    fleets = Fleets()
    fleets.gauge("generator-0@1", {"generator/tokens": 100.0})
    fleets.gauge("generator-1@1", {"generator/tokens": 50.0, "generator/running": 2.0})
    assert "throughput/sampled_tokens_per_s" not in fleets.window(10.0), "one moment has no rate"
    fleets.gauge("generator-0@1", {"generator/tokens": 400.0, "generator/running": 3.0})
    fleets.intervals(intervals("generator-0@1", ("decode", 0, 3), ("waiting:tasks", 3, 4)))
    fleets.intervals(intervals("generator-1@1", ("decode", 0, 1), ("waiting:tasks", 1, 4)))
    values = fleets.window(10.0 + RATE_WINDOW_S)
    assert values["throughput/sampled_tokens_per_s"] == pytest.approx(300 / RATE_WINDOW_S)
    assert values["idle/generator"] == pytest.approx(4 / 8)
    assert fleets.queues()["queues/samples_running"] == 5.0
    assert "idle/generator" not in fleets.window(20.0), "nothing was recorded since"


def test_figures_of_this_moment_do_not_wait_for_an_iteration() -> None:
    fleets = Fleets()
    fleets.gauge("generator-0@1", {"generator/tokens": 100.0})
    assert fleets.live(10.0) == {}, "one moment has no rate"
    fleets.gauge("generator-0@1", {"generator/tokens": 400.0})
    fleets.intervals(intervals("generator-0@1", ("decode", 0, 3), ("waiting:tasks", 3, 4)))
    live = fleets.live(12.0)
    assert live["throughput/sampled_tokens_per_s"] == pytest.approx(150.0)
    assert live["idle/generator"] == pytest.approx(0.25)
    for second in range(13, 30):
        fleets.intervals(intervals("generator-0@1", ("waiting:tasks", second - 1, second)))
        live = fleets.live(float(second))
    assert (live["throughput/sampled_tokens_per_s"], live["idle/generator"]) == (0.0, 1.0), "what was is over"


@pytest.mark.parametrize(("identity", "role"), [("generator-0@1", "generator"), ("learner-12@3", "learner")])
def test_the_role_of_an_identity(identity: str, role: str) -> None:
    assert role_of(identity) == role


def test_what_is_observed_can_be_read_back(ring: Ring, tmp_path: Path) -> None:
    config = parse_config(minimal(tmp_path), "test")
    role = ring.run("dashboard", lambda node: Dashboard(node, config).run())
    learner, generator = (ring.link(f"{name}-0@1", "observe", DASHBOARD) for name in ("learner", "generator"))

    generator.tell(metrics("generator-0@1", -1, generator__tokens=100.0, generator__running=3.0))
    generator.tell(intervals("generator-0@1", ("decode", 0, 3), ("waiting:tasks", 3, 4)))
    ring.until(lambda: _newest(ring).get("sampled_tokens") == 100.0, "the gauges have come")
    learner.tell(metrics("learner-0@1", 0, 50.0, reward__mean=0.25, staleness__mean=0.0))
    learner.tell(metrics("learner-0@1", 1, 60.0, reward__mean=0.75, staleness__mean=1.0))
    learner.tell(metrics("generator-0@1", 7, 60.0, reward__mean=9.0))
    data = {"version": 2, "pass_at_1": 0.5, "problems": 4, "failed": 1, "samples": 8, "oldest_version": 2, "newest_version": 2}
    learner.tell(Event(identity="dispatcher-0@1", time_s=70.0, name="eval", data=data))
    ring.until(lambda: _newest(ring).get("iteration") == 2, "both iterations have come")
    newest = _newest(ring)
    assert (newest["iterations"], newest["rewards"], newest["last"]["staleness/mean"]) == (3, [0.25, 0.75], 1.0)
    assert newest["queues"]["queues/samples_running"] == 3.0
    learner.tell(metrics("learner-0@1", 2, 80.0, reward__mean=1.0, staleness__mean=1.0))
    ring.end(role)  # what is still on its way is taken in a last moment

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    scalars = {tag: [(s.step, s.value) for s in _scalars(board, tag)] for tag in board.Tags()["tensors"] if tag[0].isdigit()}
    assert scalars["1_learning/reward/mean"] == [(0, 0.25), (1, 0.75), (2, 1.0)], "the learner's numbers alone"
    assert scalars["1_learning/eval/pass_at_1"] == [(2, 0.5)]
    assert scalars["6_idle/idle/generator"] == [(0, 0.25)]

    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["iteration"], r["reward/mean"], r["time_s"]) for r in read_iterations(tmp_path)] == [
        (0, 0.25, 50.0), (1, 0.75, 60.0), (2, 1.0, 80.0),
    ]  # fmt: skip
    [event] = [r for r in records if r.get("event") == "eval"]
    assert event == {"time_s": 70.0, "identity": "dispatcher-0@1", "event": "eval", **data}
    assert next(r for r in records if "eval/pass_at_1" in r)["iteration"] == 2
    assert read_intervals(tmp_path, "generator-0") == [("decode", 1000.0, 1003.0), ("waiting:tasks", 1003.0, 1004.0)]
    assert idle_share(tmp_path, "generator-0") == pytest.approx(0.25)


def test_what_it_says_of_itself_does_not_keep_it_from_ending(ring: Ring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hears its own heartbeats' numbers twice a second, so two seconds of quiet never come if those count."""
    monkeypatch.setattr(dashboard, "QUIET_S", 2.0)
    monkeypatch.setattr(dashboard, "LATEST_S", 1e9)
    config = parse_config(minimal(tmp_path), "test")
    role = ring.run("dashboard", lambda node: Dashboard(node, config).run())
    ring.until(lambda: "memory/dashboard_0" in _newest(ring).get("memory", {}), "it has heard of itself")
    ring.end(role)
    assert not role.thread.is_alive()


def test_a_dashboard_goes_on_where_one_before_it_stopped(ring: Ring, tmp_path: Path) -> None:
    config = parse_config(minimal(tmp_path), "test")
    rows = [{"time_s": 5.0 + k, "iteration": k, "reward/mean": 0.25 * k, "staleness/mean": 1.0, "train/kl": None} for k in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"time_s": 8.0, "iter')
    role = ring.run("dashboard", lambda node: Dashboard(node, config).run())
    ring.until(lambda: _newest(ring), "the first snapshot")
    first = _newest(ring)
    assert (first["iteration"], first["rewards"], first["last"]["staleness/mean"]) == (3, [0.0, 0.25, 0.5], 1.0)
    learner = ring.link("learner-0@1", "observe", DASHBOARD)
    learner.tell(metrics("learner-0@1", 3, 80.0, reward__mean=1.0, staleness__mean=1.0))
    ring.until(lambda: _newest(ring)["iteration"] == 4, "the next iteration")
    learner.tell(metrics("learner-0@1", 4, 90.0, reward__mean=1.0, staleness__mean=1.0))
    ring.end(role)
    ring.until(lambda: _newest(ring)["iteration"] == 5, "the last number, told by a dashboard that leaves")
    assert [r["iteration"] for r in read_iterations(tmp_path)] == [0, 1, 2, 3, 4], "the torn line took nothing with it"


def _newest(ring: Ring) -> dict[str, Any]:
    snapshots = ring.control.of(Snapshot)
    return snapshots[-1].values if snapshots else {}


class _Scalar:
    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value


def _scalars(board: EventAccumulator, tag: str) -> list[_Scalar]:
    """Scalars as this writer stores them: tensors without dimensions."""
    from tensorboard.util.tensor_util import make_ndarray

    return [_Scalar(event.step, float(make_ndarray(event.tensor_proto))) for event in board.Tensors(tag)]


def test_who_has_left_holds_nothing_and_what_it_did_stays_counted() -> None:
    fleets = Fleets()
    for index in (0, 1):
        gauges = {"generator/tokens": 10.0, "generator/running": 4.0, "generator/capacity": 8.0, "process/rss_bytes": 1e6}
        fleets.gauge(f"generator-{index}@1", gauges)
    fleets.gauge("rewarder-1@1", {"rewarder/queued": 3.0, "rewarder/scored": 5.0, "verdict/accepted": 5.0})
    fleets.left("generator-1@1")
    fleets.left("rewarder-1@1")
    fleets.gauge("generator-1@1", {"generator/tokens": 11.0, "generator/running": 1.0})  # its last words
    now = fleets.now()
    assert (now["engine/tokens_total"], now["queues/samples_running"], now["engine/capacity"]) == (21.0, 4.0, 8.0)
    assert (now["sandbox/samples_total"], now["queues/completions_unscored"], now["verdict/accepted"]) == (5.0, 0.0, 5.0)
    assert "memory/generator_1" not in now and now["memory/generator_0"] == 1e6
