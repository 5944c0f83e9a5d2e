"""Learner ranks as processes, for the tests of K ranks: `python -m tests.learner.rank JOBS.json`.

The process imports torch once and forks the ranks, which run a list of jobs one after the other; a job takes the first `size` of them. Each rank
writes what it found to `<out>/<job>-<rank>.json`, rank 0 the whole training state of the job's end beside it.

    {"out": "...", "timeout_s": 60, "jobs": [{"name": "two", "size": 2, "model": "...", "settings": {...}, "counts": [17, 9], "first": 0,
                                              "load": "a checkpoint", "save": ["a directory", 5], "damage": "token",
                                              "leave": 1, "refused": true, "gradients": true}]}
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from learner.checkpoint import load, snapshot, write
from learner.packing import TrainSample
from learner.parallel import Group, SingleProcess, connect_store, join, open_store
from learner.settings import LearnerSettings
from learner.sharding import whole
from learner.step import Step
from tests.learner.samples import VOCABULARY, random_samples

HOST = "127.0.0.1"
BROKEN_TOKEN = VOCABULARY - 1
"""Has a NaN in its embedding in jobs with damage "token"; one sample in such a batch contains it."""


def run(rank: int, job: dict[str, Any], port_pipes: list[tuple[int, int]], out: Path, timeout_s: float) -> None:
    """One job on one rank."""
    size = job["size"]
    group: Group = SingleProcess()
    if size > 1:
        if rank == 0:
            store = open_store(HOST, size, timeout_s)
            for other in range(1, size):
                os.write(port_pipes[other][1], f"{store.port}\n".encode())
        else:
            store = connect_store(HOST, int(os.read(port_pipes[rank][0], 16)), size, timeout_s)
        group = join(store, rank, size, device=torch.device("cpu"), timeout_s=timeout_s)
    try:
        found = _train(job, group, out)
    except Exception as error:
        if not {"leave", "refused"} & job.keys():
            raise
        found = {"error": f"{type(error).__name__}: {error}"}
    finally:
        group.close()
    (out / f"{job['name']}-{rank}.json").write_text(json.dumps(found))


def _train(job: dict[str, Any], group: Group, out: Path) -> dict[str, Any]:
    payload = group.broadcast_bytes(b"\x00from rank 0\xff" if group.rank == 0 else None)
    empty = group.broadcast_bytes(b"" if group.rank == 0 else None)
    step = Step(LearnerSettings.model_validate(job["settings"]), Path(job["model"]), group)
    first, counts = job.get("first", 0), job["counts"]
    if "load" in job:
        load(Path(job["load"]), step)
    if job.get("damage") == "token":
        with torch.no_grad():
            rows = whole(step.model.network.get_input_embeddings().weight.detach()).clone()
            rows[BROKEN_TOKEN] = float("nan")
            state = step.training_state()
            state["model.model.embed_tokens.weight"] = rows
            step.load_training_state(state)
    values, skipped = [], []
    for iteration, count in enumerate(counts, first):
        if iteration == job.get("save", (None, None))[1]:
            write(snapshot(step, iteration), Path(job["save"][0]))
        metrics = step.train(_samples(count, iteration, job.get("damage")), iteration, first + len(counts))
        if "gradients" in job and not values:
            moments = {name: tensor for name, tensor in step.training_state().items() if name.startswith("optimizer.exp_avg.")}
            if group.rank == 0:
                save_file(moments, str(out / f"{job['name']}-gradients.safetensors"))
        values.append(metrics.values)
        skipped += [(one.group_id, one.index) for one in metrics.skipped]
        if "leave" in job:
            if group.rank == job["leave"]:
                return {}
            if step.sharded:
                step.state_dict_for_publishing()
            step.train(_samples(count, iteration, None), iteration, len(counts))
    state = step.training_state()
    group.barrier()
    digest = sum(float(tensor.double().sum()) for tensor in state.values())
    if group.rank == 0:
        save_file(state, str(out / f"{job['name']}.safetensors"))
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in step.model.network.parameters())
    canary = step.canary().logprobs.tolist()
    return {
        "canary": canary,
        "values": values,
        "skipped": skipped,
        "payload": payload.hex(),
        "empty": empty.hex(),
        "digest": digest,
        "held": held,
    }


def _samples(count: int, iteration: int, damage: str | None) -> list[TrainSample]:
    samples = random_samples(count, iteration)
    if damage == "token":
        tidy = [dataclasses.replace(s, **{n: np.where(getattr(s, n) == BROKEN_TOKEN, 0, getattr(s, n)) for n in IDS}) for s in samples]
        return [dataclasses.replace(s, prompt_ids=np.array([BROKEN_TOKEN], np.int32)) if i == 3 else s for i, s in enumerate(tidy)]
    if damage == "objective":
        return [dataclasses.replace(s, advantage=7.0) if i == 3 else s for i, s in enumerate(samples)]
    return samples


IDS = ("prompt_ids", "token_ids")


def main(path: Path) -> int:
    """Fork the ranks and wait for them; non-zero when one failed."""
    content = json.loads(path.read_text())
    out, jobs = Path(content["out"]), content["jobs"]
    ranks = max(job["size"] for job in jobs)
    pipes = [os.pipe() for _ in range(ranks)]
    children = []
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            try:
                torch.set_num_threads(1)
                for job in jobs:
                    if rank < job["size"]:
                        run(rank, job, pipes, out, content["timeout_s"])
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    failed = 0
    while children:
        child, status = os.wait()
        children.remove(child)
        if status and not failed:
            failed = 1
            for other in children:  # they would wait for it
                os.kill(other, signal.SIGKILL)
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
