"""Every token's log-prob of a whole run, sampled by its engine, against a float32 forward pass of the weights of the version that it names.

Runs a configuration with `rlsys up` and keeps a hard link to every version it publishes (a run itself keeps two). Afterwards every completion
of the journal, or `--completions` of them drawn at random, is held against transformers: log_softmax(logits / temperature) of the whole
sequence under each version of its spans. What is counted (completions, swaps that were crossed) is counted over the whole journal.
Says how many tokens there were, how many completions cross a swap, over how many swaps, and the largest and mean difference; exit code 1
when a token differs by more than `--bound`.

    python -m benchmarks.engine_audit CONFIG [--set KEY=VALUE]... [--completions N] [--bound 1e-3] [--run-dir DIR] [--json]
    python -m benchmarks.engine_audit --audit DIR/run --versions DIR/versions      # look at a run that was kept before
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from protocol.codec import decode
from protocol.journal import read_journal
from protocol.messages import Trajectory

BATCH_TOKENS = 16_384


def run_and_keep(config: Path, overrides: list[str], run_dir: Path, versions: Path) -> int:
    """Run `rlsys up` with published versions in `versions`/live and hard-link each into `versions`; returns its exit code."""
    live = versions / "live"
    live.mkdir(parents=True)
    sets = [part for override in [*overrides, f"weights.directory={live}"] for part in ("--set", override)]
    process = subprocess.Popen([sys.executable, "-P", "-m", "rlsys", "up", str(config), "--run-dir", str(run_dir), *sets])
    try:
        while process.poll() is None:
            keep(live, versions)
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    return process.returncode


def keep(live: Path, versions: Path) -> None:
    """Hard-link every complete version that is not there yet."""
    for found in live.rglob("v*"):
        target = versions / found.name
        if found.is_dir() and (found / "manifest.json").exists() and not target.exists():
            aside = versions / f".{found.name}"
            aside.mkdir(exist_ok=True)
            try:
                for file in found.iterdir():
                    if not (aside / file.name).exists():
                        os.link(file, aside / file.name)
            except FileNotFoundError:
                continue  # pruned in this moment, which takes two newer versions: it was kept before
            aside.rename(target)


def trajectories(run: Path) -> Iterator[Trajectory]:
    """Every trajectory of the journal, as it came."""
    run_id = int(json.loads((run / "status.json").read_text())["run_id"], 16)
    for frames in read_journal(run / "journal"):
        if frames[0] == b"trajectory":
            message = decode(frames[1:], run_id, "journal")
            if isinstance(message, Trajectory) and len(message.token_ids):
                yield message


def spans_of(trajectory: Trajectory) -> list[tuple[str, int, int]]:
    """(version's directory name, first token, end)."""
    found, start = [], 0
    for number, incarnation, end in trajectory.spans.tolist():
        found.append((f"v{number}" + (f".{incarnation}" if incarnation else ""), start, end))
        start = end
    return found


@torch.inference_mode()
def audit(run: Path, versions: Path, most: int | None) -> dict[str, Any]:
    """The figures, from at most `most` completions."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config["model"]["path"])).float().eval()
    by_version: dict[str, list[tuple[Trajectory, int, int]]] = defaultdict(list)
    found = list(trajectories(run))
    spans_found = [spans_of(trajectory) for trajectory in found]
    crossed = {(trajectory.generator, name) for trajectory, spans in zip(found, spans_found, strict=True) for name, _, _ in spans[1:]}
    rng = np.random.default_rng(0)
    chosen = range(len(found)) if most is None or most >= len(found) else sorted(rng.choice(len(found), most, replace=False).tolist())
    for place in chosen:
        for name, start, end in spans_found[place]:
            by_version[name].append((found[place], start, end))
    worst, total, count, where = 0.0, 0.0, 0, ""
    for done, name in enumerate(sorted(by_version)):
        print(f"version {name}, {done} of {len(by_version)} done: {count:,} tokens, largest difference {worst:.2e}", file=sys.stderr)
        tensors = load_file(versions / name / "model.safetensors") if (versions / name / "model.safetensors").exists() else None
        if tensors is None:
            raise FileNotFoundError(f"{versions / name}: version {name} was not kept")
        model.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=False)
        model.tie_weights()
        for batch in batches(by_version[name]):
            for (trajectory, start, end), expected in zip(batch, forward(model, batch), strict=True):
                difference = np.abs(trajectory.behaviour_logprobs[start:end].astype(np.float64) - expected)
                total += float(difference.sum())
                count += len(difference)
                if difference.max(initial=0.0) > worst:
                    worst = float(difference.max())
                    where = f"completion {trajectory.group_id}/{trajectory.index}, token {start + int(difference.argmax())}, {name}"
    return {
        "completions": len(found), "mixed_completions": sum(len(spans) > 1 for spans in spans_found),
        "compared": len(chosen), "compared_mixed": sum(len(spans_found[place]) > 1 for place in chosen),
        "tokens": count, "versions": len(by_version), "swaps_in_flight": len(crossed), "largest": worst,
        "mean": total / max(1, count), "where": where,
    }  # fmt: skip


def batches(pieces: list[tuple[Trajectory, int, int]]) -> Iterable[list[tuple[Trajectory, int, int]]]:
    """Pieces by length, so many at once that padding stays small."""
    batch: list[tuple[Trajectory, int, int]] = []
    for piece in sorted(pieces, key=lambda p: len(p[0].prompt_ids) + p[2]):
        if batch and (len(batch) + 1) * (len(piece[0].prompt_ids) + piece[2]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def forward(model: Any, batch: list[tuple[Trajectory, int, int]]) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """Log-probs of each piece's tokens, from whole sequences without a cache. Padding comes after, where causal attention does not look."""
    lengths = [len(t.prompt_ids) + end for t, _, end in batch]
    ids = torch.zeros(len(batch), max(lengths), dtype=torch.long)
    for row, (trajectory, _, end) in zip(ids, batch, strict=True):
        whole = np.concatenate([trajectory.prompt_ids, trajectory.token_ids[:end]])
        row[: len(whole)] = torch.from_numpy(whole.astype(np.int64))
    logits = model(input_ids=ids, use_cache=False).logits
    found = []
    for row, sequence, (trajectory, start, end) in zip(logits, ids, batch, strict=True):
        first = len(trajectory.prompt_ids) + start
        last = len(trajectory.prompt_ids) + end
        scaled = row[first - 1 : last - 1].double() / (trajectory.temperature or 1.0)
        found.append(scaled.log_softmax(-1).gather(1, sequence[first:last, None])[:, 0].numpy())
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", help="configuration to run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--run-dir", type=Path, help="keep the run here, and its versions in DIR-versions (default: thrown away)")
    parser.add_argument("--audit", type=Path, metavar="RUN", help="do not run: look at this run")
    parser.add_argument("--versions", type=Path, metavar="DIR", help="with --audit: where its versions were kept")
    parser.add_argument("--completions", type=int, metavar="N", help="compare N completions drawn at random (default: all)")
    parser.add_argument("--bound", type=float, default=1e-3, help="largest difference in nats (default 1e-3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args(arguments)
    if (options.audit is None) == (options.config is None) or (options.audit is not None and options.versions is None):
        parser.error("give a configuration to run, or --audit RUN --versions DIR")
    with tempfile.TemporaryDirectory() as scratch:
        run = options.audit or options.run_dir or Path(scratch) / "run"
        versions = options.versions or (run.with_name(f"{run.name}-versions"))
        if options.audit is None and (code := run_and_keep(options.config, options.overrides, run, versions)):
            return code
        figures = audit(run, versions, options.completions)
    if options.json:
        print(json.dumps(figures))
    else:
        print(
            f"{figures['completions']:,} completions, {figures['mixed_completions']:,} cross a swap, {figures['swaps_in_flight']} swaps were "
            f"crossed; compared {figures['tokens']:,} tokens of {figures['compared']:,} completions ({figures['compared_mixed']:,} of those that "
            f"cross a swap) under {figures['versions']} versions"
        )
        print(f"difference to a float32 forward pass: largest {figures['largest']:.2e} ({figures['where']}), mean {figures['mean']:.2e}")
    return int(figures["largest"] > options.bound)


if __name__ == "__main__":
    sys.exit(main())
