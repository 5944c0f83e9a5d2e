"""The log-prob head, with logits kept or computed again, against the naive one: CPU-seconds and peak memory of one forward and backward pass.

    python -m benchmarks.logprob [--tokens N] [--hidden D] [--vocabulary V ...] [--dtype bfloat16|float32] [--memory]

Every measurement is a process of its own, so that peaks do not mix. `--memory` compares peaks at 8,192 tokens and a vocabulary of 128k; the
naive way is measured with as many tokens as fit in half of the memory that is free, and its peak is proportional to tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from learner import logprobs
from learner.logprobs import chunked_logprobs, naive_logprobs

ROOT = Path(__file__).resolve().parents[1]
NAIVE_COPIES = 5
"""Tensors [tokens, vocabulary] in float32 that the naive way holds at its peak, to choose how many tokens may be measured."""


def measure(way: str, tokens: int, hidden: int, vocabulary: int, dtype: str, repeats: int) -> dict[str, float]:
    """Least CPU-seconds of `repeats` passes, and bytes of peak memory above that before the first; in this process."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    weight_VD = (torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5).requires_grad_()
    targets_T = torch.randint(vocabulary, (tokens,), generator=generator)
    temperature_T = torch.ones(tokens)
    if way == "again":
        logprobs.KEPT_BYTES = 0
    before = peak_kib()
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            if way == "naive":
                logprobs_T, _ = naive_logprobs(hidden_TD, weight_VD, None, targets_T, temperature_T)
            else:
                logprobs_T, _ = chunked_logprobs(hidden_TD, weight_VD, targets_T, temperature_T)
        logprobs_T.sum().backward()  # type: ignore[no-untyped-call]
        hidden_TD.grad = weight_VD.grad = None
        seconds.append(time.process_time() - started)
    return {"seconds": min(seconds), "bytes": (peak_kib() - before) * 1024.0}


def in_child(way: str, tokens: int, hidden: int, vocabulary: int, dtype: str, repeats: int = 3) -> dict[str, float]:
    """`measure` in a process of its own."""
    arguments = json.dumps([way, tokens, hidden, vocabulary, dtype, repeats])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.logprob", "--child", arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def peak_kib() -> int:
    """Largest resident set of this program in KiB. Not ru_maxrss, which a child has from its parent at the start."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def free_bytes() -> int:
    """Memory that can be taken without swapping."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def main() -> None:
    """Print one line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, nargs="*", default=[762, 2048, 4096, 8192, 32768])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*json.loads(options.child))))
        return
    if options.memory:
        tokens, vocabulary = 8192, 131072
        chunked = in_child("kept", tokens, options.hidden, vocabulary, options.dtype, 1)
        measured = min(tokens, int(free_bytes() / 2 / (NAIVE_COPIES * 4 * vocabulary)))
        naive = in_child("naive", measured, options.hidden, vocabulary, options.dtype, 1)["bytes"] * tokens / measured
        print(f"{tokens} tokens, vocabulary {vocabulary}, hidden {options.hidden}, {options.dtype}:")
        print(f"  chunked {chunked['bytes'] / 2**30:.2f} GiB, naive {naive / 2**30:.2f} GiB (measured with {measured} tokens)")
        print(f"  chunked / naive {chunked['bytes'] / naive:.1%}")
        return
    print(f"{options.tokens} tokens, hidden {options.hidden}, {options.dtype}, one thread: tokens per CPU-second")
    for vocabulary in options.vocabulary:
        rates = {
            way: options.tokens / in_child(way, options.tokens, options.hidden, vocabulary, options.dtype)["seconds"]
            for way in ("naive", "kept", "again")
        }
        print(
            f"  vocabulary {vocabulary:>7}: naive {rates['naive']:>9.0f}, kept {rates['kept']:>9.0f} ({rates['kept'] / rates['naive']:.2f}), "
            f"again {rates['again']:>9.0f} ({rates['again'] / rates['naive']:.2f})"
        )


if __name__ == "__main__":
    main()
