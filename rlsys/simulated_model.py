"""`builtin:simulated`: the smallest model directory and dataset that a simulated run needs. Nothing in it can be trained or sampled from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rlsys.quickstart.cache import ensure_entry, fingerprint

VOCABULARY = 512
CONTEXT = 1 << 20
PROBLEMS = 4096
_EOS = "<|eos|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedFiles:
    """Where the model directory and the problems are."""

    model: Path
    train: Path


def ensure_simulated() -> SimulatedFiles:
    """The files, from the cache or else written now. Raises DataError when the cache cannot be written."""
    entry, _ = ensure_entry(f"simulated-{fingerprint(('rlsys/simulated_model.py',), ('tokenizers',))}", _write)
    return SimulatedFiles(model=entry / "model", train=entry / "train.jsonl")


def _write(directory: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    model = directory / "model"
    model.mkdir()
    config = {"model_type": "simulated", "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "eos_token_id": 0}
    (model / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    words = [_EOS, *(f"w{i}" for i in range(1, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([_EOS])
    tokenizer.save(str(model / "tokenizer.json"))
    save_file({"simulated.weights": np.zeros(64, np.uint8)}, model / "model.safetensors")
    problems = (json.dumps({"id": f"simulated-{i:05d}", "prompt": f"w{1 + i % (VOCABULARY - 1)} w{1 + i // 8}"}) for i in range(PROBLEMS))
    (directory / "train.jsonl").write_text("".join(f"{problem}\n" for problem in problems))
