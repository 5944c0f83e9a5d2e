"""Text to token ids and back, and what a model directory must hold for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from actors.rewards import Sample
from actors.rewards.math_answer import MathAnswer
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


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
PREFILLED = "<|im_start|>assistant\n<think>\n"


@pytest.fixture
def chat_directory(tmp_path: Path) -> Path:
    """A tokenizer of bytes with the tags of ChatML: the turns' tags are special, those of thinking are not, as in Qwen3."""
    tokenizer = Tokenizer(BPE({symbol: i for i, symbol in enumerate(sorted(ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>", "</think>"])
    directory = tmp_path / "chat"
    directory.mkdir()
    save_chat_tokenizer(tokenizer, directory, CHATML)
    return directory


def save_chat_tokenizer(tokenizer: Tokenizer, directory: Path, template: str) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = template
    fast.save_pretrained(directory)


def test_a_prefilled_think_tag_is_the_end_of_the_prompt(chat_directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(chat_directory / "tokenizer.json"))
    prompts = ["What is 6 x 7?", "{prompt} <|im_end|>\n"]
    found = Text(chat_directory).encode_prompts(prompts, "ignored {prompt}", chat=True)
    for prompt, ids in zip(prompts, found, strict=True):
        written = f"<|im_start|>user\n{prompt}<|im_end|>\n{PREFILLED}"
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == written
        assert ids.tolist() == tokenizer.encode(written, add_special_tokens=False).ids and ids.dtype == np.int32
    start, think = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<think>")
    newline, assistant = tokenizer.encode("\n").ids, tokenizer.encode("assistant").ids
    assert found[0].tolist()[-len(assistant) - 4 :] == [start, *assistant, *newline, think, *newline]
    assert (found[0] == start).sum() == 2, "no second start of text or of the turn"


@pytest.mark.parametrize(("think", "score"), [("opened_by_prompt", 1.25), ("written", 0.5)])
def test_the_reward_reads_what_was_sampled_and_not_what_the_template_prefilled(chat_directory: Path, think: str, score: float) -> None:
    """The tag stands in the prompt: a reward that looks for a think block is told so by its own option."""
    tokenizer = Tokenizer.from_file(str(chat_directory / "tokenizer.json"))
    sampled = tokenizer.encode("6 x 7 = 42\n</think>\n\nIt is \\boxed{42}.<|im_end|>").ids
    text = Text(chat_directory).decode(np.array(sampled, np.int32))
    assert text == "6 x 7 = 42\n</think>\n\nIt is \\boxed{42}."
    reward = MathAnswer({"think": think, "think_bonus": 0.25, "think_penalty": 0.5})
    try:
        sample = Sample(problem={"id": "p", "prompt": "What is 6 x 7?", "answer": "42"}, completion=text, truncated=False)
        assert reward.score(sample).value == score
    finally:
        reward.close()


def test_a_chat_template_that_refuses_a_prompt_is_one_sentence(chat_directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(chat_directory / "tokenizer.json"))
    save_chat_tokenizer(tokenizer, chat_directory, "{{ raise_exception('a system turn comes first') }}")
    with pytest.raises(DataError, match=r"chat: the chat template cannot render a prompt .a system turn comes first"):
        Text(chat_directory).encode_prompts(["w1"], "{prompt}", chat=True)


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
