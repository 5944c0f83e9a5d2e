"""TensorBoard's event files. The only file that imports tensorboard; neither TensorFlow nor torch is needed.

Tags are section/name, as in "1_learning/reward/mean": TensorBoard sorts sections by name, so that they read in order. A second view, the
custom scalars page, puts the few most telling curves of each section side by side.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalars
from tensorboard.plugins.histogram import metadata as histograms
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.scalar import metadata as scalars
from tensorboard.plugins.text import metadata as texts
from tensorboard.summary import Writer
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from rlsys.loggers import LoggedRun
from rlsys.metrics import BEST_CURVES, tag


def curves(directory: Path) -> Any:
    """A plain writer of scalars into `directory`, for training without a run directory; here because tensorboard has this one door."""
    return Writer(str(directory))


class TensorBoardLogger:
    """Writes `tensorboard/` of the run directory."""

    def __init__(self, run: LoggedRun) -> None:
        self._writer = EventFileWriter(str(run.run_dir / "tensorboard"))
        self._described: set[str] = set()
        self._write(0, time.time(), _layout())
        self._write(0, time.time(), hparams.hparams_pb(run.parameters(), trial_id=run.name, start_time_secs=time.time()))
        self._writer.flush()

    def scalars(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """Flushed at once, so that a page that is open shows them."""
        summary = Summary()
        for name, value in values.items():
            self._add(summary, tag(name), np.float32(value), scalars.create_summary_metadata("", ""))
        self._write(step, time_s, summary)
        self._writer.flush()

    def histogram(self, step: int, time_s: float, name: str, edges: Sequence[float], counts: Sequence[int]) -> None:
        """As rows (left, right, count)."""
        rows = np.stack([np.array(edges[:-1]), np.array(edges[1:]), np.array(counts)], axis=1).astype(np.float64)
        summary = Summary()
        self._add(summary, tag(name), rows, histograms.create_summary_metadata("", ""))
        self._write(step, time_s, summary)

    def text(self, step: int, time_s: float, name: str, markdown: str) -> None:
        """Shown as Markdown."""
        summary = Summary()
        self._add(summary, name, np.array([markdown.encode()], dtype=object), texts.create_summary_metadata("", ""))
        self._write(step, time_s, summary)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()

    def _add(self, summary: Summary, name: str, value: object, metadata: SummaryMetadata) -> None:
        """A value; TensorBoard wants what it means with the first one alone."""
        entry = summary.value.add(tag=name, tensor=make_tensor_proto(value))
        if name not in self._described:
            self._described.add(name)
            entry.metadata.CopyFrom(metadata)

    def _write(self, step: int, time_s: float, summary: Summary) -> None:
        self._writer.add_event(Event(wall_time=time_s if math.isfinite(time_s) else time.time(), step=step, summary=summary))


def _layout() -> Summary:
    """The custom scalars page."""
    categories = [
        layout_pb2.Category(
            title=title,
            chart=[
                layout_pb2.Chart(title=chart, multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag(name)}$" for name in names]))
                for chart, names in charts
            ],
        )
        for title, charts in BEST_CURVES
    ]
    summary = Summary()
    summary.value.add(
        tag=custom_scalars.CONFIG_SUMMARY_TAG,
        tensor=make_tensor_proto(layout_pb2.Layout(category=categories).SerializeToString()),
        metadata=custom_scalars.create_summary_metadata(),
    )
    return summary
