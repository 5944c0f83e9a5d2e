"""The quickstart with one objective after another: held-out pass@1 before and after, in one table.

    python -m benchmarks.objectives [--only NAME ...] [--iterations 60] [--runs DIR] [--out FILE] [--set KEY=VALUE ...]

Each is `rlsys up configs/quickstart.yaml` with the few changed keys of RUNS, all from the same base model and problems and with the same seed.
A minute and a half each on two free cores; the base model is made first if it is not in the cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "quickstart.yaml"

RUNS: dict[str, dict[str, Any]] = {
    "GRPO+": {},
    "GPPO": {"learner.objective": "gppo"},
    "CISPO": {"learner.objective": "cispo"},
    # the published bounds, 3e-4 and 4e-4, are for updates on fresh samples; a batch that is a version old leaves them at once
    "GSPO": {
        "learner.objective": "gspo",
        "learner.objective_options": {"clip_low": 0.05, "clip_high": 0.07},
        "learner.aggregation": "sequence_mean",
    },
    # no group takes part, so groups of one score stay: they are as good as any other sample
    "REINFORCE++": {"learner.advantage": "reinforce_pp", "learner.zero_variance": "keep"},
    "decoupled PPO": {
        "learner.objective": "decoupled",
        "schedule.name": "bounded",
        "schedule.max_staleness": 2,
    },
}
"""What differs from configs/quickstart.yaml, key by key."""


def arguments(changes: dict[str, Any]) -> list[str]:
    """`--set` for each key; values as YAML that `rlsys` reads back."""
    return [part for key, value in changes.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def measure(name: str, iterations: int, runs: Path, more: list[str]) -> dict[str, Any]:
    """Train once; what the run's figures say."""
    directory = runs / name.lower().replace(" ", "-")
    command = [sys.executable, "-P", "-m", "rlsys", "up", str(CONFIG), "--json", "--plain", "--run-dir", str(directory)]
    command += ["--set", f"iterations={iterations}", *arguments(RUNS[name])]
    command += [part for override in more for part in ("--set", override)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: `rlsys up` ended with {done.returncode}; its run is in {directory}")
    figures = json.loads(done.stdout.splitlines()[-1])
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "train/clip_share" in record]
    return {
        "name": name,
        "changes": RUNS[name],
        "iterations": figures["iterations"],
        "before": figures["evaluations"][0]["pass_at_1"],
        "after": figures["evaluations"][-1]["pass_at_1"],
        "staleness": figures["staleness_mean"],
        "clip_share": sum(r["train/clip_share"] for r in steps) / len(steps),
        "entropy": steps[-1]["train/entropy"],
        "s_per_iteration": figures["s_per_iteration"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| recipe | changed keys | pass@1 before | after | mean staleness | clipped tokens | entropy at the end |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        changed = ", ".join(f"`{key}={json.dumps(value)}`" for key, value in row["changes"].items()) or "none"
        lines.append(
            f"| {row['name']} | {changed} | {row['before']:.3f} | {row['after']:.3f} | {row['staleness']:.2f} | "
            f"{row['clip_share']:.1%} | {row['entropy']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all, print the table, and write the figures as JSON after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--runs", type=Path, help="keep the runs' directories here")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="more", help="for every run")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="rlsys-objectives-") as scratch:
        for name in options.only:
            rows.append(measure(name, options.iterations, options.runs or Path(scratch), options.more))
            print(f"{name}: held-out pass@1 {rows[-1]['before']:.3f} -> {rows[-1]['after']:.3f}", file=sys.stderr, flush=True)
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
