"""Text to token ids and back, and what a model directory must hold for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from actors.text import Text, context_length, stop_token_ids
from protocol.errors import DataError
from tests.directories import WORDS, tokenizer_directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tokenizer_directory(tmp_path / "model")


def test_prompts_stand_inside_the_template(directory: Path) -> None:
    [ids, other] = Text(directory).encode_prompts(["w1 w2", "{prompt} w3"], "<bos> {prompt} w9", chat=False)
    assert [WORDS[i] for i in ids] == ["<bos>", "w1", "w2", "w9"]
    assert [WORDS[i] for i in other] == ["<bos>", "<unk>", "w3", "w9"], "a prompt is text: braces in it are not filled in"
    assert ids.dtype == np.int32


def test_completions_lose_their_special_tokens(directory: Path) -> None:
    ids = np.array([WORDS.index(w) for w in ("w5", "<eos>", "w6", "<pad>")], np.int32)
    text = Text(directory)
    assert text.decode(ids).split() == ["w5", "w6"]
    assert text.decode(np.zeros(0, np.int32)) == ""


def test_a_chat_template_is_the_models_own(directory: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), eos_token="<eos>")
    tokenizer.save_pretrained(directory)
    with pytest.raises(DataError, match=r"data\.chat is set, but the tokenizer has no chat template"):
        Text(directory).encode_prompts(["w1"], "{prompt}", chat=True)
    tokenizer.chat_template = "{% for m in messages %}<bos> {{ m.content }}{% endfor %}{% if add_generation_prompt %} w7{% endif %}"
    tokenizer.save_pretrained(directory)
    [ids] = Text(directory).encode_prompts(["w1 w2"], "ignored {prompt}", chat=True)
    assert [WORDS[i] for i in ids] == ["<bos>", "w1", "w2", "w7"]


@pytest.mark.parametrize(("eos", "expected"), [(2, [2]), ([2, 5], [2, 5])])
def test_stop_tokens_are_the_models_own(directory: Path, eos: object, expected: list[int]) -> None:
    tokenizer_directory(directory, eos=eos)  # type: ignore[arg-type]
    assert stop_token_ids(directory) == expected
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    assert stop_token_ids(directory) == [7], "generation_config.json comes first"
    (directory / "generation_config.json").write_text("{}")
    assert stop_token_ids(directory) == expected


def test_what_is_missing_in_a_model_directory_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"empty: no tokenizer\.json"):
        Text(empty)
    with pytest.raises(DataError, match=r"empty: no readable config\.json"):
        context_length(empty)
    with pytest.raises(DataError, match=r"names an eos_token_id; set sampling\.stop_token_ids"):
        stop_token_ids(tokenizer_directory(tmp_path / "endless", eos=None))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", r"config\.json: not readable JSON"),
        ("[]", r"config\.json: a JSON list, expected an object"),
        ("{}", r"config\.json: max_position_embeddings is None"),
        ('{"max_position_embeddings": "long"}', r"config\.json: max_position_embeddings is 'long'"),
    ],
)
def test_a_broken_configuration_is_one_sentence(directory: Path, content: str, sentence: str) -> None:
    (directory / "config.json").write_text(content)
    with pytest.raises(DataError, match=sentence):
        context_length(directory)


def test_a_broken_tokenizer_and_broken_stop_tokens_are_one_sentence(directory: Path) -> None:
    tokenizer_directory(directory, eos="</s>")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"config\.json: eos_token_id is '</s>', expected an integer"):
        stop_token_ids(directory)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        Text(directory)
