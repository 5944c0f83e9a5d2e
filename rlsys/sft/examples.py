"""From rows to samples: what is only read, what is learned, and what does not fit.

A prompt and its completion become prompt ids, completion ids and an end-of-text token. A chat is rendered by the model's own template, as
it is when the policy is sampled from: the text up to and with the generation prompt (a prefilled `<think>` too) is only read, what the
template then adds for the assistant's turn is learned, up to its first end-of-text token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from actors.text import context_length, stop_token_ids
from learner.packing import TrainSample
from protocol.errors import DataError
from rlsys.sft.config import SftConfig, SftData
from rlsys.sft.rows import read_rows

Segment = tuple[str, bool]
"""A piece of text, and whether it is learned."""


@dataclass(slots=True)
class Examples:
    """The samples of one file, and what was left out."""

    samples: list[TrainSample] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    """Where they stand."""

    @property
    def num_learned(self) -> int:
        """Tokens that receive gradient."""
        return sum(sample.num_trainable for sample in self.samples)


class Encoder:
    """Rows to samples for one model."""

    def __init__(self, model_dir: Path, data: SftData, max_context: int | None) -> None:
        """Raises DataError when the directory has no tokenizer, or no chat template where one is needed."""
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"{model_dir}: no tokenizer.json; expected a Hugging Face directory with a fast tokenizer")
        self._model_dir, self._data = model_dir, data
        self._tokenizer: Any = Tokenizer.from_file(str(path))
        self._stops = stop_token_ids(model_dir)
        self._templates: Any = None
        limit = context_length(model_dir)
        if max_context is not None and max_context > limit:
            raise DataError(f"model.max_context is {max_context}, but the model in {model_dir} was built for {limit} tokens")
        self._longest = max_context or limit

    def read(self, path: Path, split: str) -> Examples:
        """All samples of a file. Raises DataError that names the line of a row that cannot be learned from."""
        found = Examples()
        number = 0
        for number, (where, row) in enumerate(read_rows(path, split), 1):
            if self._data.limit is not None and number > self._data.limit:
                break
            sample = self._sample(where, row, number)
            length = len(sample.prompt_ids) + len(sample.token_ids)
            if length <= self._longest:
                found.samples.append(sample)
            elif self._data.too_long == "skip":
                found.too_long.append(where)
            else:
                raise DataError(
                    f"{where}: {length} tokens, more than the {self._longest} of the context; shorten it, or data.too_long: skip"
                )
        if not found.samples:
            reason = f"all {number} are longer than {self._longest} tokens" if found.too_long else "it is empty"
            raise DataError(f"{path}: no example to learn from: {reason}")
        return found

    def _sample(self, where: str, row: Mapping[str, Any], number: int) -> TrainSample:
        segments = self._segments(where, row)
        ids, learned = [], []
        for text, learn in segments:
            piece = self._tokenizer.encode(text, add_special_tokens=False).ids
            last = next((i for i, token in enumerate(piece) if token in self._stops), len(piece) - 1)
            ids += piece
            learned += [learn and i <= last for i in range(len(piece))]
        if not learned or not learned[-1] or ids[-1] not in self._stops:
            closes = any(token in self._stops and learn for token, learn in zip(ids[-8:], learned[-8:], strict=True))
            if not closes:  # else the template ends the turn itself, maybe with a newline after
                ids.append(self._stops[0])
                learned.append(True)
        first = learned.index(True)
        if first == 0:
            raise DataError(f"{where}: the prompt is empty, so nothing predicts the first token")
        return as_sample(ids[:first], ids[first:], learned[first:], number)

    def _segments(self, where: str, row: Mapping[str, Any]) -> list[Segment]:
        data = self._data
        if data.messages_field in row:
            return self._chat(where, _messages(where, data.messages_field, row[data.messages_field]))
        for name in (data.prompt_field, data.completion_field):
            if name not in row:
                raise DataError(f"{where}: no field {name!r} (nor {data.messages_field!r}); it has: {', '.join(map(str, row)) or 'none'}")
        prompt, completion = row[data.prompt_field], row[data.completion_field]
        if isinstance(prompt, list) or isinstance(completion, list) or data.chat:
            before = _messages(where, data.prompt_field, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
            after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            return self._chat(where, before + _messages(where, data.completion_field, after))
        for name, text in ((data.prompt_field, prompt), (data.completion_field, completion)):
            if not isinstance(text, str) or not text:
                raise DataError(f"{where}: field {name!r} is {text!r}, expected a text that is not empty")
        return [(data.prompt_template.replace("{prompt}", prompt), False), (completion, True)]

    def _chat(self, where: str, messages: list[dict[str, str]]) -> list[Segment]:
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise DataError(f"{where}: the chat has no turn of the assistant, so there is nothing to learn")
        segments: list[Segment] = []
        done = ""
        for i in turns if self._data.turns == "all" else turns[-1:]:
            if not messages[i]["content"]:
                raise DataError(f"{where}: turn {i + 1} of the assistant is empty")
            before, through = self._render(messages[:i], True), self._render(messages[: i + 1], False)
            if not before.startswith(done):
                raise DataError(
                    f"{where}: the chat template changes earlier turns as the chat grows (some drop the thinking), so they cannot be learned "
                    "together; set data.turns: last"
                )
            if not through.startswith(before):
                raise DataError(
                    f"{where}: the chat template opens the assistant's turn with {_end(before)!r}, but turn {i + 1} goes on as "
                    f"{through[_common(before, through) :][:40]!r}; write what the template opens (such as <think>) into the content, or give "
                    "prompt and completion as texts with data.chat: false"
                )
            segments += [(before[len(done) :], False), (through[len(before) :], True)]
            done = through
        return segments

    def _render(self, messages: Sequence[Mapping[str, str]], generation: bool) -> str:
        if self._templates is None:
            from transformers import AutoTokenizer

            self._templates = AutoTokenizer.from_pretrained(self._model_dir, local_files_only=True)
            if not self._templates.chat_template:
                raise DataError(f"{self._model_dir}: the data are chats, but the tokenizer has no chat template")
        text: str = self._templates.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
        return text


def as_sample(prompt_ids: Sequence[int], token_ids: Sequence[int], learned: Sequence[bool], number: int) -> TrainSample:
    """A sample whose likelihood is learned: advantage 1, as if the policy had written it."""
    return TrainSample(
        group_id=number,
        index=0,
        prompt_ids=np.array(prompt_ids, np.int32),
        token_ids=np.array(token_ids, np.int32),
        behaviour_logprobs=np.zeros(len(token_ids), np.float32),
        loss_mask=np.array(learned, np.bool_),
        advantage=1.0,
    )


def batches(count: int, per_step: int, steps: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Places of the samples of each step: epoch after epoch in a new order, so the last batch of an epoch runs into the next."""
    per_step = min(per_step, count)
    rng = np.random.default_rng(seed)
    left = np.zeros(0, np.int64)
    for _ in range(steps):
        if len(left) < per_step:
            left = np.concatenate([left, rng.permutation(count)])
        yield left[:per_step]
        left = left[per_step:]


def num_steps(config: SftConfig, count: int) -> int:
    """Optimizer steps for `count` examples; at least 1."""
    return config.steps or max(1, round(config.epochs * count / min(config.samples_per_step, count)))


def _messages(where: str, name: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: field {name!r} is {str(value)[:60]!r}, expected a list of messages that is not empty")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise DataError(f"{where}: field {name!r} holds {str(message)[:60]!r}, expected a role and a content that are texts")
    return value


def _end(text: str) -> str:
    return text[-30:]


def _common(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
