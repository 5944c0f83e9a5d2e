"""The two lanes that carry tensors instead of file names. The only engine file besides the embedded engine that imports torch.

Both read the verified files in this process and hand the tensors over in pieces of PIECE_BYTES, so that a device needs room for two pieces
(one that is sent, one that is read) beside the model. SGLang's own interface for the `tensor` lane is a pickle, made by its own reducer for
shared tensors; it goes from this process to a server of this host, and nothing pickled is ever read here.
"""

from __future__ import annotations

import base64
import io
import itertools
import logging
import os
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.multiprocessing import reductions

from actors.engines.lanes import PartlyLoaded, Post, Target, broadcasting_device, is_local, own_address
from actors.engines.sglang_client import NoAnswer
from actors.engines.sglang_server import device_kind
from protocol.errors import InfrastructureFault, WeightsError

log = logging.getLogger("rlsys.sglang")

PIECE_BYTES = 512 << 20
SESSION_SINCE = (0, 5, 21)
"""From here on updates stand between /begin_weight_update and /end_weight_update."""
GROUP = "rlsys_weights"
"""Begins the name of a group. Each has a number of its own, because a server that was started again is met in a new one."""
MEET_S = 300.0
"""Until the server's ranks have come to a new group, and for one broadcast."""
DEVICE_ARGUMENT = 6
"""Where torch's way of handing over a CUDA tensor has the device's number (`storage_device` of `reductions.rebuild_cuda_tensor`)."""
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
    """Hand each piece to `send`, the last one with the version.

    Raises PartlyLoaded when it breaks off after the server was given something: one that refuses a piece may have loaded a part of it.
    """
    begun, waiting = 0, None
    try:
        for piece in pieces(directory, device):
            if waiting is not None:
                begun += 1
                send(waiting, None, False)
            waiting = piece
        assert waiting is not None, f"{directory} was checked to hold tensors"
        begun += 1
        send(waiting, version, flush)
    except NoAnswer:
        raise
    except WeightsError as error:  # of this process, before it gave a piece away
        if begun > 1:
            raise PartlyLoaded(f"{directory}: the update broke off after {begun - 1} pieces ({error})") from None
        raise
    except (InfrastructureFault, RuntimeError) as error:
        if begun:
            raise PartlyLoaded(f"{directory}: the update broke off in piece {begun} ({error})") from None
        raise WeightsError(f"{directory}: cannot be brought to {device} ({error})") from None


class _Session:
    """Brackets an update where the server wants it; an update that broke off is closed as well, so that the next one can begin."""

    def __init__(self, post: Post, server: tuple[int, ...]) -> None:
        self._post, self._needed = post, server >= SESSION_SINCE

    def __enter__(self) -> None:
        if not self._needed:
            return
        try:
            self._post("/begin_weight_update", {})
        except NoAnswer:
            raise
        except InfrastructureFault:  # an actor that died in the middle left it open
            self._post("/end_weight_update", {})
            self._post("/begin_weight_update", {})

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._needed:
            return
        try:
            self._post("/end_weight_update", {})
        except InfrastructureFault as error:
            if kind is None:
                raise PartlyLoaded(f"the server has every tensor and did not finish the update ({error})") from None


class _Pickler(ForkingPickler):
    """Names a CUDA device by its UUID: the server sees other devices than this process and counts them otherwise. SGLang reads both."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.dispatch_table: Any = ChainMap({Tensor: self._reduce}, self.dispatch_table)

    @staticmethod
    def _reduce(tensor: Tensor) -> tuple[Any, ...]:
        rebuild, arguments = reductions.reduce_tensor(tensor)  # type: ignore[no-untyped-call]
        return rebuild, (by_uuid(arguments, _uuid) if tensor.is_cuda else arguments)


def by_uuid(arguments: tuple[Any, ...], uuid_of: Callable[[int], str]) -> tuple[Any, ...]:
    """The arguments of torch's `rebuild_cuda_tensor` with the device's UUID in place of its number."""
    return (*arguments[:DEVICE_ARGUMENT], uuid_of(arguments[DEVICE_ARGUMENT]), *arguments[DEVICE_ARGUMENT + 1 :])


def _uuid(place: int) -> str:
    return str(torch.cuda.get_device_properties(place).uuid)


class TensorLane:
    """Shares each piece with the server: by CUDA IPC handles on a GPU, by shared memory on a CPU. Server and actor must be on one host."""

    def __init__(self, target: Target) -> None:
        self._post, self._server, self._tp = target.post, target.version, target.tp
        self._device = torch.device("cpu")
        if device_kind(target.device) == "cuda":  # the server's first: the handles of a device open where it is seen
            self._device = torch.device("cuda", target.places[0] if target.places else torch.device(target.device).index or 0)
        torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]  # by name: the server is no child that could inherit descriptors

    def update(self, directory: Path, version: str, flush: bool) -> None:
        """One request per piece; the last one names the version and flushes."""
        with _Session(self._post, self._server):
            send_all(directory, self._device, version, flush, self._send)

    def close(self) -> None:
        """Nothing is held between two updates."""

    def _send(self, piece: list[tuple[str, Tensor]], version: str | None, flush: bool) -> None:
        texts = []
        try:
            tensors = [(name, tensor.contiguous()) for name, tensor in piece]
            for _ in range(self._tp):  # each rank gives back handles of its own, which are counted
                buffer = io.BytesIO()
                _Pickler(buffer).dump(tensors)
                texts.append(base64.b64encode(buffer.getvalue()).decode())
        except (RuntimeError, OSError) as error:
            raise WeightsError(f"{sum(t.nbytes for _, t in piece)} bytes cannot be put into shared memory ({error})") from None
        body: dict[str, Any] = {"serialized_named_tensors": texts, "flush_cache": flush}
        if version is not None:
            body["weight_version"] = version
        self._post("/update_weights_from_tensor", body)
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]


class DistributedLane:
    """Broadcasts from this process, rank 0, to the server's ranks: NCCL between GPUs, also across hosts; Gloo on a CPU, and from the actor's
    memory where the server has every device."""

    def __init__(self, target: Target) -> None:
        self._post, self._server, self._tp, self._url = target.post, target.version, target.tp, target.url
        self._device, self._backend = torch.device("cpu"), "gloo"
        if device_kind(target.device) == "cuda":
            places = target.places or ([torch.device(target.device).index or 0] if is_local(target.url) else [])
            place = broadcasting_device(places, target.taken, torch.cuda.device_count(), target.index)
            if place is not None:
                self._device, self._backend = torch.device("cuda", place), "nccl"
        log.info("weights are broadcast from %s by %s", self._device, self._backend)
        self._name = ""
        self._group: Any = None

    def update(self, directory: Path, version: str, flush: bool) -> None:
        """One request and as many broadcasts as there are tensors, per piece."""
        if self._group is None:
            self._group = self._join()
        with _Session(self._post, self._server):
            send_all(directory, self._device, version, flush, self._send)

    def close(self) -> None:
        """Leave the group, whether or not the server still answers."""
        group, self._group = self._group, None
        if group is not None:  # what it has under way with a server that hangs ends at its deadline
            threading.Thread(target=_abandon, args=(group,), name="leave group", daemon=True).start()

    def _join(self) -> Any:
        """Meet the server's ranks: they wait for this process and it for them, so the request runs beside."""
        host = own_address(self._url)
        self._name = f"{GROUP}_{os.getpid()}_{next(_numbers)}"
        store = _open_store(host)
        body = {
            "master_address": host,
            "master_port": store.port,
            "rank_offset": 1,
            "world_size": self._tp + 1,
            "group_name": self._name,
            "backend": self._backend,
        }
        asking = _Beside(lambda: self._post("/init_weights_update_group", body))
        deadline = time.monotonic() + MEET_S
        while not store.num_keys():  # a rank that arrives leaves one
            if asking.wait(0.05):
                asking.result()
                if store.num_keys():  # they came after the look before; NCCL's do not wait there for this one
                    break
                raise InfrastructureFault(f"the server's ranks are in the group, but none came to {host}:{store.port}")
            if time.monotonic() > deadline:
                raise NoAnswer(f"none of the server's ranks came to {host}:{store.port} within {MEET_S:g} s")
        try:
            group = _new_group(store, self._backend, self._tp + 1, self._name)
        except RuntimeError as error:  # of torch.distributed: a rank that is gone
            raise InfrastructureFault(f"the group with the server's ranks broke while it formed ({error})") from None
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
        works = [dist.broadcast(tensor.contiguous(), src=0, group=self._group, async_op=True) for _, tensor in piece]
        while not all(work.is_completed() for work in works):
            if asking.wait(0.001):
                asking.result()  # a server that refuses takes no part in the broadcasts
        for work in works:
            work.wait()
        asking.result()


class _Beside:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._error: BaseException | None = None
        self._done = threading.Event()

        def run() -> None:
            try:
                call()
            except BaseException as error:  # handed over by `result`
                self._error = error
            self._done.set()

        threading.Thread(target=run, name="sglang update", daemon=True).start()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended."""
        return self._done.wait(timeout_s)

    def result(self) -> None:
        """Wait; raises what the call raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error


def _open_store(host: str) -> Any:
    """Where the ranks of a new group find each other: a store in this process, on a free port."""
    return dist.TCPStore(host, 0, is_master=True, timeout=timedelta(seconds=MEET_S), wait_for_workers=False)  # type: ignore[attr-defined]


def _new_group(store: Any, backend: str, size: int, name: str) -> Any:
    """A process group beside the default one, as SGLang's ranks make theirs: in a store, under the group's name."""
    from torch.distributed.distributed_c10d import GroupName, PrefixStore, _new_process_group_helper, _world

    group, _ = _new_process_group_helper(
        size,
        0,
        [],
        dist.Backend(backend),
        PrefixStore(name, store),
        group_name=GroupName(name),
        timeout=timedelta(seconds=MEET_S),
        backend_options=None,
    )
    _world.pg_group_ranks[group] = {i: i for i in range(size)}
    return group


def _abandon(group: Any) -> None:
    """End a group without its peers: what NCCL has under way ends with an error; Gloo has ended its own, or does at its deadline."""
    from torch.distributed.distributed_c10d import _abort_process_group

    try:
        if dist.get_backend(group) == "nccl":
            _abort_process_group(group)
        else:
            dist.destroy_process_group(group)
    except (RuntimeError, ValueError) as error:
        log.warning("a group of weights was not ended in order (%s)", error)
