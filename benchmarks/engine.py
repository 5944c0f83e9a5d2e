"""Embedded engine against transformers' `model.generate()`: tokens per CPU-second on the same model, prompts and completion lengths.

The load is a stream: more groups than fit at once, `--group-size` samples each, lengths uniform in 8..120, forced on both sides (a
limit per sample in the engine, a stopping criterion per row for `generate()`, no stop token on either). At most `--concurrent` samples
run at once: the engine starts the next sample when one ends; `generate()` takes batches of that many, in the order of the stream, and
finishes each batch, as it can do no other. Only the tokens asked for count. Both sides sample at temperature 1 without top-k or top-p;
the engine returns log-probs as well, `generate()` is not asked for them. Model: Qwen3, 4 layers x 128, 762 tokens, random weights, as
in the quickstart.

    python -m benchmarks.engine [--json] [--repeats 5]
    python -m benchmarks.engine --engine sglang     # the SGLang engine beside a plain client; see benchmarks/engine_sglang.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, StoppingCriteria, StoppingCriteriaList

from actors.engines import EngineOptions, SampleRequest, Sampling
from actors.engines.embedded import EmbeddedEngine
from protocol.messages import Version

VOCABULARY, SHORTEST, LONGEST = 762, 8, 120
PROMPT_TOKENS = (16, 48)
Work = Callable[..., int]
"""Samples a stream; returns the number of tokens."""


class Group:
    """A prompt and the completion lengths of its samples."""

    def __init__(self, name: str, size: int, rng: np.random.Generator) -> None:
        self.name = name
        self.prompt_ids = rng.integers(4, VOCABULARY, rng.integers(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1)).astype(np.int32)
        self.lengths: npt.NDArray[np.int64] = rng.integers(SHORTEST, LONGEST + 1, size)


class FixedLengthEngine(EmbeddedEngine):
    """The embedded engine, with the length of each sample given instead of found."""

    lengths: dict[str, npt.NDArray[np.int64]]

    def _limit(self, request: SampleRequest, position: int) -> int:
        return len(request.prompt_ids) + int(self.lengths[request.request_id][position])


class FixedLengths(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a `generate()` batch at its own length."""

    def __init__(self, prompt_tokens: int, lengths: torch.Tensor) -> None:
        self.ends = prompt_tokens + lengths

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


def build_model(directory: Path) -> None:
    """Write the quickstart's model with random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        intermediate_size=384, tie_word_embeddings=True, max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(directory)


def run_engine(engine: FixedLengthEngine, groups: list[Group]) -> int:
    """Sample all groups; returns the number of tokens."""
    engine.lengths = {group.name: group.lengths for group in groups}
    sampling, tokens = Sampling(max_tokens=LONGEST), 0
    for group in groups:
        engine.submit(
            SampleRequest(request_id=group.name, prompt_ids=group.prompt_ids, seeds=tuple(range(len(group.lengths))), sampling=sampling)
        )
    left = sum(len(group.lengths) for group in groups)
    while left:
        ended = engine.step(0)
        left -= len(ended)
        tokens += sum(len(sample.token_ids) for sample in ended)
    return tokens


@torch.inference_mode()
def run_generate(model: Any, groups: list[Group], concurrent: int) -> int:
    """The same with `generate()`, batch by batch; returns the number of tokens asked for."""
    size = len(groups[0].lengths)
    for first in range(0, len(groups), concurrent // size):
        batch = groups[first : first + concurrent // size]
        longest = max(len(group.prompt_ids) for group in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, group in enumerate(batch):
            ids[i, longest - len(group.prompt_ids) :] = torch.from_numpy(group.prompt_ids)
            mask[i, longest - len(group.prompt_ids) :] = 1
        lengths = torch.from_numpy(np.concatenate([group.lengths for group in batch]))
        out = model.generate(
            ids, attention_mask=mask, num_return_sequences=size, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=LONGEST, stopping_criteria=StoppingCriteriaList([FixedLengths(longest, lengths)]),
        )  # fmt: skip
        if out.shape != (len(batch) * size, longest + int(lengths.max())):
            raise RuntimeError(f"generate() returned {tuple(out.shape)}: the lengths were not forced")
    return sum(int(group.lengths.sum()) for group in groups)


def rate(work: Work, *arguments: Any) -> float:
    """Tokens per CPU-second of one run, all threads counted."""
    started = time.process_time()
    tokens = work(*arguments)
    return tokens / (time.process_time() - started)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Medians over repeats, the two sides taking turns so that a neighbour on the machine disturbs both alike."""
    figures: dict[str, Any] = {"settings": vars(options)}
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    streams = [[Group(f"{r}-{i}", options.group_size, rng) for i in range(options.groups)] for r in range(options.repeats + 1)]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        build_model(directory)
        for dtype in options.dtypes:
            engine = FixedLengthEngine(
                EngineOptions(model_path=directory, max_context=256, slots=options.concurrent, threads=options.threads, dtype=dtype)
            )
            engine.load_weights(directory, Version(0))
            model = Qwen3ForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
            warm_up, concurrent = streams[0][: options.concurrent // options.group_size], options.concurrent
            run_engine(engine, warm_up)  # allocations and the choice of kernels
            run_generate(model, warm_up, concurrent)
            embedded, generate = [], []
            for groups in streams[1:]:
                embedded.append(rate(run_engine, engine, groups))
                generate.append(rate(run_generate, model, groups, concurrent))
            engine.close()
            figures[dtype] = {
                "embedded_tokens_per_cpu_s": statistics.median(embedded),
                "generate_tokens_per_cpu_s": statistics.median(generate),
                "ratio": statistics.median(e / g for e, g in zip(embedded, generate, strict=True)),
                "ratios": [round(e / g, 3) for e, g in zip(embedded, generate, strict=True)],
            }
    return figures


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns the figures as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--engine", choices=("embedded", "sglang"), default="embedded", help="embedded: beside generate(); sglang: beside a plain client"
    )
    parser.add_argument("--stream-interval", type=int, default=32, help="with sglang: tokens per streamed piece")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--groups", type=int, help="groups in the stream of one repeat (default 48; 24 with sglang)")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--concurrent", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args(arguments)
    options.groups = options.groups or (48 if options.engine == "embedded" else 24)
    if options.concurrent % options.group_size:
        parser.error(f"--concurrent {options.concurrent} is not a multiple of --group-size {options.group_size}")
    if options.engine == "sglang":
        from benchmarks import engine_sglang

        figures = engine_sglang.measure(options, build_model, Group)
        line = f"engine {figures['engine_tokens_per_s']:.0f}, plain client {figures['plain_tokens_per_s']:.0f} tokens per second"
        costs = f"client's CPU {figures['engine_cpu_s_per_1000_tokens']:.3f} and {figures['plain_cpu_s_per_1000_tokens']:.3f} s per 1,000 tokens"
        print(json.dumps(figures) if options.json else f"{line}; {costs}; median ratio {figures['ratio']:.3f} of {figures['ratios']}")
        return figures
    figures = measure(options)
    if options.json:
        print(json.dumps(figures))
        return figures
    for dtype in options.dtypes:
        row = figures[dtype]
        rates = f"embedded {row['embedded_tokens_per_cpu_s']:.0f}, generate() {row['generate_tokens_per_cpu_s']:.0f} tokens per CPU-second"
        print(f"{dtype}: {rates}; median ratio {row['ratio']:.2f} of {row['ratios']}")
    return figures


if __name__ == "__main__":
    main()
