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

from learner.parallel import SingleProcess, connect_store, join, open_store
from learner.settings import LearnerSettings
from learner.step import Step
from protocol.errors import DeadlineExceeded
from tests.learner.samples import random_samples

DEADLINE_S = 120.0
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def ranks(out: Path, model: Path, size: int, **job: Any) -> Iterator[list[subprocess.Popen[str]]]:
    """All ranks, ended by their ids at the latest here."""
    processes: list[subprocess.Popen[str]] = []
    job = {"out": str(out), "model": str(model), "size": size, "timeout_s": 60.0} | job
    try:
        for rank in range(size):
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


@pytest.mark.parametrize(
    ("dtype", "layout", "size", "tolerance", "metric_tolerance"),
    [("float64", "sorted", 3, 1e-9, 1e-9), ("float32", "shared", 2, 1e-4, 1e-5)],
)
def test_ranks_train_as_one(
    tmp_path: Path, model_dir: Path, dtype: str, layout: str, size: int, tolerance: float, metric_tolerance: float
) -> None:
    """To the last digits in float64, where every row is computed alike whatever stands beside it. One batch has fewer samples than ranks."""
    settings = {"dtype": dtype, "device": "cpu", "optimizer": {"lr": 1e-2}, "tokens_per_microbatch": 128, "layout": layout}
    counts = [17, 17, 1, 17, 9]
    alone = Step(LearnerSettings.model_validate(settings), model_dir, SingleProcess())
    expected = [alone.train(random_samples(count, i), i, len(counts)).values for i, count in enumerate(counts)]
    found, parameters = train(tmp_path / "ranks", model_dir, size, settings=settings, counts=counts)
    for one in found:
        assert one["payload"] == b"\x00from rank 0\xff".hex() and one["empty"] == ""
        assert one["values"] == found[0]["values"]
        for values, expected_values in zip(one["values"], expected, strict=True):
            assert values == pytest.approx(expected_values, rel=metric_tolerance, abs=1e-7)
    for name, tensor in alone.state_dict_for_publishing().items():
        torch.testing.assert_close(parameters[name], tensor, rtol=tolerance, atol=tolerance)


def test_a_rank_that_leaves_is_a_named_error_on_the_others(tmp_path: Path, model_dir: Path) -> None:
    with ranks(tmp_path, model_dir, 2, settings={"device": "cpu"}, counts=[3], leave=1) as (first, second):
        _, errors = first.communicate(timeout=DEADLINE_S)
        assert second.wait(timeout=DEADLINE_S) == 0
    assert first.returncode != 0
    assert "learner rank 0 of 2: sum failed" in errors and ("InfrastructureFault" in errors or "DeadlineExceeded" in errors)


def test_a_rank_that_never_comes_is_a_named_error() -> None:
    store = open_store("127.0.0.1", 2, 5)
    with pytest.raises(DeadlineExceeded, match=f"learner rank 0 of 2: the ranks did not meet at 127.0.0.1:{store.port} after 0.5 s"):
        join(store, 0, 2, device=torch.device("cpu"), timeout_s=0.5)


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
