"""The two lanes that carry tensors instead of file names. The only engine file besides the embedded engine that imports torch.

Both read the verified files in this process and hand the tensors over in pieces of PIECE_BYTES, so that a device needs room for one piece
beside the model. SGLang's own interface for the `tensor` lane is a pickle, made by its own reducer for shared tensors; it goes from this
process to the server that this process started, over loopback, and nothing pickled is ever read here.
"""

from __future__ import annotations

import base64
import io
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors import SafetensorError, safe_open
from torch import Tensor

from actors.engines.lanes import PartlyLoaded, Post
from actors.engines.sglang_server import free_port
from protocol.errors import InfrastructureFault, WeightsError

PIECE_BYTES = 512 << 20
SESSION_SINCE = (0, 5, 21)
"""From here on updates stand between /begin_weight_update and /end_weight_update."""
GROUP = "rlsys_weights"
"""Begins the name of a group. Each has a number of its own, because a server that was started again is met in a new one."""
_numbers = itertools.count()
Send = Callable[[list[tuple[str, Tensor]], str | None, bool], None]
"""(piece, version with the last one, whether to flush)."""


def pieces(directory: Path, device: torch.device) -> Iterator[list[tuple[str, Tensor]]]:
    """All tensors of a weights directory on `device`, in lists of at most PIECE_BYTES. Raises WeightsError, before the first for files cut off."""
    piece: list[tuple[str, Tensor]] = []
    size = 0
    try:
        with ExitStack() as opened:  # every file first, which shows those that end early
            files = [
                opened.enter_context(safe_open(path, framework="pt", device="cpu")) for path in sorted(directory.glob("*.safetensors"))
            ]
            for file in files:
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    tensor = file.get_tensor(name).to(device)
                    if piece and size + tensor.nbytes > PIECE_BYTES:
                        yield piece
                        piece, size = [], 0
                    piece.append((name, tensor))
                    size += tensor.nbytes
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{directory}: cannot be read ({error})") from None
    if piece:
        yield piece


def send_all(directory: Path, device: torch.device, version: str, flush: bool, send: Send) -> None:
    """Hand each piece to `send`, the last one with the version. Raises PartlyLoaded when it breaks off between two of them."""
    sent, waiting = 0, None
    try:
        for piece in pieces(directory, device):
            if waiting is not None:
                send(waiting, None, False)
                sent += 1
            waiting = piece
        assert waiting is not None, f"{directory} was checked to hold tensors"
        send(waiting, version, flush)
    except (InfrastructureFault, WeightsError, RuntimeError) as error:
        if sent:
            raise PartlyLoaded(f"{directory}: the update broke off after {sent} pieces ({error})") from None
        raise


def _device(name: str) -> torch.device:
    return torch.device("cpu") if name == "cpu" else torch.device("cuda", torch.cuda.current_device())


class _Session:
    """Brackets an update where the server wants it; an update that broke off is closed as well, so that the next one can begin."""

    def __init__(self, post: Post, server: tuple[int, ...]) -> None:
        self._post, self._needed = post, server >= SESSION_SINCE

    def __enter__(self) -> None:
        if self._needed:
            self._post("/begin_weight_update", {})

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._needed:
            return
        try:
            self._post("/end_weight_update", {})
        except InfrastructureFault:
            if kind is None:
                raise


class TensorLane:
    """Shares each piece with the server: by CUDA IPC handles on a GPU, by shared memory on a CPU. Server and actor must be on one host."""

    def __init__(self, post: Post, device: str, server: tuple[int, ...], tp: int) -> None:
        self._post, self._server, self._tp = post, server, tp
        self._device = _device(device)
        torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]  # by name: the server is no child that could inherit descriptors

    def update(self, directory: Path, version: str, flush: bool) -> None:
        """One request per piece; the last one names the version and flushes."""
        with _Session(self._post, self._server):
            send_all(directory, self._device, version, flush, self._send)

    def _send(self, piece: list[tuple[str, Tensor]], version: str | None, flush: bool) -> None:
        buffer = io.BytesIO()
        try:
            ForkingPickler(buffer).dump([(name, tensor.contiguous()) for name, tensor in piece])
        except (RuntimeError, OSError) as error:
            raise WeightsError(f"{sum(t.nbytes for _, t in piece)} bytes cannot be put into shared memory ({error})") from None
        text = base64.b64encode(buffer.getvalue()).decode()
        body: dict[str, Any] = {"serialized_named_tensors": [text] * self._tp, "flush_cache": flush}
        if version is not None:
            body["weight_version"] = version
        self._post("/update_weights_from_tensor", body)
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]


class DistributedLane:
    """Broadcasts from this process, rank 0, to the server's ranks: NCCL between GPUs, also across hosts; Gloo on a CPU."""

    def __init__(self, post: Post, device: str, server: tuple[int, ...], tp: int) -> None:
        self._post, self._server, self._tp = post, server, tp
        self._device = _device(device)
        self._backend = "nccl" if self._device.type == "cuda" else "gloo"
        self._name = f"{GROUP}_{os.getpid()}_{next(_numbers)}"
        self._group: Any = None

    def update(self, directory: Path, version: str, flush: bool) -> None:
        """One request and as many broadcasts as there are tensors, per piece."""
        if self._group is None:
            self._group = self._join()
        with _Session(self._post, self._server):
            send_all(directory, self._device, version, flush, self._send)

    def _join(self) -> Any:
        """Meet the server's ranks: they wait for this process and it for them, so the request runs beside."""
        host, port = "127.0.0.1", free_port()
        body = {
            "master_address": host,
            "master_port": port,
            "rank_offset": 1,
            "world_size": self._tp + 1,
            "group_name": self._name,
            "backend": self._backend,
        }
        asking = _Beside(lambda: self._post("/init_weights_update_group", body))
        group = _new_group(f"tcp://{host}:{port}", self._backend, self._tp + 1, self._name)
        asking.result()
        return group

    def _send(self, piece: list[tuple[str, Tensor]], version: str | None, flush: bool) -> None:
        body: dict[str, Any] = {
            "names": [name for name, _ in piece],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in piece],
            "shapes": [list(tensor.shape) for _, tensor in piece],
            "group_name": self._name,
            "flush_cache": flush,
        }
        if version is not None:
            body["weight_version"] = version
        asking = _Beside(lambda: self._post("/update_weights_from_distributed", body))
        for _, tensor in piece:
            dist.broadcast(tensor.contiguous(), src=0, group=self._group)
        asking.result()


class _Beside:
    """A call in a thread of its own."""

    def __init__(self, call: Any) -> None:
        self._error: BaseException | None = None

        def run() -> None:
            try:
                call()
            except BaseException as error:  # handed over by `result`
                self._error = error

        self._thread = threading.Thread(target=run, name="sglang update", daemon=True)
        self._thread.start()

    def result(self) -> None:
        """Wait; raises what the call raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def _new_group(address: str, backend: str, size: int, name: str) -> Any:
    """A process group beside the default one, as SGLang's ranks make theirs: a store at `address` under the group's name."""
    from datetime import timedelta

    from torch.distributed.distributed_c10d import GroupName, PrefixStore, _new_process_group_helper, _world
    from torch.distributed.rendezvous import rendezvous

    timeout = timedelta(minutes=5)
    store, rank, world = next(rendezvous(address, 0, size, timeout=timeout))
    store.set_timeout(timeout)
    group, _ = _new_process_group_helper(
        world,
        rank,
        [],
        dist.Backend(backend),
        PrefixStore(name, store),
        group_name=GroupName(name),
        timeout=timeout,
        backend_options=None,
    )
    _world.pg_group_ranks[group] = {i: i for i in range(size)}
    return group
