"""The learner's step against TRL's on the same model and batches, nothing sampled: tokens per CPU-second of each, and their ratio.

    python -m benchmarks.learner_trl [--shape quickstart|long] [--dtype float32|bfloat16] [--threads N] [--repeats R] [--trl-rows ROWS]

TRL's side is GRPOTrainer.train() itself with the batch put in place of what it would sample and score; from there on it runs as it is: its
splitting, its forward and backward passes (with its own fused head), clipping, AdamW. Both sides have one dtype, number of threads, objective
(DAPO's clipped surrogate, mean over the batch's tokens, behaviour log-probs given), learning rate, AdamW and clipping, no gradient
checkpointing, entropy as a metric; they take turns on each batch. The first batch does not count, and its gradient norms must agree, or
nothing is printed.

What differs: TRL pads prompts to the batch's longest on the left and completions on the right, in micro-batches of --trl-rows rows; we lay
samples out by `layout: auto`, in micro-batches of `tokens_per_microbatch` (8,192). Our figure has the checks and metrics of a step in it,
TRL's has its trainer's loop.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.learner import VOCABULARY, make_samples, save_model
from learner.packing import TrainSample
from learner.parallel import SingleProcess
from learner.settings import LearnerSettings
from learner.step import Step

LR = 1e-6
AGREE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Relative difference of gradient norms that is still the same computation."""


class GivenBatches(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer that is handed its batches."""

    batches: list[list[TrainSample]]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
        return padded(self.batches[self.state.global_step])


def padded(samples: list[TrainSample]) -> dict[str, torch.Tensor]:
    """As TRL lays a batch out: prompts end and completions begin at the same column."""
    prompts, longest = max(len(s.prompt_ids) for s in samples), max(len(s.token_ids) for s in samples)
    found = {
        "prompt_ids": torch.zeros(len(samples), prompts, dtype=torch.long),
        "completion_ids": torch.zeros(len(samples), longest, dtype=torch.long),
        "old_per_token_logps": torch.zeros(len(samples), longest),
    }
    masks = {
        "prompt_mask": torch.zeros(len(samples), prompts, dtype=torch.long),
        "completion_mask": torch.zeros(len(samples), longest, dtype=torch.long),
    }
    for i, sample in enumerate(samples):
        before, after = len(sample.prompt_ids), len(sample.token_ids)
        found["prompt_ids"][i, prompts - before :] = torch.from_numpy(sample.prompt_ids)
        found["completion_ids"][i, :after] = torch.from_numpy(sample.token_ids)
        found["old_per_token_logps"][i, :after] = torch.from_numpy(sample.behaviour_logprobs)
        masks["prompt_mask"][i, prompts - before :] = 1
        masks["completion_mask"][i, :after] = 1
    advantages = torch.tensor([s.advantage for s in samples], dtype=torch.float32)
    return found | masks | {"advantages": advantages, "num_items_in_batch": masks["completion_mask"].sum()}


class InTurns(TrainerCallback):  # type: ignore[misc]
    """Times TRL's step, then ours on the same batch."""

    def __init__(self, step: Step, batches: list[list[TrainSample]]) -> None:
        self._step, self._batches = step, batches
        self.theirs: list[float] = []
        self.ours: list[float] = []
        self.norms: list[tuple[float, float]] = []
        self._ours_norm = self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self._started = time.process_time()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        ended = time.process_time()
        self.theirs.append(ended - self._started)
        number = state.global_step - 1
        found = self._step.train(self._batches[number], number, len(self._batches))
        self.ours.append(time.process_time() - ended)
        self._ours_norm = found.values["grad_norm"]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "grad_norm" in logs:
            self.norms.append((float(logs["grad_norm"]), self._ours_norm))


def make_trainer(model: Path, scratch: str, batches: list[list[TrainSample]], options: argparse.Namespace, turns: InTurns) -> GivenBatches:
    """GRPOTrainer on the model; prompts and rewards are there because it asks for them, and are not used."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    rows, group = len(batches[0]), 8 if options.shape == "quickstart" else 2
    trainer = GivenBatches(
        model=str(model),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["w2"] * (rows // group * len(batches))}),
        args=GRPOConfig(
            output_dir=scratch, use_cpu=True, bf16=options.dtype == "bfloat16", gradient_checkpointing=False, max_steps=len(batches),
            per_device_train_batch_size=options.trl_rows, gradient_accumulation_steps=rows // options.trl_rows, num_generations=group,
            max_completion_length=512, temperature=1.0, shuffle_dataset=False, learning_rate=LR, lr_scheduler_type="constant",
            adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, beta=0.0, epsilon=0.2, epsilon_high=0.28, loss_type="dapo",
            report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        ),
        callbacks=[turns],
    )  # fmt: skip
    trainer.batches = batches
    return trainer


def main() -> None:
    """Print one line for each side, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["quickstart", "long"], default="quickstart")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--trl-rows", type=int, default=32, help="rows of TRL's micro-batches")
    options = parser.parse_args()
    batches = [make_samples(options.shape, seed) for seed in range(options.repeats + 1)]
    if len(batches[0]) % options.trl_rows:
        parser.error(f"--trl-rows is {options.trl_rows}: expected a divisor of the batch's {len(batches[0])} samples")
    with tempfile.TemporaryDirectory() as directory:
        model = save_model(Path(directory) / "model")
        settings = LearnerSettings.model_validate(
            {
                "device": "cpu", "dtype": options.dtype, "threads": options.threads, "gradient_clip": 1.0, "correction": {"mode": "off"},
                "objective": "clipped", "objective_options": {"clip_low": 0.2, "clip_high": 0.28},
                "optimizer": {"lr": LR, "betas": (0.9, 0.95), "weight_decay": 0.0},
            }
        )  # fmt: skip
        turns = InTurns(Step(settings, model, SingleProcess()), batches)
        trainer = make_trainer(model, directory, batches, options, turns)
        torch.set_num_threads(options.threads)
        trainer.train()
    theirs_norm, ours_norm = turns.norms[0]
    if not np.isclose(theirs_norm, ours_norm, rtol=AGREE[options.dtype]):
        raise SystemExit(f"the two sides found gradients of norm {theirs_norm:.6g} (TRL) and {ours_norm:.6g}: there is nothing to compare")
    tokens = statistics.mean(sum(len(s.prompt_ids) + len(s.token_ids) for s in batch) for batch in batches[1:])
    theirs, ours = statistics.median(turns.theirs[1:]), statistics.median(turns.ours[1:])
    print(f"{options.shape}: {tokens:.0f} tokens of prompts and completions in a batch, {options.dtype}, {options.threads} threads")
    print(f"  first gradient norm: TRL {theirs_norm:.6f}, rlsys {ours_norm:.6f}")
    for name, seconds in (("TRL", theirs), ("rlsys", ours)):
        print(f"  {name:<6} {seconds:6.3f} CPU-s per batch, {tokens / seconds:>7.0f} tokens per CPU-second")
    print(f"  rlsys / TRL {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
