"""TRL's side of benchmarks/step.py: GRPOTrainer on the same model, prompts, limits and isolated reward, its CPU time by part.

Run by benchmarks/step.py in a session of its own, so that its sandbox cells can be counted; alone:

    python -m benchmarks.step_trl '{"model": ..., "train": ..., "iterations": 10, ..., "out": "/tmp/figures.json"}'
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from actors.dataset import Order, read_problems
from actors.rewards import Sample
from actors.rewards.unit_tests import UnitTests
from actors.text import Text
from rlsys.launchers.local import cpu_seconds

PARTS = ("sampling", "reward", "learning", "everything else")


class Meter:
    """CPU seconds of this process by part, all of its threads; a part inside another counts for the inner one."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)
        self._stack = ["everything else"]
        self.restart()

    def restart(self) -> None:
        """Forget what was so far."""
        self.parts.clear()
        self.num_tokens = 0
        self._own_s = self._mark_s = time.process_time()
        self._all_s = cpu_seconds({os.getpid()})

    def total(self) -> dict[str, float]:
        """Seconds by part since `restart`; what the sandbox's own processes took is reward."""
        self._cut()
        cells_s = (cpu_seconds({os.getpid()}) - self._all_s) - (time.process_time() - self._own_s)
        return {part: self.parts[part] + (cells_s if part == "reward" else 0.0) for part in PARTS}

    def enter(self, part: str) -> None:
        """Begin a part inside the present one."""
        self._cut()
        self._stack.append(part)

    def leave(self) -> None:
        """Go back to the part around the present one."""
        self._cut()
        self._stack.pop()

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    def _cut(self) -> None:
        now = time.process_time()
        self.parts[self._stack[-1]] += now - self._mark_s
        self._mark_s = now


class Trainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer with a meter at its own borders; it does nothing else differently."""

    meter: Meter

    def _generate_single_turn(self, *arguments: Any, **options: Any) -> Any:
        with self.meter.during("sampling"):
            return super()._generate_single_turn(*arguments, **options)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Any:
        self.meter.num_tokens += sum(len(ids) for ids in completion_ids)
        with self.meter.during("reward"):
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids)

    def _prepare_inputs(self, batch: Any) -> Any:
        with self.meter.during("everything else"):
            return super()._prepare_inputs(batch)

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        with self.meter.during("learning"):
            return super().training_step(*arguments, **options)


class Borders(TrainerCallback):  # type: ignore[misc]
    """The optimizer's step, which Trainer takes outside of `training_step`, counts as learning; `warm_up` steps do not count at all."""

    def __init__(self, meter: Meter, warm_up: int) -> None:
        self._meter, self._warm_up = meter, warm_up

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._meter.enter("learning")

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._meter.leave()

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == self._warm_up:
            self._meter.restart()


def build(job: dict[str, Any], reward: UnitTests, meter: Meter) -> Trainer:
    """The trainer, with rlsys's prompts in rlsys's order."""
    torch.set_num_threads(1)
    problems = read_problems(Path(job["train"]))
    order = Order(len(problems), job["seed"], True)
    chosen = [problems[order[i]] for i in range(job["groups"] * (job["warm_up"] + job["iterations"]))]
    texts = [job["template"].replace("{prompt}", problem.prompt) for problem in chosen]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    ours = Text(Path(job["model"])).encode_prompts([problem.prompt for problem in chosen], job["template"], False)
    if tokenizer(texts)["input_ids"] != [ids.tolist() for ids in ours]:
        raise SystemExit("the two sides tokenize the prompts differently: there is nothing to compare")
    scorers = ThreadPoolExecutor(job["scorers"])

    def unit_tests(completions: list[str], completion_ids: list[list[int]], payload: list[str], **_: Any) -> list[float | None]:
        ended = [ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
        samples = [
            Sample(problem=msgpack.unpackb(bytes.fromhex(p)), completion=text, truncated=not end)
            for text, p, end in zip(completions, payload, ended, strict=True)
        ]
        return [score.value for score in scorers.map(reward.score, samples)]

    rows, micro = job["groups"] * job["group_size"], job["micro_batch"]
    trainer = Trainer(
        model=job["model"],
        processing_class=tokenizer,
        reward_funcs=unit_tests,
        train_dataset=Dataset.from_dict({"prompt": texts, "payload": [problem.payload.hex() for problem in chosen]}),
        args=GRPOConfig(
            output_dir=job["scratch"],
            use_cpu=True,
            bf16=job["bf16"],
            gradient_checkpointing=False,
            max_steps=job["warm_up"] + job["iterations"],
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=rows // micro,
            num_generations=job["group_size"],
            max_completion_length=job["max_tokens"],
            temperature=1.0,
            shuffle_dataset=False,
            learning_rate=job["lr"],
            lr_scheduler_type="constant",
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            beta=0.0,
            epsilon=0.2,
            epsilon_high=0.28,
            loss_type="dapo",
            scale_rewards="group",
            mask_truncated_completions=False,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=job["seed"],
        ),
        callbacks=[Borders(meter, job["warm_up"])],
    )
    trainer.meter = meter
    return trainer


def main(job: dict[str, Any]) -> None:
    """Train, and write to `out` the CPU seconds by part and the tokens sampled, of all iterations after the warm-up."""
    reward = UnitTests({"fence": "optional", "cells": job["scorers"]})
    try:
        meter = Meter()
        build(job, reward, meter).train()
        found = {"cpu_s": meter.total(), "tokens": meter.num_tokens}
    finally:
        reward.close()
    Path(job["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
