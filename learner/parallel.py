"""The ranks of the learner: sums, bytes and barriers between them, each with a deadline.

Every rank sees the whole batch; it computes the gradient of its share, and the sum of all shares is the gradient of the batch. Sums are
taken in an order that depends on the number of ranks alone, and every rank gets the same bits. Only tensors travel (no pickle).
How a model that is too large for one rank is cut over them stands in `learner/sharding.py`.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from protocol.errors import DeadlineExceeded, InfrastructureFault


class Group(Protocol):
    """What the step and the trainer need of the ranks. Collective calls are made by all ranks in the same order."""

    rank: int
    size: int

    def sum(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over ranks."""

    def maximum(self, tensor: Tensor) -> None:
        """Replace `tensor` by its elementwise maximum over ranks."""

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Rank 0 gives bytes, the others None; all get rank 0's."""

    def barrier(self) -> None:
        """Return when all ranks are here. Raises DeadlineExceeded that names who is missing, where the backend knows."""

    def named(self, what: str) -> AbstractContextManager[None]:
        """Around collective calls that a library makes: a lost peer or a timeout becomes an error that names this rank and `what`."""

    def close(self) -> None:
        """Leave; a second call does nothing."""


class SingleProcess:
    """A group of one."""

    rank = 0
    size = 1

    def sum(self, tensor: Tensor) -> None:
        """The sum over one rank."""

    def maximum(self, tensor: Tensor) -> None:
        """The maximum over one rank."""

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """The bytes themselves."""
        if data is None:
            raise ValueError("broadcast_bytes: rank 0 must give the bytes")
        return data

    def barrier(self) -> None:
        """Always here."""

    def named(self, what: str) -> AbstractContextManager[None]:
        """Nobody to lose."""
        return nullcontext()

    def close(self) -> None:
        """Nothing to leave."""


def open_store(host: str, ranks: int, timeout_s: float) -> TCPStore:
    """Rank 0's meeting point, listening on a free port of `host` and of no other address: publish `store.port`, then pass the store to `join`.

    The socket is bound here, because a store that binds its own listens on every interface.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.bind(address)
        listener.listen()
        port = listener.getsockname()[1]
        return TCPStore(
            host, port, ranks, is_master=True, timeout=datetime.timedelta(seconds=timeout_s), wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip


def connect_store(host: str, port: int, ranks: int, timeout_s: float) -> TCPStore:
    """The other ranks' way to rank 0's store. Raises DeadlineExceeded when nobody listens there in time."""
    try:
        return TCPStore(host, port, ranks, is_master=False, timeout=datetime.timedelta(seconds=timeout_s), wait_for_workers=False)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise DeadlineExceeded(f"no learner rank 0 at {host}:{port} after {timeout_s:g} s") from error


def join(store: TCPStore, rank: int, size: int, *, device: torch.device, timeout_s: float) -> ProcessGroup:
    """Meet the other ranks over `store`: NCCL on CUDA, Gloo on a CPU. One group in a process at a time."""
    if _is_loopback(store.host):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else Gloo resolves the host's name, which a container may not know
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:
        raise _named(error, f"learner rank {rank} of {size}: the ranks did not meet at {store.host}:{store.port}", timeout_s) from error
    return ProcessGroup(rank, size, device, timeout_s)


class ProcessGroup:
    """Several ranks over torch.distributed."""

    def __init__(self, rank: int, size: int, device: torch.device, timeout_s: float) -> None:
        """Use `join`."""
        self.rank, self.size = rank, size
        self._device, self._timeout_s = device, timeout_s
        self._open = True

    def sum(self, tensor: Tensor) -> None:
        """Ring reduction: each part is summed once, in the order of the ring, and handed round."""
        self._collective("sum", lambda: dist.all_reduce(tensor, op=dist.ReduceOp.SUM))

    def maximum(self, tensor: Tensor) -> None:
        """Elementwise maximum over ranks."""
        self._collective("maximum", lambda: dist.all_reduce(tensor, op=dist.ReduceOp.MAX))

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Length first, then the bytes as a uint8 tensor."""
        if (self.rank == 0) != (data is not None):
            raise ValueError(f"broadcast_bytes: rank 0 gives bytes and the others None, rank {self.rank} did otherwise")
        length = torch.tensor([len(data or b"")], dtype=torch.int64, device=self._device)
        self._collective("broadcast", lambda: dist.broadcast(length, src=0))
        count = int(length.item())
        if not count:
            return b""
        buffer = torch.empty(count, dtype=torch.uint8) if data is None else torch.frombuffer(bytearray(data), dtype=torch.uint8)
        buffer = buffer.to(self._device)
        self._collective("broadcast", lambda: dist.broadcast(buffer, src=0))
        return buffer.cpu().numpy().tobytes()

    def barrier(self) -> None:
        """Wait for all ranks; Gloo names the missing ones."""
        if self._device.type == "cuda":
            self._collective("barrier", dist.barrier)
        else:
            limit = datetime.timedelta(seconds=self._timeout_s)
            self._collective("barrier", lambda: dist.monitored_barrier(timeout=limit, wait_all_ranks=self.rank == 0))

    @contextmanager
    def named(self, what: str) -> Iterator[None]:
        """Errors of the backend are told by its name in their text; any other error passes."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not any(word in str(error) for word in ("gloo", "Gloo", "NCCL")):
                raise
            raise _named(error, f"learner rank {self.rank} of {self.size}: {what} failed", self._timeout_s) from error

    def close(self) -> None:
        """Leave the group; what other ranks still wait for fails there."""
        if self._open:
            self._open = False
            dist.destroy_process_group()

    def _collective(self, what: str, call: object) -> None:
        try:
            call()  # type: ignore[operator]
        except RuntimeError as error:
            raise _named(error, f"learner rank {self.rank} of {self.size}: {what} failed", self._timeout_s) from error


def _named(error: RuntimeError, what: str, timeout_s: float) -> Exception:
    """Timeouts and lost peers, told apart by Gloo's and NCCL's words; the first line carries the reason."""
    text = str(error).splitlines()[0]
    if "imed out" in text or "imeout" in text:
        return DeadlineExceeded(f"{what} after {timeout_s:g} s: {text}")
    return InfrastructureFault(f"{what}: {text}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
