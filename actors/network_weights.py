"""Everything that a generator needs on a host that does not see the learner's files: the host's cache, who fetches into it, who passes it on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from actors.fetcher import Fetcher, Provider
from actors.host_cache import HostCache
from protocol.node import Node
from protocol.pieces import ORIGIN
from protocol.shelf import Shelf


class NetworkWeights:
    """Made before the node starts, because it publishes addresses; closed by whoever made it."""

    def __init__(self, node: Node, directory: Path) -> None:
        self._node = node
        self._cache = HostCache(directory)
        self.directory = directory
        self._shelf = Shelf(node.transport, "passing", f"{node.spec.name}.{node.spec.start}.passing", directory)
        node.publish_address("passing", self._shelf.address)
        node.publish_address("cache", self._cache.key)
        self._shelf.start()
        self.fetcher = Fetcher(
            node.transport,
            node.identity,
            directory,
            self._cache.key,
            self._providers,
            recorder=node.track("weights", "waiting:announcement"),
            wake=node.wake,
        )

    def _providers(self) -> Mapping[str, Provider]:
        learner = {who: Provider("pieces", a["pieces"], ORIGIN) for who, a in self._node.peers_with("pieces").items()}
        hosts = {who: Provider("passing", a["passing"], a["cache"]) for who, a in self._node.peers_with("passing").items() if "cache" in a}
        return learner | hosts

    def gauges(self) -> dict[str, float]:
        """For the dashboard, in bytes since the start. Raises what ended the thread that passes versions on."""
        self._shelf.check()
        tally = self.fetcher.tally
        return {
            "weights/received_bytes_total": float(tally.received_bytes),
            "weights/reused_bytes_total": float(tally.reused),
            "weights/passed_bytes_total": float(self._shelf.sent_bytes),
        }

    def close(self) -> None:
        """End both threads, and leave the cache."""
        self.fetcher.close()
        self._shelf.close()
        self._cache.leave()
