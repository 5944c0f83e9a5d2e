"""The last lines of `rlsys up`: what the run did, from what it recorded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rlsys.lines import read_lines
from rlsys.overlap import overlap
from rlsys.rundir import read_json


def read_iterations(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl that belong to an iteration of training, in order; the last of an iteration that was trained again."""
    path = run_dir / "metrics.jsonl"
    records = read_lines(path) if path.is_file() else []
    found = {int(record["iteration"]): record for record in records if "reward/mean" in record}
    return [found[iteration] for iteration in sorted(found)]


def summarise(run_dir: Path) -> dict[str, Any]:
    """Figures of a finished run as plain data. Raises nothing for a run that ended early: what is unknown is left out."""
    ended = read_json(run_dir / "exit.json") or {}
    iterations = read_iterations(run_dir)
    figures: dict[str, Any] = {
        "outcome": ended.get("outcome"),
        "evaluations": ended.get("evaluations", []),
        "iterations": len(iterations),
        "parts": ended.get("phases", []),
    }
    if iterations:
        tokens = [r["data/tokens"] for r in iterations]
        figures["staleness_mean"] = sum(r["staleness/mean"] * t for r, t in zip(iterations, tokens, strict=True)) / max(1.0, sum(tokens))
        figures["staleness_max"] = max(r["staleness/max"] for r in iterations)
        figures["mixed_share"] = sum(r["staleness/mixed_share"] for r in iterations) / len(iterations)
        figures["overlap"] = overlap(run_dir)
    here = sum(record.get("time_s", 0.0) >= ended.get("started_s", 0.0) for record in iterations)
    training = next((p for p in figures["parts"] if p["name"] == "training"), None)
    if training and here:
        figures["s_per_iteration"] = training["wall_s"] / here
        figures["cpu_s_per_iteration"] = training["cpu_s"] / here
        figures["cpu_share"] = training["cpu_s"] / (training["wall_s"] * (os.cpu_count() or 1))
    return figures


def lines(run_dir: Path, figures: dict[str, Any]) -> list[str]:
    """The figures in words."""
    text = []
    for result in figures["evaluations"]:
        text.append(
            f"held-out pass@1  {result['pass_at_1']:.3f} at v{result['version']} ({result['problems']} problems, {result['samples']} samples)"
        )
    if "s_per_iteration" in figures:
        text.append(
            f"iterations       {figures['iterations']}, {figures['s_per_iteration']:.2f} s and {figures['cpu_s_per_iteration']:.2f} CPU-s each"
        )
        text.append(f"cores            {figures['cpu_share']:.0%} of {os.cpu_count()} cores busy while training")
    if figures.get("overlap") is not None:
        text.append(f"overlap          a generator decoded during {figures['overlap']:.0%} of the learner's busy time")
    if "staleness_mean" in figures:
        text.append(
            f"staleness        mean {figures['staleness_mean']:.2f}, most {figures['staleness_max']:.0f}; "
            f"{figures['mixed_share']:.1%} of completions mix versions"
        )
    parts = [f"{p['name']} {p['wall_s']:.1f} s" for p in figures["parts"]]
    if parts:
        text.append(f"time             {', '.join(parts)}")
    if (run_dir / "final_model").is_dir():
        text.append(f"final model      {run_dir / 'final_model'}")
    elif figures["iterations"]:
        text.append("final model      none: the run ended before its last iteration")
    if figures["iterations"]:
        text.append(f"look             tensorboard --logdir {run_dir / 'tensorboard'}")
    return text
