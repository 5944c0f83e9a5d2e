"""The quickstart's tokenizer: byte-level BPE learned from the corpus, and the prompt format as a plain template.

Pure bytes would double the length of every sample, which a model this small does not learn in two minutes.
Only `tokenizers` is imported, so that whoever writes prompts needs no model library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, BOS, SEP, EOS = SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|sep|>", "<|eos|>")
PAD_ID, BOS_ID, SEP_ID, EOS_ID = range(4)
PROMPT_TEMPLATE = f"{BOS}{{prompt}}{SEP}"
"""Encode `PROMPT_TEMPLATE.format(prompt=...)` with add_special_tokens=False: the tokenizer reads the special tokens from the text.

The policy's completion follows and ends with EOS.
"""

MAX_VOCABULARY = 1024
"""Not reached: the corpus has about 800 different pieces."""
_PIECES = r"\d|\n| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s"
"""Merges stay within a piece: one digit, a newline, a word or a run of signs with the blank before it."""


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn the merges from texts. Every byte has a token, so that any text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> tuple[int, ...]:
    """Token ids of the prompt as the policy reads it: BOS, the text, SEP."""
    return tuple(tokenizer.encode(PROMPT_TEMPLATE.format(prompt=prompt), add_special_tokens=False).ids)


def encode_completion(tokenizer: Tokenizer, program: str) -> tuple[int, ...]:
    """Token ids of a program as the policy shall write it, with EOS."""
    return (*tokenizer.encode(program, add_special_tokens=False).ids, EOS_ID)


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_context: int) -> None:
    """Write what `transformers.AutoTokenizer` reads: tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "sep_token": SEP,
        "eos_token": EOS,
        "model_max_length": max_context,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
