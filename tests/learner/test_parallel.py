"""Real ranks: processes that the test starts and ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from learner.parallel import SingleProcess, connect_store, open_store
from protocol.errors import DeadlineExceeded

DEADLINE_S = 120.0
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def ranks(out: Path, model: Path, size: int, started: int | None = None, **job: Any) -> Iterator[list[subprocess.Popen[str]]]:
    """The first `started` of `size` ranks, ended by their ids at the latest here."""
    processes: list[subprocess.Popen[str]] = []
    job = {"out": str(out), "model": str(model), "size": size, "timeout_s": 60.0} | job
    try:
        for rank in range(size if started is None else started):
            path = out / f"job-{rank}.json"
            path.write_text(json.dumps(job | {"rank": rank}))
            command = [sys.executable, "-m", "tests.learner.rank", str(path)]
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            processes.append(process)
            if rank == 0 and size > 1:
                assert process.stdout is not None
                job["port"] = int(process.stdout.readline())
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=DEADLINE_S)


def train(out: Path, model: Path, size: int, **job: Any) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """What every rank found, and the parameters, which must be the same bits on all ranks."""
    out.mkdir()
    with ranks(out, model, size, **job) as processes:
        for process in processes:
            _, errors = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, errors
    tensors = [load_file(str(out / f"rank-{i}.safetensors")) for i in range(size)]
    for other in tensors[1:]:
        assert all(torch.equal(tensors[0][name], other[name]) for name in tensors[0])
    return [json.loads((out / f"rank-{i}.json").read_text()) for i in range(size)], tensors[0]


@pytest.mark.parametrize(("dtype", "tolerance", "metric_tolerance"), [("float64", 1e-9, 1e-9), ("float32", 1e-4, 1e-5)])
def test_two_and_three_ranks_train_as_one(tmp_path: Path, model_dir: Path, dtype: str, tolerance: float, metric_tolerance: float) -> None:
    settings = {"dtype": dtype, "device": "cpu", "optimizer": {"lr": 1e-2}, "tokens_per_microbatch": 128}
    job = {"settings": settings, "samples": 17, "iterations": 5}
    (alone,), expected = train(tmp_path / "one", model_dir, 1, **job)
    for size in (2, 3) if dtype == "float64" else (2,):
        found, parameters = train(tmp_path / str(size), model_dir, size, **job)
        for one in found:
            assert one["payload"] == b"\x00from rank 0\xff".hex() and one["empty"] == ""
            assert one["values"] == found[0]["values"]
            for values, alone_values in zip(one["values"], alone["values"], strict=True):
                assert values == pytest.approx(alone_values, rel=metric_tolerance, abs=1e-7)
        for name, tensor in expected.items():
            torch.testing.assert_close(parameters[name], tensor, rtol=tolerance, atol=tolerance)


def test_ranks_with_too_few_samples_still_take_part(tmp_path: Path, model_dir: Path) -> None:
    settings = {"dtype": "float64", "device": "cpu"}
    found, _ = train(tmp_path / "two", model_dir, 2, settings=settings, samples=1, iterations=1)
    assert [one["values"][0]["updates"] for one in found] == [1.0, 1.0]


def test_a_rank_that_never_comes_is_a_named_error(tmp_path: Path, model_dir: Path) -> None:
    with ranks(tmp_path, model_dir, 2, started=1, settings={}, samples=1, iterations=1, timeout_s=1.0) as (process,):
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode != 0
    assert "DeadlineExceeded: learner rank 0 of 2" in errors


def test_no_store_is_a_named_error() -> None:
    store = open_store("127.0.0.1", 1, 5)
    port = store.port
    del store
    with pytest.raises(DeadlineExceeded, match=f"no learner rank 0 at 127.0.0.1:{port}"):
        connect_store("127.0.0.1", port, 2, 0.5)


def test_a_group_of_one_gives_back_what_it_is_given() -> None:
    group = SingleProcess()
    tensor = torch.tensor([1.0, 2.0])
    group.sum(tensor)
    group.maximum(tensor)
    assert tensor.tolist() == [1.0, 2.0] and group.broadcast_bytes(b"ab") == b"ab"
    with pytest.raises(ValueError, match="rank 0 must give"):
        group.broadcast_bytes(None)
