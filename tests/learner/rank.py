"""One learner rank as a process of its own: `python -m tests.learner.rank JOB.json`, for the tests of K ranks.

Rank 0 prints its store's port. Every rank ends by writing what it found to `<out>/rank-<i>.json` and its parameters beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from learner.parallel import Group, SingleProcess, connect_store, join, open_store
from learner.settings import LearnerSettings
from learner.step import Step
from tests.learner.samples import random_samples

HOST = "127.0.0.1"


def main(job_path: Path) -> None:
    """Train the job's iterations."""
    job = json.loads(job_path.read_text())
    rank, size, out = job["rank"], job["size"], Path(job["out"])
    settings = LearnerSettings.model_validate(job["settings"])
    group: Group = SingleProcess()
    if size > 1:
        if rank == 0:
            store = open_store(HOST, size, job["timeout_s"])
            print(store.port, flush=True)
        else:
            store = connect_store(HOST, job["port"], size, job["timeout_s"])
        group = join(store, rank, size, device=torch.device("cpu"), timeout_s=job["timeout_s"])
    try:
        payload = group.broadcast_bytes(b"\x00from rank 0\xff" if rank == 0 else None)
        empty = group.broadcast_bytes(b"" if rank == 0 else None)
        step = Step(settings, Path(job["model"]), group)
        values = [
            step.train(random_samples(count, iteration), iteration, len(job["counts"])).values
            for iteration, count in enumerate(job["counts"])
        ]
        if "leave" not in job:
            group.barrier()
        elif rank != job["leave"]:
            group.sum(torch.ones(4))
    finally:
        group.close()
    save_file(step.state_dict_for_publishing(), str(out / f"rank-{rank}.safetensors"))
    (out / f"rank-{rank}.json").write_text(json.dumps({"values": values, "payload": payload.hex(), "empty": empty.hex()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
