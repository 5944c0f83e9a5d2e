"""A version of adapters alone beside one of the whole model: bytes, CPU time to publish and to swap in, and whether both are one policy.

python -m benchmarks.adapters [--model DIR] [--rank 16]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from actors.engines import EngineOptions
from actors.engines.embedded import EmbeddedEngine
from learner.parallel import SingleProcess
from learner.publisher import Publisher
from learner.settings import LearnerSettings
from learner.step import Step
from protocol.messages import Version

IDS = np.arange(3, 40, dtype=np.int32)
REPEATS = 5


def cpu_s(work: Callable[[int], object]) -> float:
    """Median processor seconds of `work(i)`, i = 1..REPEATS."""
    taken = []
    for i in range(1, REPEATS + 1):
        started = time.process_time()
        work(i)
        taken.append(time.process_time() - started)
    return float(np.median(taken))


def main() -> None:
    """Print one line for each way, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a Hugging Face directory; the quickstart's base model if not given")
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    model = options.model or _quickstart()
    settings = {"device": "cpu", "dtype": "float32", "lora": {"rank": options.rank, "publish": "adapter"}}
    step = Step(LearnerSettings.model_validate(settings), model, SingleProcess())
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in step.model.network.named_parameters():
            if "lora_B" in name:  # zero at first: as if trained
                parameter.normal_(std=0.02)
    sizes, scores = [], []
    with tempfile.TemporaryDirectory() as directory:
        for name, lora, tensors in (("adapters", step.settings.lora, step.version_tensors), ("whole model", None, step.published_tensors)):
            publisher = Publisher(Path(directory) / name, model, "float32", adapters=lora)
            publish_s = cpu_s(lambda i, p=publisher, t=tensors: p.publish(Version(i, 0), t()))  # type: ignore[misc]
            ready = publisher.publish(Version(REPEATS + 1, 0), tensors())
            engine = EmbeddedEngine(EngineOptions(model_path=model, max_context=128, slots=4))
            engine.load_weights(Path(ready.directory), Version(0, 0))
            swap_s = cpu_s(lambda i, e=engine, r=ready: e.load_weights(Path(r.directory), Version(i, 0)))  # type: ignore[misc]
            scores.append(engine.score(IDS[:4], IDS[4:], 1.0))
            sizes.append(ready.num_bytes)
            print(f"{name:12} {ready.num_bytes:12,} bytes, published in {publish_s:.4f} CPU-s, swapped in {swap_s:.4f} CPU-s")
    print(f"largest difference of log-probs {np.abs(scores[0] - scores[1]).max():.2g} nats")
    print(f"whole model / adapters {sizes[1] / sizes[0]:.1f}")


def _quickstart() -> Path:
    from rlsys.quickstart.base_model import ensure_base_model

    return ensure_base_model(print).path


if __name__ == "__main__":
    main()
