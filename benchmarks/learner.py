"""The learner's step on a CPU: tokens per CPU-second by layout, against padding in the order of arrival.

    python -m benchmarks.learner [--shape quickstart|long] [--threads N] [--dtype bfloat16|float32] [--repeats R] [--layouts L ...]

quickstart: 16 groups of 8 with prompts of 28-42 tokens and completions of 15-65. long: 64 samples of 20-400 tokens with prompts of 16 and no
two of one group, so that only padding can be saved. The model is that of the quickstart. Rounds of all layouts alternate, and the figure
is the median over rounds, because the machine may be shared. Against TRL's step: `python -m benchmarks.learner_trl`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from learner.packing import TrainSample, build
from learner.parallel import SingleProcess
from learner.settings import LearnerSettings
from learner.step import Step, _Work

VOCABULARY = 762


def make_samples(shape: str, seed: int) -> list[TrainSample]:
    """One batch; advantages are never 0, so every sample is computed."""
    rng = np.random.default_rng(seed)
    group_size, prompts, tokens, count = (8, (28, 43), (15, 66), 128) if shape == "quickstart" else (1, (16, 17), (4, 385), 64)
    samples = []
    for i in range(count):
        if i % group_size == 0:
            prompt = rng.integers(4, VOCABULARY, int(rng.integers(*prompts))).astype(np.int32)
        length = int(rng.integers(*tokens))
        samples.append(
            TrainSample(
                group_id=i // group_size,
                index=i % group_size,
                prompt_ids=prompt,
                token_ids=rng.integers(4, VOCABULARY, length).astype(np.int32),
                behaviour_logprobs=np.full(length, -np.log(VOCABULARY), np.float32),
                loss_mask=np.ones(length, np.bool_),
                advantage=float(rng.choice([-1.0, 1.0])),
            )
        )
    return samples


def save_model(directory: Path) -> Path:
    """A model of the quickstart's shape with random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        intermediate_size=384, tie_word_embeddings=True, max_position_embeddings=1024,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


class UnsortedStep(Step):
    """The baseline: rows of one sample, in the order of arrival."""

    def _share(self, weighted, useful):  # type: ignore[no-untyped-def]
        rows = max(1, self.settings.tokens_per_microbatch // max(weighted.samples[i].length for i in useful))
        return [_Work(build(weighted, [[i] for i in useful[start : start + rows]])) for start in range(0, len(useful), rows)]


def main() -> None:
    """Print one line for each layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["quickstart", "long"], default="quickstart")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layouts", nargs="*", default=["unsorted", "sorted", "packed", "shared"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        save_model(Path(directory))
        steps = {}
        for layout in options.layouts:
            settings = LearnerSettings.model_validate(
                {
                    "device": "cpu",
                    "dtype": options.dtype,
                    "threads": options.threads,
                    "layout": "sorted" if layout == "unsorted" else layout,
                    "optimizer": {"lr": 1e-6},
                }
            )
            steps[layout] = (UnsortedStep if layout == "unsorted" else Step)(settings, Path(directory), SingleProcess())
    seconds: dict[str, list[float]] = {layout: [] for layout in steps}
    batches = [make_samples(options.shape, seed) for seed in range(options.repeats + 1)]
    for round_number, batch in enumerate(batches):
        for layout, step in steps.items():
            started = time.process_time()
            step.train(batch, round_number, len(batches))
            if round_number:
                seconds[layout].append(time.process_time() - started)
    tokens = statistics.mean(sum(len(s.prompt_ids) + len(s.token_ids) for s in batch) for batch in batches[1:])
    print(f"{options.shape}: {tokens:.0f} tokens of prompts and completions in a batch, {options.dtype}, {options.threads} threads")
    base = statistics.median(seconds[options.layouts[0]])
    for layout, found in seconds.items():
        median = statistics.median(found)
        print(
            f"  {layout:<9} {median:6.3f} CPU-s per batch, {tokens / median:>7.0f} tokens per CPU-second, {base / median:.2f} x {options.layouts[0]}"
        )


if __name__ == "__main__":
    main()
