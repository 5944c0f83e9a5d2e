"""Small files that a run needs: a model directory with a tokenizer of whole words but without weights, and datasets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(93)))
"""97 words, as many as the tiny models have."""
EOS = 2


def tokenizer_directory(directory: Path, *, context: int = 64, eos: int | list[int] | None = EOS) -> Path:
    """tokenizer.json and config.json, enough for a dispatcher and a reward actor."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = directory / "config.json"
    known = json.loads(config.read_text()) if config.is_file() else {"max_position_embeddings": context}
    config.write_text(json.dumps({**known, "eos_token_id": eos}))
    return directory


def dataset(path: Path, problems: Iterable[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path


def problems(count: int, prefix: str = "p", words: int = 2) -> list[dict[str, Any]]:
    """`count` problems whose prompts hold `words` words each, all different."""
    return [{"id": f"{prefix}{i}", "prompt": " ".join(f"w{(i + j) % 93}" for j in range(words)), "answer": i} for i in range(count)]
