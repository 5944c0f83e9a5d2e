"""Every number that a run writes stands in docs/metrics.md, and TensorBoard holds the same names as metrics.jsonl."""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from protocol.intervals import ACTIVITIES
from rlsys.metrics import SECTIONS, exposed, tag
from rlsys.timeline import timeline
from rlsys.usage import read_rows, tracks
from tests.rlsys.test_timeline import validate
from tests.system.conftest import Run

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "metrics.md"
NAME = re.compile(r"`([a-z_]+/[a-z_0-9<>]+)`")


def documented() -> dict[str, str]:
    """Name -> its row. Rows that say "only" are of numbers that not every run has; "histogram" is a unit."""
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    return {name: row for row in rows for name in NAME.findall(row.split("|")[1])}


def test_names_of_a_run(config: dict[str, Any], start: Callable[..., Run], tmp_path: Path) -> None:
    """The run is scraped while its first rewards wait, and goes on then."""
    config["iterations"] = 2
    config["rewarders"] = {"reward": "tests.system.rewards:HangingReward", "options": {"file": str(tmp_path / "go")}}
    config["observe"] = {"prometheus": True, "samples_every": 2, "samples": 3}
    run = start(config)
    address = run.until(lambda status: status.get("prometheus"), "an address to scrape")
    assert address.startswith("http://127.0.0.1:")

    live = ["queues/groups_outstanding", *(f"idle/{role}" for role in ("dispatcher", "generator", "rewarder", "learner"))]

    def scraped(status: dict[str, Any]) -> bool:
        with urllib.request.urlopen(address, timeout=60) as response:
            text = response.read().decode()
        return all(f'{exposed(name)}{{run="run"}} ' in text for name in live)

    run.until(scraped, "numbers of this moment, of every role")
    (tmp_path / "go").touch()
    assert run.wait() == 0, run.err
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    names = {name for record in records if "iteration" in record for name in record if "/" in name}
    assert {"reward/mean", "staleness/max", "train/loss", "eval/pass_at_1", "idle/learner", "train/clip_share", "train/entropy"} <= names

    rows = documented()
    patterns = [re.compile(re.sub("<[a-z]+>", "[a-z_0-9]+", name)) for name in rows]
    assert not [name for name in sorted(names) if not any(pattern.fullmatch(name) for pattern in patterns)], "not documented"
    drawn = {name for name, row in rows.items() if "| histogram |" in row}
    always = {name for name, row in rows.items() if "<" not in name and "only " not in row} - drawn

    board = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"tensors": 0})
    board.Reload()
    plugins = {tag: board.SummaryMetadata(tag).plugin_data.plugin_name for tag in board.Tags()["tensors"]}
    of = {kind: {tag for tag, plugin in plugins.items() if plugin == kind} for kind in ("scalars", "histograms", "text")}
    assert of["scalars"] == {tag(name) for name in names}
    assert {tag(name) for name in always} <= of["scalars"], "every documented scalar is there"
    assert of["histograms"] == {tag(name) for name in drawn}
    assert {t.partition("/")[0] for t in of["scalars"]} == {section for section, _ in SECTIONS} - {"z_more"}
    assert [event.step for event in board.Tensors("1_learning/reward/mean")] == [0, 1]
    assert [event.step for event in board.Tensors("1_learning/eval/pass_at_1")] == [0, 2]
    lengths = make_ndarray(board.Tensors("3_data/data/completion_lengths")[0].tensor_proto)
    assert lengths[:, 2].sum() == 16, "every sample of the iteration has a place"
    assert of["text"] == {f"samples/{i}" for i in range(3)}
    text = make_ndarray(board.Tensors("samples/0")[0].tensor_proto)[0].decode()
    assert "accepted" in text
    assert "prompt" in text
    assert "completion" in text
    parameters = board.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert b"learner.optimizer.lr" in parameters.content
    assert "custom_scalars__config__" in plugins
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address, timeout=10)

    for track in tracks(run.path):
        rows = read_rows(run.path, track)
        assert {row.name for row in rows} <= set(ACTIVITIES), "an activity that the table in protocol/intervals.py lacks"
        recorded = sum(row.end_s - row.start_s for row in rows)
        assert recorded == pytest.approx(rows[-1].end_s - rows[0].start_s, rel=0.01), f"{track}: busy and idle sum to the wall time"
    assert timeline(run.path, None, as_json=False) == 0
    trace = json.loads((run.path / "trace.json").read_text())
    validate(trace)
    versions = {e["name"] for e in trace["traceEvents"] if e["ph"] == "f"}
    assert {"v0", "v1", "v2"} <= versions, "each version reached the generator"
