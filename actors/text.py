"""Text to token ids and back, by the `tokenizers` library alone, so that dispatcher and reward actors need no model library."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from protocol.errors import DataError


class Text:
    """The tokenizer of a model directory."""

    def __init__(self, model_dir: Path) -> None:
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"{model_dir}: no tokenizer.json; expected a Hugging Face directory with a fast tokenizer")
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions for files that it cannot read
            raise DataError(f"{path}: not a tokenizer ({error})") from None
        self._model_dir = model_dir
        self._templates: Any = None

    def encode_prompts(self, prompts: Sequence[str], template: str, chat: bool) -> list[npt.NDArray[np.int32]]:
        """Prompt ids [prompt tokens] of each prompt, inside the template or, with `chat`, in the model's own chat template.

        A chat's prompt ends where the assistant's turn begins, with all that the template puts there (such as `<think>` and a newline). That
        text belongs to the prompt: the completion, and so the reward, starts after it.
        """
        texts = self._chat(prompts) if chat else [template.replace("{prompt}", prompt) for prompt in prompts]
        return [np.array(encoding.ids, np.int32) for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, token_ids: npt.NDArray[np.int32]) -> str:
        """The text of a completion, without special tokens."""
        text: str = self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)
        return text

    def _chat(self, prompts: Sequence[str]) -> list[str]:
        from jinja2 import TemplateError

        if self._templates is None:
            from transformers import PreTrainedTokenizerFast  # takes most of a second; unlike AutoTokenizer it brings no torch

            self._templates = PreTrainedTokenizerFast.from_pretrained(self._model_dir, local_files_only=True)  # only renders
        if not self._templates.chat_template:
            raise DataError(f"{self._model_dir}: data.chat is set, but the tokenizer has no chat template")
        try:
            return [
                self._templates.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
                for prompt in prompts
            ]
        except TemplateError as error:  # not in the language, or it refuses a chat of one turn of the user
            raise DataError(f"{self._model_dir}: the chat template cannot render a prompt ({error})") from None


def stop_token_ids(model_dir: Path) -> list[int]:
    """The model's end-of-sequence ids: of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        if path.is_file():
            found = read_object(path).get("eos_token_id")
            ids = [found] if isinstance(found, int) else found
            if isinstance(ids, list) and all(isinstance(i, int) for i in ids):
                return [int(i) for i in ids]
            if ids is not None:
                raise DataError(f"{path}: eos_token_id is {found!r}, expected an integer or a list of integers")
    raise DataError(f"{model_dir}: neither generation_config.json nor config.json names an eos_token_id; set sampling.stop_token_ids")


def context_length(model_dir: Path) -> int:
    """Most tokens that the model was built for: `max_position_embeddings` of config.json."""
    path = model_dir / "config.json"
    if not os.access(path, os.R_OK):
        raise DataError(f"{model_dir}: no readable config.json; expected a Hugging Face model directory")
    limit = read_object(path).get("max_position_embeddings")
    if not isinstance(limit, int) or limit < 1:
        raise DataError(f"{path}: max_position_embeddings is {limit!r}, expected the most tokens that the model was built for")
    return limit


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises DataError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: a JSON {type(content).__name__}, expected an object")
    return content
