"""Lanes: how new weights get from the published directory into an SGLang server. The directory is verified before, whatever the lane.

| lane | how | fit for |
|---|---|---|
| disk | the server reads the published files (in memory, where the directory is in /dev/shm) | every server, the default |
| tensor | the actor reads them and shares each piece: CUDA IPC on a GPU, shared memory on a CPU | one host |
| distributed | the actor is rank 0 of a group with the server's ranks and broadcasts: NCCL, on a CPU Gloo | several hosts |
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from protocol.errors import InfrastructureFault

Post = Callable[[str, dict[str, Any]], dict[str, Any]]
"""(path, body) -> the server's answer; raises InfrastructureFault for one that is no success."""


class PartlyLoaded(InfrastructureFault):
    """An update broke off after some tensors: the server's weights are of no version."""


class Lane(Protocol):
    """One way."""

    def update(self, directory: Path, version: str, flush: bool) -> None:
        """Load all tensors of `directory` under the label `version`; `flush` empties the prefix cache.

        Raises WeightsError or InfrastructureFault and leaves the old weights, or PartlyLoaded when some are new.
        """


class DiskLane:
    """The server reads the files itself."""

    def __init__(self, post: Post) -> None:
        self._post = post

    def update(self, directory: Path, version: str, flush: bool) -> None:
        """One request; the server answers when the weights are in place."""
        self._post(
            "/update_weights_from_disk",
            {"model_path": str(directory), "load_format": "safetensors", "weight_version": version, "flush_cache": flush},
        )


def make_lane(name: str, post: Post, device: str, server: tuple[int, ...], tp: int) -> Lane:
    """The lane of that name to a server of version `server` with `tp` ranks."""
    if name == "disk":
        return DiskLane(post)
    from actors.engines.tensor_lanes import DistributedLane, TensorLane  # they import torch, which the disk lane does not need

    return (TensorLane if name == "tensor" else DistributedLane)(post, device, server, tp)
