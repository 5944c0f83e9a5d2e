"""The newest numbers for Prometheus to scrape: the names of docs/metrics.md with "rlsys_" in front and "_" for "/", on loopback."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rlsys.metrics import exposed


class Exporter(Collector):
    """Serves on a free port of 127.0.0.1 until `close`."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        self._values: dict[str, float] = {}
        self._lock = threading.Lock()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        self._server, self._thread = start_http_server(0, addr="127.0.0.1", registry=registry)
        self.address = f"http://127.0.0.1:{self._server.server_port}/metrics"

    def update(self, values: Mapping[str, float]) -> None:
        """Newer numbers; those that are not named stay."""
        with self._lock:
            self._values.update({name: value for name, value in values.items() if math.isfinite(value)})

    def collect(self) -> Iterator[Metric]:
        """What one scrape sees."""
        with self._lock:
            values = dict(self._values)
        for name, value in sorted(values.items()):
            family = GaugeMetricFamily(exposed(name), f"{name}; see docs/metrics.md", labels=list(self._labels))
            family.add_metric(list(self._labels.values()), value)
            yield family

    def close(self) -> None:
        """Serve nothing more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
