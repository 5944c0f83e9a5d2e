"""The loop of a fine-tuning, on one rank. Every rank reads the same examples and walks through the same batches; the step shares them.

examples --batch n--> [ Step.train ] --values--> report (rank 0: metrics.jsonl, tensorboard/, progress)
                       every checkpoint_every: checkpoints/          at the end, rank 0: final_model/
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from learner import checkpoint
from learner.checkpoint_files import latest_good, prune
from learner.parallel import Group
from learner.publisher import export_model
from learner.step import Step
from rlsys.sft.config import SftConfig
from rlsys.sft.examples import Encoder, Examples, batches, num_steps

Report = Callable[[int, Mapping[str, float]], None]
"""Hears the number of steps done and the values of the last one, or of an evaluation."""

EVAL_SAMPLES = 256
"""Held-out samples of one pass: bounds memory."""


@dataclass(frozen=True, slots=True)
class Material:
    """What is learned from, and what is held out."""

    train: Examples
    held_out: Examples | None


def read_material(config: SftConfig) -> Material:
    """Read and tokenize everything. Raises DataError that names file and line."""
    encoder = Encoder(config.model.path, config.data, config.model.max_context)
    train = encoder.read(config.data.train, config.data.split)
    return Material(train, encoder.read(config.data.eval, config.data.eval_split) if config.data.eval else None)


def fine_tune(config: SftConfig, material: Material, out: Path, group: Group, report: Report, *, resume: bool = False) -> int:
    """Train, and write `out`/final_model on rank 0. Returns the number of steps. Collective.

    Raises Diverged when `learner.max_bad_steps` steps in a row had no finite gradient.
    """
    samples = material.train.samples
    total = num_steps(config, len(samples))
    step = Step(config.learner, config.model.path, group)
    saved = out / "checkpoints"
    done = 0
    if resume and (found := latest_good(saved)) is not None:
        done = checkpoint.load(found.path, step).iteration
    elif material.held_out:
        report(0, {"eval/loss": held_out_loss(step, material.held_out)})
    for n, places in enumerate(itertools.islice(batches(len(samples), config.samples_per_step, total, config.seed), done, None), done + 1):
        started = time.monotonic()
        values = step.train([samples[i] for i in places], n - 1, total).values
        seconds = time.monotonic() - started
        report(n, {f"train/{name}": values.get(name, math.nan) for name in NAMES} | {"train/tokens_per_s": values["num_tokens"] / seconds})
        if material.held_out and (n == total or (config.eval_every and n % config.eval_every == 0)):
            report(n, {"eval/loss": held_out_loss(step, material.held_out)})
        if config.writes_checkpoint(n) and n < total:
            checkpoint.write(checkpoint.snapshot(step, n), saved)
            if group.rank == 0:
                kept = config.learner.checkpoints
                prune(saved, keep_last=kept.keep_last, keep_every=kept.keep_every)
    dtype = {"float32": "float32", "bfloat16": "bfloat16"}[config.dtype]
    _export(config, step, out / "final_model", dtype)
    return total


NAMES = ("loss", "grad_norm", "lr", "num_tokens", "entropy", "skipped")
"""Of the step's values, those that mean something without rewards."""


def held_out_loss(step: Step, examples: Examples) -> float:
    """Mean -log-prob of the held-out completions' tokens."""
    total = 0.0
    for start in range(0, len(examples.samples), EVAL_SAMPLES):
        part = examples.samples[start : start + EVAL_SAMPLES]
        total += step.negative_log_likelihood(part) * sum(sample.num_trainable for sample in part)
    return total / examples.num_learned


def _export(config: SftConfig, step: Step, target: Path, dtype: str) -> None:
    import torch

    kind = getattr(torch, dtype)
    if step.group.rank == 0:
        export_model(config.model.path, target, step.published_tensors(kind), kind)
    else:
        step.help_publishing(kind)
    step.group.barrier()
