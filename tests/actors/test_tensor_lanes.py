"""The lanes that carry tensors, without a server: what is handed over, from which device, and what an update that breaks off leaves."""

from __future__ import annotations

import base64
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.multiprocessing import reductions

from actors.engines import tensor_lanes
from actors.engines.lanes import PartlyLoaded, Target, broadcasting_device, is_local, make_lane, own_address
from actors.engines.sglang_client import NoAnswer
from protocol.errors import ConfigError, InfrastructureFault, WeightsError

AT_ONCE_S = 240.0
"""Below the deadline of a group, far above what a busy machine needs."""


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A version of four tensors, each a piece."""
    monkeypatch.setattr(tensor_lanes, "PIECE_BYTES", 16)
    save_file({f"t{i}": torch.full((4,), float(i)) for i in range(4)}, tmp_path / "a.safetensors")
    return tmp_path


def target(post: Callable[[str, dict[str, Any]], dict[str, Any]], **more: Any) -> Target:
    return Target(post=post, url="http://127.0.0.1:1", version=(0, 5, 21), **more)


# ---------------------------------------------------------------------------------------------------- what breaks off


@pytest.mark.parametrize("after", [0, 1])
def test_an_update_that_breaks_off_says_whether_the_old_weights_are_left(weights: Path, after: int) -> None:
    """A server that refuses even its first piece may have loaded half of it; what this process could not give away, it has not."""
    given: list[str | None] = []

    def send_until(error: Exception) -> Callable[..., None]:
        def send(piece: list[tuple[str, torch.Tensor]], version: str | None, flush: bool) -> None:
            if len(given) == after:
                raise error
            given.append(version)

        return send

    cpu = torch.device("cpu")
    for error, expected in (
        (InfrastructureFault("refused"), PartlyLoaded),
        (RuntimeError("broken"), PartlyLoaded),
        (WeightsError("no room"), PartlyLoaded if after else WeightsError),
        (NoAnswer("silence"), NoAnswer),
    ):
        given.clear()
        with pytest.raises(expected):
            tensor_lanes.send_all(weights, cpu, "1.0", True, send_until(error))
    given.clear()
    tensor_lanes.send_all(weights, cpu, "1.0", True, lambda piece, version, flush: given.append(version))
    assert given == [None, None, None, "1.0"]
    (weights / "b.safetensors").write_bytes((weights / "a.safetensors").read_bytes()[:-8])
    given.clear()
    with pytest.raises(WeightsError, match=str(weights)):
        tensor_lanes.send_all(weights, cpu, "1.0", True, lambda piece, version, flush: given.append(version))
    assert not given, "a file that ends early is seen before anything is sent"


def test_a_session_that_a_dead_actor_left_open_is_closed_and_one_that_cannot_be_closed_leaves_unknown_weights(weights: Path) -> None:
    paths: list[str] = []
    refuse: dict[str, int] = {}

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        paths.append(path.split("_")[0])
        if refuse.get(path, 0):
            refuse[path] -= 1
            raise InfrastructureFault("a weight-update session is already open")
        return {}

    lane = make_lane("tensor", target(post))
    refuse["/begin_weight_update"] = 1
    lane.update(weights, "1.0", True)
    assert paths == ["/begin", "/end", "/begin", *["/update"] * 4, "/end"]
    refuse["/end_weight_update"] = 1
    with pytest.raises(PartlyLoaded, match="did not finish"):
        lane.update(weights, "2.0", True)


# ---------------------------------------------------------------------------------------------------- which device


def test_a_device_is_named_so_that_a_server_that_sees_others_finds_it() -> None:
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert names[tensor_lanes.DEVICE_ARGUMENT] == "storage_device", "torch hands CUDA tensors over in another way than it did"
    assert tensor_lanes.by_uuid(tuple(names), lambda place: f"uuid of {place}") == tuple(
        "uuid of storage_device" if name == "storage_device" else name for name in names
    )


def test_each_rank_is_given_handles_of_its_own(weights: Path) -> None:
    """They are counted where they were made, and each rank gives back those that it was given."""
    sent: list[dict[str, Any]] = []

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/update_weights_from_tensor":
            sent.append(body)
            for text in body["serialized_named_tensors"]:
                [(name, tensor)] = ForkingPickler.loads(base64.b64decode(text))
                assert torch.equal(tensor, torch.full((4,), float(name[1:])))
        return {}

    make_lane("tensor", target(post, tp=2)).update(weights, "7.0", True)
    assert [len(body["serialized_named_tensors"]) for body in sent] == [2, 2, 2, 2]
    assert [(body.get("weight_version"), body["flush_cache"]) for body in sent] == [(None, False)] * 3 + [("7.0", True)]


def test_a_broadcast_comes_from_a_device_that_its_server_has_not() -> None:
    """Eight devices: a learner on 0 to 2, servers on 3 to 7."""
    servers = [3, 4, 5, 6, 7]
    assert [broadcasting_device([place], servers, 8, i) for i, place in enumerate(servers)] == [0, 1, 2, 0, 1]
    assert broadcasting_device([0], [0, 1], 2, 0) == 1, "one of another server, if there is nothing else"
    assert broadcasting_device([0], [0], 1, 0) is None
    assert broadcasting_device([0, 1], [], 2, 0) is None


def test_a_server_is_told_an_address_at_which_it_finds_this_host() -> None:
    assert own_address("http://127.0.0.1:30000") == "127.0.0.1" and own_address("http://[::1]:30000") == "::1"
    assert is_local("http://localhost:1") and is_local("http://[::1]:1") and not is_local("http://192.0.2.1:30000")
    with pytest.raises(ConfigError, match=r"lane is tensor.*192\.0\.2\.1.*on another host"):
        make_lane("tensor", Target(post=lambda path, body: {}, url="http://192.0.2.1:30000", version=(0, 5, 21)))


# ---------------------------------------------------------------------------------------------------- a broadcast with a real peer

PEER = """
import json, sys
from datetime import timedelta
import torch, torch.distributed as dist
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world
from torch.distributed.rendezvous import rendezvous

for line in sys.stdin:
    path, body = json.loads(line)
    if path == "/init_weights_update_group":
        address = f"tcp://{body['master_address']}:{body['master_port']}"
        store, rank, size = next(rendezvous(address, body["rank_offset"], body["world_size"], timeout=timedelta(seconds=600)))
        group, _ = _new_process_group_helper(
            size, rank, [], Backend(body["backend"]), PrefixStore(body["group_name"], store), group_name=body["group_name"],
            timeout=timedelta(seconds=600),
        )
        _world.pg_group_ranks[group] = {i: i for i in range(size)}
    sums = {}
    if path == "/update_weights_from_distributed":
        if body.get("weight_version") == "dies":
            sys.exit(0)
        for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"]):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(tensor, src=0, group=group)
            sums[name] = tensor.sum().item()
    print(json.dumps(sums), flush=True)
"""


@pytest.fixture
def peer() -> Iterator[Callable[[str, dict[str, Any]], dict[str, Any]]]:
    """The server's rank as a process that does what SGLang's does, and how it is asked."""
    process = subprocess.Popen([sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    told, says = process.stdin, process.stdout

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            told.write(json.dumps([path, body]) + "\n")
            told.flush()
        except BrokenPipeError:
            raise InfrastructureFault("the server is gone") from None
        line = says.readline()
        if not line:
            raise InfrastructureFault("the server is gone")
        answer: dict[str, Any] = json.loads(line)
        return answer

    try:
        yield post
    finally:
        process.kill()
        process.wait(120)
        with suppress(BrokenPipeError):  # what it never read
            told.close()
        says.close()


def test_a_broadcast_reaches_its_peer_and_one_that_dies_or_refuses_is_told_at_once(
    weights: Path, peer: Callable[[str, dict[str, Any]], dict[str, Any]]
) -> None:
    sums: dict[str, float] = {}

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = peer(path, body)
        sums.update(answer)
        return answer

    def refuse(path: str, body: dict[str, Any]) -> dict[str, Any]:
        raise InfrastructureFault("no such backend")

    began = time.monotonic()
    with pytest.raises(InfrastructureFault, match="no such backend"):
        make_lane("distributed", target(refuse)).update(weights, "0.0", True)
    lane = make_lane("distributed", target(post))
    for version in ("1.0", "2.0"):
        sums.clear()
        lane.update(weights, version, True)
        assert sums == {f"t{i}": 4.0 * i for i in range(4)}
    with pytest.raises(PartlyLoaded, match="broke off in piece 4"):
        lane.update(weights, "dies", True)
    lane.close()
    assert time.monotonic() - began < AT_ONCE_S
