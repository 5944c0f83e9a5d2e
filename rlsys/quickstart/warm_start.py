"""Train the quickstart's base model from nothing on the noisy corpus, as `rlsys sft` would. The only file of the quickstart that needs torch.

corpus, tokenizer, random model --> DIRECTORY/work --rlsys.sft.training.fine_tune--> work/final_model --> DIRECTORY

Run by `base_model` as a child: `python -m rlsys.quickstart.warm_start DIRECTORY RECIPE_JSON`, progress on stdout.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from learner.parallel import SingleProcess
from rlsys.quickstart.base_model import Recipe
from rlsys.quickstart.tasks import make_problem, noisy_program
from rlsys.quickstart.tokenizer import BOS_ID, EOS_ID, PAD_ID, PROMPT_TEMPLATE, save_tokenizer, train_tokenizer
from rlsys.sft.config import SftConfig, parse_sft_config
from rlsys.sft.training import fine_tune, read_material

MAX_CONTEXT = 512
_TOKENIZER_SAMPLES = 2000
_REPORT_S = 5.0


def build(directory: Path, recipe: Recipe, progress: Callable[[str], None]) -> None:
    """Write the model and its tokenizer into an existing directory. The result depends on the recipe alone."""
    texts = _corpus(recipe)
    tokenizer = train_tokenizer(text for pair in texts[:_TOKENIZER_SAMPLES] for text in pair)
    work = directory / "work"
    config = _settings(work, recipe)
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            _save(Qwen3ForCausalLM(_architecture(tokenizer.get_vocab_size())), tokenizer, config.model.path)
            _write(texts[: recipe.steps * recipe.batch_size], config.data.train)
            fine_tune(config, read_material(config), work, SingleProcess(), _Report(progress, recipe.steps))
    finally:
        torch.set_num_threads(threads)
    for file in (work / "final_model").iterdir():
        file.rename(directory / file.name)
    shutil.rmtree(work)


def _settings(work: Path, recipe: Recipe) -> SftConfig:
    """The rates are for a model trained from nothing; each example comes once."""
    return parse_sft_config(
        {
            "seed": recipe.seed,
            "model": {"path": str(work / "untrained")},
            "data": {"train": str(work / "corpus.jsonl"), "prompt_template": PROMPT_TEMPLATE, "too_long": "refuse"},
            "steps": recipe.steps,
            "samples_per_step": recipe.batch_size,
            "learner": {
                "device": "cpu",
                "threads": recipe.threads,
                "dtype": "bfloat16" if _has_bfloat16() else "float32",
                "layout": "packed",
                "optimizer": {"name": "muon", "lr": 1e-2, "adamw_lr": 3e-3, "weight_decay": 0.1, "betas": [0.9, 0.95]},
                "schedule": {"name": "cosine", "warmup_iterations": min(20, recipe.steps), "final_fraction": 0.1},
            },
        },
        "the quickstart's warm start",
    )


def _write(pairs: list[tuple[str, str]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for prompt, program in pairs:
            file.write(json.dumps({"prompt": prompt, "completion": program}) + "\n")


def _corpus(recipe: Recipe) -> list[tuple[str, str]]:
    """Pairs of prompt and noisy program, all of the training split; at least enough for the tokenizer."""
    rng = random.Random(recipe.seed)
    problems = (make_problem(rng, "train") for _ in range(max(recipe.steps * recipe.batch_size, _TOKENIZER_SAMPLES)))
    return [(problem.prompt, noisy_program(rng, problem)) for problem in problems]


def _architecture(vocab_size: int) -> Any:
    """0.89 M parameters: larger models learn more per token but less per second on two cores."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


def _has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; where it is emulated, float32 is faster."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _save(model: Any, tokenizer: Tokenizer, directory: Path) -> None:
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID
    )
    model.eval().save_pretrained(directory)
    save_tokenizer(tokenizer, directory, MAX_CONTEXT)


class _Report:
    """Says every few seconds how far the warm start is and when it ends."""

    def __init__(self, progress: Callable[[str], None], num_steps: int) -> None:
        self._progress = progress
        self._num_steps = num_steps
        self._started_s = self._reported_s = time.monotonic()

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        now_s = time.monotonic()
        if now_s - self._reported_s < _REPORT_S and step < self._num_steps:
            return
        self._reported_s = now_s
        left_s = (now_s - self._started_s) / step * (self._num_steps - step)
        self._progress(f"warm start: step {step} of {self._num_steps}, loss {values['train/loss']:.3f}, about {left_s:.0f} s left")


if __name__ == "__main__":
    build(Path(sys.argv[1]), Recipe(**json.loads(sys.argv[2])), lambda line: print(line, flush=True))
