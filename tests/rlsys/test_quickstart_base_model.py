"""The quickstart's base model: loadable, trained, deterministic, found again without torch, rebuilt when broken."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from protocol.errors import DataError, DeadlineExceeded, RlsysError
from rlsys.quickstart import base_model
from rlsys.quickstart.base_model import BaseModel, Recipe, ensure_base_model
from rlsys.quickstart.cache import ensure_entry, fingerprint, is_whole
from rlsys.quickstart.datasets import ensure_datasets
from rlsys.quickstart.tasks import make_problem, noisy_program
from rlsys.quickstart.tokenizer import (
    BOS_ID,
    EOS,
    EOS_ID,
    PAD_ID,
    PROMPT_TEMPLATE,
    SEP_ID,
    encode_completion,
    encode_prompt,
    train_tokenizer,
)
from rlsys.quickstart.warm_start import build
from rlsys.sft.config import SftData
from rlsys.sft.examples import Encoder

SMALL = Recipe(steps=40, batch_size=8)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLSYS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quickstart"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[BaseModel, list[str]]]:
    """A base model of a few steps, made as a user's first call makes it, and the lines that it reported."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSYS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield ensure_base_model(lines.append, SMALL), lines


def samples(count: int, seed: int = 9) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [(problem.prompt, noisy_program(rng, problem)) for problem in (make_problem(rng, "train") for _ in range(count))]


def loss_on_new_samples(model: Any, tokenizer: Tokenizer) -> float:
    """Mean of -log-prob of a program's token, one program at a time."""
    total, count = 0.0, 0
    for prompt, program in samples(64):
        before, written = encode_prompt(tokenizer, prompt), encode_completion(tokenizer, program)
        with torch.no_grad():
            logprobs = model.eval()(torch.tensor([before + written])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        total -= logprobs.gather(-1, torch.tensor(written)[:, None]).sum().item()
        count += len(written)
    return total / count


def test_the_directory_loads_and_the_warm_start_has_taught_something(small: tuple[BaseModel, list[str]]) -> None:
    made, lines = small
    assert not made.cached
    assert lines[0].startswith("making")
    assert lines[-1].startswith("warm start: step 40 of 40, loss ")
    model = AutoModelForCausalLM.from_pretrained(made.path)
    tokenizer = Tokenizer.from_file(str(made.path / "tokenizer.json"))
    assert model.config.vocab_size == tokenizer.get_vocab_size()
    assert model.num_parameters() < 1_000_000
    torch.manual_seed(0)
    untrained = type(model)(model.config)
    assert loss_on_new_samples(untrained, tokenizer) > 6
    assert loss_on_new_samples(model, tokenizer) < 2
    settings = model.generation_config
    assert (settings.eos_token_id, settings.pad_token_id, settings.do_sample) == (EOS_ID, PAD_ID, True)


def test_both_tokenizer_libraries_read_the_prompt_template_alike(small: tuple[BaseModel, list[str]]) -> None:
    path = small[0].path
    fast, plain = AutoTokenizer.from_pretrained(path), Tokenizer.from_file(str(path / "tokenizer.json"))
    assert (fast.pad_token_id, fast.bos_token_id, fast.sep_token_id, fast.eos_token_id) == (PAD_ID, BOS_ID, SEP_ID, EOS_ID)
    for prompt, program in samples(50):
        ids = list(encode_prompt(plain, prompt))
        assert fast(PROMPT_TEMPLATE.format(prompt=prompt), add_special_tokens=False).input_ids == ids
        assert (ids[0], ids[-1]) == (BOS_ID, SEP_ID)
        assert not {PAD_ID, BOS_ID, SEP_ID, EOS_ID} & set(ids[1:-1])
        written = encode_completion(plain, program)
        assert written[-1] == EOS_ID
        assert len(written) <= 80, "what the quickstart lets the policy write"
        assert plain.decode(written, skip_special_tokens=True) == fast.decode(written, skip_special_tokens=True) == program


def test_a_second_call_finds_it_again_and_imports_no_torch(small: tuple[BaseModel, list[str]]) -> None:
    code = f"""if True:
        import sys
        from rlsys.quickstart.base_model import Recipe, ensure_base_model
        from rlsys.quickstart.datasets import ensure_datasets
        found = ensure_base_model(print, {SMALL!r})
        assert found.cached, found
        ensure_datasets(20, 5)
        assert not {{"torch", "transformers", "numpy"}} & set(sys.modules), "heavy imports"
        print(found.path)
    """
    environment = {**os.environ, "RLSYS_CACHE": str(small[0].path.parent.parent)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(small[0].path)), done.stderr


def test_the_same_recipe_gives_the_same_bytes(small: tuple[BaseModel, list[str]], tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    build(tmp_path, SMALL, lambda line: None)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (small[0].path / name).read_bytes(), name
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_any_text_survives_the_tokenizer() -> None:
    tokenizer = train_tokenizer(text for pair in samples(200) for text in pair)
    for text in ("", "  two  blanks\n\n\ttab", "Grüße, 世界 🙂", "12345 -7", "def f(x_1): return x_1 ** 2  # \\n"):
        assert tokenizer.decode(encode_completion(tokenizer, text)[:-1]) == text
    assert len(tokenizer.encode("1234", add_special_tokens=False).ids) == 4, "digits are single tokens"
    assert tokenizer.token_to_id(EOS) == EOS_ID


def test_the_warm_start_reads_what_sampling_will(small: tuple[BaseModel, list[str]], tmp_path: Path) -> None:
    """Its samples are the ids that the policy's prompts and programs have."""
    tokenizer = Tokenizer.from_file(str(small[0].path / "tokenizer.json"))
    rows = samples(50)
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": program}) + "\n" for prompt, program in rows))
    data = SftData(train=path, prompt_template=PROMPT_TEMPLATE)
    for (prompt, program), sample in zip(rows, Encoder(small[0].path, data, None).read(path, "train").samples, strict=True):
        assert tuple(sample.prompt_ids) == encode_prompt(tokenizer, prompt)
        assert tuple(sample.token_ids) == encode_completion(tokenizer, program)
        assert sample.loss_mask.all()


def test_recipes_have_entries_of_their_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Recipe] = []

    def train(directory: Path, recipe: Recipe, report: object) -> None:
        trained.append(recipe)
        (directory / "model").write_text(repr(recipe))

    monkeypatch.setattr(base_model, "_train", train)
    recipes = [Recipe(), Recipe(seed=1), Recipe(steps=3)]
    paths = {ensure_base_model(recipe=recipe).path for recipe in recipes}
    assert trained == recipes
    assert len(paths) == 3
    assert all(ensure_base_model(recipe=recipe).cached for recipe in recipes)
    assert trained == recipes


def test_a_failed_warm_start_says_why_and_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('this torch is broken')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RlsysError, match=r"status 1, expected 0: [\s\S]*this torch is broken"):
        ensure_base_model(recipe=SMALL)
    assert list(cache.iterdir()) == []


def test_a_warm_start_past_its_deadline_is_ended(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "_DEADLINE_S", 0.01)
    with pytest.raises(DeadlineExceeded, match="had not ended after"):
        ensure_base_model(recipe=Recipe(steps=1_000_000))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", ["edited", "missing", "no listing", "torn listing"])
def test_a_broken_entry_is_made_again(cache: Path, damage: str) -> None:
    built: list[Path] = []

    def make(directory: Path) -> None:
        built.append(directory)
        (directory / "part").mkdir()
        (directory / "part" / "weights").write_bytes(b"1234")

    path, cached = ensure_entry("thing", make)
    assert (path, cached) == (cache / "thing", False)
    assert ensure_entry("thing", make) == (path, True)
    if damage == "edited":
        (path / "part" / "weights").write_bytes(b"1235")
    elif damage == "missing":
        (path / "part" / "weights").unlink()
    elif damage == "no listing":
        (path / "entry.json").unlink()
    else:
        (path / "entry.json").write_text('{"files": ')
    assert not is_whole(path)
    assert ensure_entry("thing", make) == (path, False)
    assert ensure_entry("thing", make) == (path, True)
    assert len(built) == 2
    assert [entry.name for entry in cache.iterdir()] == ["thing"], "nothing is left aside"


def test_of_two_builders_at_once_the_first_wins(cache: Path) -> None:
    def quick(directory: Path) -> None:
        (directory / "who").write_text("first")

    def slow(directory: Path) -> None:
        ensure_entry("thing", quick)
        (directory / "who").write_text("second")

    path, cached = ensure_entry("thing", slow)
    assert (path / "who").read_text() == "first"
    assert not cached
    assert [entry.name for entry in cache.iterdir()] == ["thing"]


def test_a_cache_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RLSYS_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot write .* RLSYS_CACHE"):
        ensure_datasets(4, 2)


def test_datasets_are_written_once(cache: Path) -> None:
    first = ensure_datasets(40, 10)
    assert (first.cached, first.train.parent.parent) == (False, cache)
    assert [len(path.read_text().splitlines()) for path in (first.train, first.held_out)] == [40, 10]
    assert ensure_datasets(40, 10).cached
    assert ensure_datasets(40, 10, seed=1).train != first.train


def test_the_fingerprint_follows_sources_versions_and_settings() -> None:
    prints = [
        fingerprint(["rlsys/quickstart/tasks.py"], ["torch"], 1),
        fingerprint(["rlsys/quickstart/tasks.py"], ["torch"], 2),
        fingerprint(["rlsys/quickstart/tokenizer.py"], ["torch"], 1),
        fingerprint(["rlsys/quickstart/tasks.py"], ["tokenizers"], 1),
    ]
    assert len(set(prints)) == 4
    assert fingerprint(["rlsys/quickstart/tasks.py"], ["torch"], 1) == prints[0]
