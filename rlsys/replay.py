"""`rlsys replay RUN`: train again from the journal and compare with what the run recorded."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError
from protocol.ledger import Ledger
from rlsys.config import RunConfig, load_config
from rlsys.report import read_iterations
from rlsys.rundir import check_new
from rlsys.schedules import batch_rule
from rlsys.stages import stage_rules


def replay(run: Path, overrides: Sequence[str], first: int | None, until: int | None, out: Path | None, *, as_json: bool) -> int:
    """Print each iteration's loss beside the recorded one. 0 when all are equal to the bit, or when settings were changed on purpose."""
    if not (run / "config.yaml").exists() or not (run / "ledger.sqlite").exists():
        raise ConfigError(f"{run}: holds no run")
    if out is not None:
        check_new(out)
    config = load_config(run / "config.yaml", overrides)
    os.environ["OMP_NUM_THREADS"] = str(config.learner.threads)  # before torch is loaded: threads decide the order of sums
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    result = _replay(run, config, first, until, out, as_json=as_json)
    if as_json:
        print(json.dumps(result))
    else:
        weights = {True: "equal", False: "different", None: "not compared (the run has no final model, or other iterations were asked for)"}
        print(f"losses   {result['equal_losses']} of {len(result['iterations'])} equal to the recorded ones, bit for bit")
        print(f"weights  {weights[result['weights_equal']]}")
        print(f"time     {result['busy_s']:.2f} s of training, {result['recorded_busy_s']:.2f} s in the run")
        if out is not None:
            print(f"model    {out}")
    same = result["equal_losses"] == len(result["iterations"]) and result["weights_equal"] is not False
    return 0 if same or overrides else 1


def _replay(run: Path, config: RunConfig, first: int | None, until: int | None, out: Path | None, *, as_json: bool) -> dict[str, Any]:
    from learner.publisher import DTYPES, export_model
    from learner.replay import ReplayJob, finish, replay, starting_point

    ledger = Ledger(run / "ledger.sqlite", read_only=True)
    try:
        checkpoints, outcomes, run_id = ledger.checkpoints(), ledger.outcomes(), int(ledger.get("run_id", "0"), 16)
    finally:
        ledger.close()
    recorded = {int(record["iteration"]): record for record in read_iterations(run)}
    last = max(recorded, default=-1) + 1
    until = last if until is None else min(until, last)
    if until <= (first or 0):
        raise ConfigError(f"{run}: {last} iterations are on record, none from {first or 0} to {until}")
    start = starting_point(run, checkpoints, first)
    job = ReplayJob(
        run_dir=run,
        run_id=run_id,
        iterations=config.iterations,
        batches=batch_rule(config),
        stages=stage_rules(config),
        group_size=config.sampling.group_size,
        model_dir=config.model.path,
        settings=config.learner,
    )
    rows: list[dict[str, Any]] = []

    def on_iteration(iteration: int, numbers: dict[str, float], busy_s: float) -> None:
        before = recorded.get(iteration, {}).get("train/loss")
        loss = numbers.get("loss")
        rows.append({"iteration": iteration, "loss": loss, "recorded": before, "equal": loss == before, "busy_s": busy_s})
        if not as_json:
            mark = "equal" if loss == before else f"recorded {before}"
            print(f"iteration {iteration}  loss {loss}  {mark}", flush=True)
        else:
            print(f"iteration {iteration}", file=sys.stderr, flush=True)

    step, ranks, helpers = replay(job, start, until, outcomes, on_iteration)
    if ranks.size > 1:
        ranks.broadcast_bytes(b"")
    dtype = DTYPES[config.weights.dtype]
    tensors = dict(step.published_tensors(dtype))
    finish(ranks, helpers)
    weights_equal = _compare(run / "final_model", tensors, dtype) if until == last == config.iterations else None
    if out is not None:
        export_model(config.model.path, out, tensors.items(), dtype)
    return {
        "run": str(run),
        "from": start.number if start else 0,
        "until": until,
        "iterations": rows,
        "equal_losses": sum(row["equal"] for row in rows),
        "weights_equal": weights_equal,
        "busy_s": sum(row["busy_s"] for row in rows),
        "recorded_busy_s": sum(recorded.get(row["iteration"], {}).get("train/seconds", 0.0) for row in rows),
    }


def _compare(final_model: Path, tensors: dict[str, Any], dtype: Any) -> bool | None:
    """Whether the weights are those of the run's final model, bit for bit."""
    import torch
    from safetensors.torch import load_file

    files = sorted(final_model.glob("*.safetensors"))
    if not files:
        return None
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    return found.keys() == cast.keys() and all(torch.equal(found[name], cast[name].cpu()) for name in found)
