"""The learner's step on one device: tokens per second, model FLOP utilisation and peak memory, with and without each memory option.

    python -m benchmarks.gpu.learner                    a random model of 1.5B parameters, samples of 16,384 tokens (needs a GPU)
    python -m benchmarks.gpu.learner --tiny             the same script on a tiny model, also on a CPU: shows that it runs, nothing else
    python -m benchmarks.gpu.learner --only plain,lora  some of the variants

Each variant is a process of its own, so that its peak is its own. MFU counts 6 FLOPs per parameter and token (4 for a frozen parameter, which
has no gradient) and 6 * layers * width * tokens per token for causal attention, as PaLM (Chowdhery et al. 2022, appendix B) does; activations
that are computed again are not counted as useful work.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "8-bit": {"gradient_checkpointing": True, "optimizer": {"name": "adamw_8bit"}},
    "paged": {"gradient_checkpointing": True, "optimizer": {"name": "paged_adamw"}},
    "offload": {"gradient_checkpointing": True, "optimizer": {"offload": True}},
    "muon": {"gradient_checkpointing": True, "optimizer": {"name": "muon"}},
    "lora": {"gradient_checkpointing": True, "lora": {"rank": 16}},
}
LARGE = {
    "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip
"""The shape of Qwen2.5-1.5B."""
TINY = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0, "B200": 2250.0}
"""bfloat16, dense, as the makers state it."""


def main() -> int:
    """Run the variants one after the other and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short samples, also on a CPU")
    parser.add_argument("--tokens", type=int, help="of one sample (default 16384, tiny 64)")
    parser.add_argument("--samples", type=int, default=4, help="of an iteration (default 4)")
    parser.add_argument("--iterations", type=int, default=3, help="measured ones, after one that is not (default 3)")
    parser.add_argument("--only", help=f"some of {','.join(VARIANTS)}")
    parser.add_argument("--peak-tflops", type=float, help="of the device in bfloat16, for MFU, if its name is not known")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.tokens = options.tokens or (64 if options.tiny else 16384)
    if options.variant:
        print(json.dumps(measure(options)))
        return 0
    names = options.only.split(",") if options.only else list(VARIANTS)
    if unknown := sorted(set(names) - set(VARIANTS)):
        parser.error(f"--only: {', '.join(unknown)} is not known; there are {', '.join(VARIANTS)}")
    import torch

    if not options.tiny and not torch.cuda.is_available():
        print("benchmarks.gpu.learner: no CUDA device here; --tiny runs the script on a CPU", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        make_model(Path(scratch), TINY if options.tiny else LARGE)
        results = [run(name, Path(scratch), options) for name in names]
    print(json.dumps(results, indent=1) if options.json else table(results))
    return 0


def make_model(directory: Path, shape: dict[str, Any]) -> None:
    """Random weights in the given shape."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**shape)).to(torch.bfloat16).save_pretrained(directory)


def run(name: str, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One variant in a process of its own; one that fails says why."""
    command = [sys.executable, "-m", "benchmarks.gpu.learner", "--variant", name, "--model", str(model)]
    command += ["--tokens", str(options.tokens), "--samples", str(options.samples), "--iterations", str(options.iterations)]
    command += ["--tiny"] if options.tiny else []
    command += ["--peak-tflops", str(options.peak_tflops)] if options.peak_tflops else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"variant": name, "failed": "out of memory" if "OutOfMemory" in done.stderr else words[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one variant, in this process."""
    import torch

    from learner.parallel import SingleProcess
    from learner.settings import LearnerSettings
    from learner.step import Step

    cuda = torch.cuda.is_available()
    settings = LearnerSettings.model_validate(
        {
            "device": "cuda" if cuda else "cpu",
            "tokens_per_microbatch": options.tokens,
            "threads": 1 if cuda else torch.get_num_threads(),
            **VARIANTS[options.variant],
        }
    )
    step = Step(settings, options.model, SingleProcess())
    samples = make_samples(options.samples, options.tokens, step.model.vocabulary)
    total = options.iterations + 1
    step.train(samples, 0, total)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for iteration in range(1, total):
        step.train(samples, iteration, total)
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / options.iterations
    tokens = options.samples * options.tokens
    flops = tokens * flops_per_token(step.model.network, options.tokens)
    peak = options.peak_tflops or next((p for name, p in PEAK_TFLOPS.items() if cuda and name in torch.cuda.get_device_name()), None)
    used = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "variant": options.variant,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "tokens_per_s": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": None if peak is None else flops / seconds / 1e12 / peak,
        "peak_gb": used / 1e9,
        "iteration_s": seconds,
    }


def flops_per_token(network: Any, tokens: int) -> float:
    """Useful work for one token of a sample of this length, forward and backward."""
    config = network.config
    seen = {id(p): p for p in network.parameters()}.values()  # a tied head counts once, as the head; the embedding itself is a look-up
    matrices = sum(p.numel() * (6 if p.requires_grad else 4) for p in seen if p.ndim == 2)
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return float(matrices + 6 * config.num_hidden_layers * width * tokens)


def make_samples(count: int, tokens: int, vocabulary: int) -> list[Any]:
    """Samples of exactly `tokens` tokens, a sixteenth of them prompt."""
    import numpy as np

    from learner.packing import TrainSample

    rng = np.random.default_rng(0)
    prompt = tokens // 16
    return [
        TrainSample(
            group_id=i,
            index=0,
            prompt_ids=rng.integers(0, vocabulary, prompt).astype(np.int32),
            token_ids=rng.integers(0, vocabulary, tokens - prompt).astype(np.int32),
            behaviour_logprobs=np.full(tokens - prompt, -np.log(vocabulary), np.float32),
            loss_mask=np.ones(tokens - prompt, np.bool_),
            advantage=1.0 if i % 2 else -1.0,
            temperature=1.0,
        )
        for i in range(count)
    ]


def table(results: list[dict[str, Any]]) -> str:
    """One line a variant."""
    lines = [f"{'variant':<15}{'tokens/s':>12}{'TFLOP/s':>10}{'MFU':>8}{'peak GB':>10}{'s/iteration':>13}"]
    for one in results:
        if "failed" in one:
            lines.append(f"{one['variant']:<15}{one['failed']}")
            continue
        mfu = "-" if one["mfu"] is None else f"{one['mfu']:.1%}"
        lines.append(
            f"{one['variant']:<15}{one['tokens_per_s']:>12,.0f}{one['tflops']:>10.3f}{mfu:>8}{one['peak_gb']:>10.2f}{one['iteration_s']:>13.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
