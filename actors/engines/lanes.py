"""Lanes: how new weights get from the published directory into an SGLang server. The directory is verified before, whatever the lane.

| lane | how | fit for |
|---|---|---|
| disk | the server reads the published files (in memory, where the directory is in /dev/shm) | every server, the default |
| tensor | the actor reads them and shares each piece: CUDA IPC on a GPU, shared memory on a CPU | one host |
| distributed | the actor is rank 0 of a group with the server's ranks and broadcasts: NCCL, on a CPU Gloo | several hosts |

NCCL refuses two ranks on one device, so the actor broadcasts from a device that no server has. Where there is none, as on a single GPU, the
broadcast goes through Gloo from the actor's memory.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from protocol.errors import ConfigError, InfrastructureFault

Post = Callable[[str, dict[str, Any]], dict[str, Any]]
"""(path, body) -> the server's answer; raises InfrastructureFault for one that is no success."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server as a lane needs to know it. Devices are counted as torch counts them in this process."""

    post: Post
    url: str
    version: tuple[int, ...]
    tp: int = 1
    """Its ranks."""
    device: str = "cpu"
    """cpu, cuda or cuda:N, as configured."""
    places: Sequence[int] = ()
    """Its devices; empty on a CPU, and where a server that runs already does not say."""
    taken: Sequence[int] = ()
    """Devices of all servers of this host, as far as they are known."""
    index: int = 0
    """Of the actor on this host."""


class PartlyLoaded(InfrastructureFault):
    """An update broke off after some tensors: the server's weights are of no version."""


class Lane(Protocol):
    """One way."""

    def update(self, directory: Path, version: str, flush: bool) -> None:
        """Load all tensors of `directory` under the label `version`; `flush` empties the prefix cache.

        Raises WeightsError or InfrastructureFault and leaves the old weights, or PartlyLoaded when some are, or may be, new.
        """

    def close(self) -> None:
        """Give up what is held for the server. It may be dead."""


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

    def close(self) -> None:
        """Nothing is held."""


def make_lane(name: str, target: Target) -> Lane:
    """The lane of that name. Raises ConfigError for one that cannot reach the server."""
    if name == "disk":
        return DiskLane(target.post)
    if name == "tensor" and not is_local(target.url):
        raise ConfigError(
            f"lane is tensor, which shares memory, but the server at {target.url} is on another host; use distributed or disk"
        )
    from actors.engines.tensor_lanes import DistributedLane, TensorLane  # they import torch, which the disk lane does not need

    return (TensorLane if name == "tensor" else DistributedLane)(target)


def is_local(url: str) -> bool:
    """Whether the server at `url` runs on this host: its address is one that this host can bind."""
    address = _resolve(url)
    if ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
        return True
    with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as probe:
        try:
            probe.bind((address[0], 0))
        except OSError:
            return False
    return True


def own_address(url: str) -> str:
    """This host's address as the server at `url` reaches it."""
    address = _resolve(url)
    with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])


def _resolve(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InfrastructureFault(f"{url}: the address cannot be resolved ({error})") from None
    return str(found[0][4][0]), port


def broadcasting_device(places: Sequence[int], taken: Sequence[int], visible: int, index: int) -> int | None:
    """From which of `visible` devices the actor `index` broadcasts to a server on `places`: one that no server has, spread over the actors,
    else one of another server; None if every device is the server's."""
    free = [place for place in range(visible) if place not in places and place not in taken]
    others = [place for place in range(visible) if place not in places]
    pool = free or others
    return pool[index % len(pool)] if pool else None
