"""Real SGLang on a GPU together with the learner: a Qwen2.5-0.5B-shaped random model, 20 iterations, by each lane of weight updates.

Makes the model and a tokenizer itself, so nothing is downloaded. Prints, per lane: tokens sampled and trained per second, seconds to publish
and to load a version (verified, with the canary), seconds that running requests stood still for it, and the drift between SGLang's and the
learner's log-probs per iteration (before the first update of each batch, so numerical drift plus what one version of staleness moved).

    rlsys engines install sglang --device cuda
    python -m benchmarks.gpu.sglang [--iterations 20] [--lanes disk tensor distributed] [--json]

Not yet run: it was written where there was no GPU. Without one it says so and ends with exit code 3. `--tiny --device cpu` goes through the
same steps on a CPU with a model of two layers, which is how the script itself is tested.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

SHAPE = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
"""Qwen2.5-0.5B; its vocabulary is padded to 151,936."""
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
VOCABULARY = 151_936


def make_model(directory: Path, *, tiny: bool) -> None:
    """A random Qwen2 with the quickstart's tokenizer, whose few hundred ids are the first of its vocabulary."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    from rlsys.quickstart.tasks import make_problem
    from rlsys.quickstart.tokenizer import BOS_ID, EOS_ID, PAD_ID, save_tokenizer, train_tokenizer

    tokenizer = train_tokenizer([make_problem(random.Random(i), "train").prompt for i in range(200)])
    torch.manual_seed(0)
    config = Qwen2Config(
        **(TINY if tiny else SHAPE), vocab_size=tokenizer.get_vocab_size() if tiny else VOCABULARY, max_position_embeddings=4096,
        tie_word_embeddings=True, pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(torch.float32 if tiny else torch.bfloat16)
    model.generation_config = GenerationConfig(pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID)
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory, 4096)


def configuration(directory: Path, options: argparse.Namespace, lane: str) -> dict[str, Any]:
    """The run of one lane: generator and learner share the card."""
    cpu, tiny = options.device == "cpu", options.tiny
    sampling = (
        {"groups_per_iteration": 4, "group_size": 4, "max_tokens": 32}
        if tiny
        else {"groups_per_iteration": 32, "group_size": 8, "max_tokens": 1024}
    )
    dtype = "float32" if cpu else "bfloat16"
    return {
        "name": f"sglang-{lane}",
        "iterations": options.iterations,
        "model": {"path": str(directory / "model"), "max_context": 256 if options.tiny else 2048},
        "data": {"train": str(directory / "train.jsonl"), "prompt_template": "<|bos|>{prompt}<|sep|>"},
        "sampling": sampling,
        "evaluation": {"at_start": False, "at_end": False},
        "generators": {
            "engine": "sglang", "device": options.device, "dtype": dtype, "slots": 16 if options.tiny else 256,
            "options": {
                "lane": lane, "start_s": 900, **({} if cpu else {"memory_fraction": 0.4}),
                **({"python": str(options.python)} if options.python else {}),
                "environment": server_environment(directory, options),
            },
        },
        "rewarders": {"reward": "benchmarks.gpu.rewards:Evenness"},
        "learner": {"device": options.device, "dtype": dtype, "overlong": "keep", "gradient_checkpointing": not tiny},
        "weights": {"dtype": dtype},
        "deadlines": {"startup_s": 1200, "stall_s": 1800},
    }  # fmt: skip


def server_environment(directory: Path, options: argparse.Namespace) -> dict[str, str]:
    """What the server's environment gets: what was asked for, and for an interpreter from elsewhere the plug-in that draws by seed."""
    given = dict(pair.split("=", 1) for pair in options.environment)
    if options.python is not None:
        from rlsys.engines import write_plugin

        plugin = directory / "plugin"
        plugin.mkdir(exist_ok=True)
        write_plugin(plugin)
        given["PYTHONPATH"] = os.pathsep.join(filter(None, (str(plugin), given.get("PYTHONPATH"))))
    return given


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Figures per lane."""
    from rlsys.quickstart.tasks import write_dataset

    figures: dict[str, Any] = {}
    root = str(Path(__file__).parents[2])  # where the reward lies
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    with tempfile.TemporaryDirectory() as name:
        directory = options.keep or Path(name)
        directory.mkdir(parents=True, exist_ok=True)
        make_model(directory / "model", tiny=options.tiny)
        write_dataset(directory / "train.jsonl", "train", 256, 0)
        for lane in options.lanes:
            path = directory / f"{lane}.yaml"
            path.write_text(yaml.safe_dump(configuration(directory, options, lane)))
            run = directory / f"run-{lane}"
            print(f"lane {lane}", file=sys.stderr, flush=True)
            done = subprocess.run(
                [sys.executable, "-P", "-m", "rlsys", "up", str(path), "--run-dir", str(run), "--plain"], check=False, env=environment
            )
            if done.returncode:
                log = run / "logs" / "generator-0.log"
                figures[lane] = {"failed": done.returncode, "log": log.read_text()[-2000:] if log.exists() else "nothing was started"}
                continue
            figures[lane] = read(run)
    return figures


def read(run: Path) -> dict[str, Any]:
    """What a finished run's metrics say."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    iterations = [row for row in rows if "reward/mean" in row]

    def typical(key: str) -> float:
        """The median, without the first iteration: its numbers hold the start of the server."""
        values = [row[key] for row in iterations[1:] or iterations if row.get(key) is not None]
        return statistics.median(values) if values else float("nan")

    last = iterations[-1]
    swaps = max(1.0, last.get("engine/swaps_total") or 1.0)
    return {
        "iterations": len(iterations),
        "sampled_tokens_per_s": typical("throughput/sampled_tokens_per_s"),
        "trained_tokens_per_s": typical("train/tokens_per_s"),
        "publish_s": typical("train/publish_s"),
        "pause_s_per_swap": (last.get("engine/swap_pause_s_total") or 0.0) / swaps,
        "load_s": typical("engine/load_s"),
        "canary_error": typical("engine/canary_error"),
        "logprob_drift": [row.get("train/logprob_drift") for row in iterations],
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """What was asked for; ends with exit code 2 and a sentence for what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--lanes", nargs="+", default=["disk", "tensor", "distributed"], choices=("disk", "tensor", "distributed"))
    parser.add_argument("--python", type=Path, help="interpreter that has sglang (default: what `rlsys engines install sglang` made)")
    parser.add_argument("--environment", nargs="*", default=[], metavar="NAME=VALUE", help="environment variables of the server")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs here (default: thrown away)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="two layers, few tokens: to try the script itself")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args(arguments)
    if wrong := [pair for pair in options.environment if "=" not in pair]:
        parser.error(f"--environment {wrong[0]}: expected NAME=VALUE")
    if options.keep is not None:
        options.keep = options.keep.expanduser().absolute()  # paths in a configuration count from where it stands
        if old := [lane for lane in options.lanes if (options.keep / f"run-{lane}").exists()]:
            parser.error(f"--keep {options.keep}: holds a run of lane {old[0]} already; name a new directory")
    if options.python is not None:
        options.python = options.python.expanduser().absolute()
    return options


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    options = parse(arguments)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("benchmarks.gpu.sglang: no CUDA device here", file=sys.stderr)
            return 3
    figures = measure(options)
    if options.json:
        print(json.dumps(figures))
        return int(any("failed" in row for row in figures.values()))
    for lane, row in figures.items():
        if "failed" in row:
            print(f"{lane}: failed with exit code {row['failed']}\n{row['log']}")
            continue
        rates = f"sampled {row['sampled_tokens_per_s']:.0f} tok/s, trained {row['trained_tokens_per_s']:.0f} tok/s"
        swap = (
            f"publish {row['publish_s']:.2f} s, update {row['load_s']:.2f} s, pause {row['pause_s_per_swap']:.3f} s per swap, "
            f"canary {row['canary_error']:.2e}"
        )
        print(f"{lane}: {rates}, {swap}, drift {row['logprob_drift']}")
    return int(any("failed" in row for row in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
