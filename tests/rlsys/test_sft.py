"""`rlsys sft`: what is learned of each row, every layout of files, what is refused, and that a model learns, resumes and loads."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from learner.parallel import SingleProcess
from learner.step import Step
from protocol.errors import ConfigError, DataError
from rlsys.cli import main
from rlsys.sft.config import dump_sft_config, load_sft_config, parse_sft_config
from rlsys.sft.examples import Encoder, batches
from rlsys.sft.rows import read_rows
from rlsys.sft.training import fine_tune, read_material
from tests.learner.conftest import save_model
from tests.learner.reference import Reference

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 320
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] if loop.last or '</think>' not in m['content'] "
    "else m['content'].split('</think>')[1] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the marks of a chat."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random model with a chat template that prefills nothing."""
    directory = save_model(
        tmp_path_factory.mktemp("model"),
        scale=1.0,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        eos_token_id=len(tokenizer) - 1,
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
    return directory


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def encoder(model: Path, **data: Any) -> Encoder:
    config = parse_sft_config({"model": {"path": str(model)}, "data": {"train": "unused", **data}}, "test")
    return Encoder(model, config.data, None)


def texts(tokenizer: Any, sample: Any) -> tuple[str, str]:
    """What is only read before the first learned token, and what is learned."""
    return tokenizer.decode(sample.prompt_ids), tokenizer.decode(sample.token_ids[sample.loss_mask])


def test_a_completion_is_learned_with_its_end_and_the_prompt_is_not(model: Path, tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "2+2=", "completion": "4"}])
    (sample,) = encoder(model, prompt_template="Q: {prompt} A:").read(path, "train").samples
    assert texts(tokenizer, sample) == ("Q: 2+2= A:", "4<|im_end|>") and sample.loss_mask.all()
    (sample,) = encoder(model, chat=True).read(path, "train").samples
    assert texts(tokenizer, sample) == ("<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n", "4<|im_end|>")


def test_turns_of_a_chat(model: Path, tmp_path: Path, tokenizer: Any) -> None:
    chat = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": r, "content": c} for r, c in chat]}])
    (sample,) = encoder(model).read(path, "train").samples
    assert texts(tokenizer, sample) == ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "b<|im_end|>d<|im_end|>")
    assert tokenizer.decode(sample.token_ids) == "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"
    (sample,) = encoder(model, turns="last").read(path, "train").samples
    assert texts(tokenizer, sample)[1] == "d<|im_end|>"


def test_a_template_that_prefills_thinking(model: Path, tmp_path: Path, tokenizer: Any) -> None:
    config = json.loads((model / "tokenizer_config.json").read_text())
    thinking = tmp_path / "thinking"
    thinking.mkdir()
    for name in ("tokenizer.json", "config.json"):
        (thinking / name).write_bytes((model / name).read_bytes())
    (thinking / "tokenizer_config.json").write_text(json.dumps(config))
    (thinking / "chat_template.jinja").write_text(THINKING)
    good = write(tmp_path / "good.jsonl", [{"prompt": "a", "completion": "<think>\nhm</think>b"}])
    (sample,) = encoder(thinking, chat=True).read(good, "train").samples
    assert texts(tokenizer, sample) == ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n", "hm</think>b<|im_end|>")
    bare = write(tmp_path / "bare.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match=r"bare.jsonl, line 1: the chat template opens the assistant's turn with .*<think>.*goes on as 'b"):
        encoder(thinking, chat=True).read(bare, "train")
    turns = [("user", "a"), ("assistant", "<think>\nhm</think>b"), ("user", "c"), ("assistant", "<think>\nso</think>d")]
    many = write(tmp_path / "many.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    with pytest.raises(DataError, match=r"changes earlier turns .* set data.turns: last"):
        encoder(thinking).read(many, "train")
    (sample,) = encoder(thinking, turns="last").read(many, "train").samples
    assert texts(tokenizer, sample)[1] == "so</think>d<|im_end|>"


def test_every_layout_of_files_holds_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"p{i}", "completion": "c\u2028c"} for i in range(5)]
    lines = write(tmp_path / "a.jsonl", rows)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(lines.read_bytes())
    (tmp_path / "a.json").write_text(json.dumps(rows))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    saved = tmp_path / "saved" / "train"
    saved.mkdir(parents=True)
    (saved.parent / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    with pyarrow.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    parts = tmp_path / "parts"
    parts.mkdir()
    write(parts / "0.jsonl", rows[:2])
    pyarrow.parquet.write_table(table.slice(2), parts / "1.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "saved", "saved/train", "parts"):
        assert [row for _, row in read_rows(tmp_path / name, "train")] == rows, name
    with pytest.raises(DataError, match=r"no split 'test'; it has: train"):
        list(read_rows(tmp_path / "saved", "test"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"line 2: no field 'completion' \(nor 'messages'\); it has: prompt"),
        ({"prompt": "a", "completion": ""}, r"line 2: field 'completion' is '', expected a text that is not empty"),
        ({"prompt": "a", "completion": 4}, r"line 2: field 'completion' is 4"),
        ({"messages": []}, r"line 2: field 'messages' is '\[\]', expected a list of messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, r"line 2: the chat has no turn of the assistant"),
        ({"messages": [{"role": "assistant"}]}, r"line 2: field 'messages' holds .*expected a role and a content"),
        (["a"], r"line 2: a JSON list, expected an object"),
    ],
)
def test_a_row_that_cannot_be_learned_is_named(model: Path, tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, row])
    with pytest.raises(DataError, match=message):
        encoder(model).read(path, "train")


def test_what_is_longer_than_the_context_is_counted_or_refused(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b" * n} for n in (3, CONTEXT, 5)])
    found = encoder(model).read(path, "train")
    assert len(found.samples) == 2 and found.too_long == [f"{path}, line 2"]
    with pytest.raises(DataError, match=rf"line 2: {CONTEXT + 2} tokens, more than the {CONTEXT}"):
        encoder(model, too_long="refuse").read(path, "train")


def test_every_example_comes_once_in_each_epoch() -> None:
    places = list(batches(10, 4, 10, seed=1))
    assert [len(p) for p in places] == [4] * 10
    flat = np.concatenate(places)
    for epoch in range(4):
        assert sorted(flat[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert [p.tolist() for p in batches(10, 4, 10, seed=1)] == [p.tolist() for p in places]


def test_the_step_minimises_the_mean_over_completion_tokens(model: Path, tmp_path: Path) -> None:
    """One step of the learner against a slow one: loss, norm of the gradient, and the loss on held-out examples."""
    rows = [{"prompt": "ab" * (i + 1), "completion": "xyz"[: i % 3 + 1]} for i in range(7)]
    samples = encoder(model).read(write(tmp_path / "a.jsonl", rows), "train").samples
    config = parse_sft_config(
        {"model": {"path": str(model)}, "data": {"train": "unused"}, "learner": {"dtype": "float64", "device": "cpu"}}, "test"
    )
    step = Step(config.learner, model, SingleProcess())
    reference = Reference(model, lr=4e-5, eps=1e-8, formula=lambda policy, *_: -policy)
    assert step.negative_log_likelihood(samples) == pytest.approx(reference.loss(samples).item(), rel=1e-7)
    values = step.train(samples, 0, 3).values
    reference.train(samples)
    assert (values["loss"], values["grad_norm"]) == pytest.approx((reference.losses[0], reference.norms[0]), rel=1e-7)
    assert values["lr"] == 4e-5 and step.train(samples, 2, 3).values["lr"] == pytest.approx(4e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learner": {"advantage": "grpo"}}, r"learner.advantage belongs to reinforcement"),
        ({"learner": {"optimizer": {"rate": 1}}}, r"unknown key learner.optimizer.rate"),
        ({"data": {"train": "a", "prompt_template": "x"}}, r"data: prompt_template is 'x': it must contain \{prompt\}"),
        ({"epoch": 3}, r"unknown key epoch; did you mean epochs\?"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused(model: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_sft_config({"model": {"path": str(model)}, "data": {"train": "a"}, **changes}, "test")


def test_the_example_configuration_learns_resumes_and_loads(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rlsys sft configs/sft-tiny.yaml`, from a random model of bytes in place of the quickstart's, in one go and in two."""
    settings = {"model.path": model, "epochs": 1, "eval_every": 3, "data.prompt_template": "'{prompt}'", "learner.optimizer.lr": 1e-2}
    settings |= {"data.limit": 24, "samples_per_step": 4, "checkpoint_every": 2, "learner.dtype": "float32", "model.max_context": CONTEXT}
    command = ["sft", str(ROOT / "configs" / "sft-tiny.yaml"), *(part for k, v in settings.items() for part in ("--set", f"{k}={v}"))]
    assert load_sft_config(ROOT / "configs" / "sft-tiny.yaml").epochs == 4
    assert main([*command, "--check", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["samples"] + about["too_long"] == 24 and about["steps"] >= 4 and not list(tmp_path.iterdir())

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*command, "--out", str(whole), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    held_out = [r["eval/loss"] for r in records if "eval/loss" in r]
    assert held_out[-1] < held_out[0] - 1 and figures["eval_loss"] == held_out[-1]
    assert [r["step"] for r in records if "train/loss" in r] == list(range(1, figures["steps"] + 1))
    assert list((whole / "tensorboard").iterdir())

    def stop(step: Any, n: int, **more: Any) -> Any:
        taken = snapshot(step, n, **more)
        return taken if n < 4 else (_ for _ in ()).throw(KeyboardInterrupt)

    from learner import checkpoint

    snapshot = checkpoint.snapshot
    monkeypatch.setattr(checkpoint, "snapshot", stop)
    assert main([*command, "--out", str(parts)]) == 130
    monkeypatch.undo()
    assert main([*command, "--out", str(parts)]) == 2 and "is not empty" in capsys.readouterr().err
    assert main([*command, "--out", str(parts), "--resume"]) == 0
    one, other = (AutoModelForCausalLM.from_pretrained(d / "final_model").state_dict() for d in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    config = load_sft_config(parts / "config.yaml")
    assert parse_sft_config(__import__("yaml").safe_load(dump_sft_config(config)), "again") == config


def test_checkpoints_stay_as_the_configuration_says(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}] * 7)
    content = {
        "model": {"path": str(model)}, "data": {"train": str(data)}, "samples_per_step": 1, "checkpoint_every": 2,
        "learner": {"device": "cpu", "dtype": "float32", "checkpoints": {"keep_last": 1, "keep_every": 3}},
    }  # fmt: skip
    config = parse_sft_config(content, "test")
    assert fine_tune(config, read_material(config), tmp_path / "out", SingleProcess(), lambda *_: None) == 7
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == ["00000003", "00000006"]
    for changes, message in (
        ({"checkpoint_every": 0}, "learner.checkpoints says which stay, but checkpoint_every is 0"),
        ({"learner": {"commit_every": 2}}, "learner.commit_every is of runs"),
        ({"learner": {"sharding": "full"}}, "learner.sharding is full but ranks is 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_sft_config({**content, **changes}, "test")


def test_it_learns_a_cipher_with_muon_and_does_so_the_same_way_twice(model: Path, tmp_path: Path) -> None:
    letters = np.random.default_rng(3).integers(0, 9, 16 * 40)
    data = write(tmp_path / "a.jsonl", [{"prompt": "abcdefghi"[i], "completion": "jklmnopqr"[i]} for i in letters])
    config = parse_sft_config(
        {
            "model": {"path": str(model)},
            "data": {"train": str(data)},
            "samples_per_step": 16,
            "learner": {
                "device": "cpu",
                "dtype": "float32",
                "optimizer": {"name": "muon", "lr": 1e-2, "adamw_lr": 3e-2},
                "schedule": {"warmup_iterations": 5},
            },
        },
        "test",
    )
    seen: list[list[tuple[int, float]]] = [[], []]
    for own, losses in zip(("one", "two"), seen, strict=True):
        report = lambda step, values, losses=losses: losses.append((step, values["train/loss"]))  # noqa: E731
        assert fine_tune(config, read_material(config), tmp_path / own, SingleProcess(), report) == 40
    assert [step for step, _ in seen[0]] == list(range(1, 41))
    assert seen[0][0][1] > 1.5 and max(loss for _, loss in seen[0][-5:]) < 0.3
    assert seen[0] == seen[1]
    one, other = (tmp_path / own / "final_model" / "model.safetensors" for own in ("one", "two"))
    assert one.read_bytes() == other.read_bytes()


def test_two_ranks_learn_the_same(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "ab" * (i + 1), "completion": "xyz"[: i % 3 + 1]} for i in range(12)]
    data = write(tmp_path / "a.jsonl", rows)
    config = tmp_path / "sft.yaml"
    config.write_text(
        json.dumps(
            {
                "model": {"path": str(model)},
                "data": {"train": str(data), "eval": str(data)},
                "samples_per_step": 4,
                "learner": {"device": "cpu", "dtype": "float64", "optimizer": {"lr": 1e-3}},
            }
        )
    )
    losses = []
    for ranks in (1, 2):
        out = tmp_path / f"ranks-{ranks}"
        command = [sys.executable, "-P", "-m", "rlsys", "sft", str(config), "--set", f"learner.ranks={ranks}", "--out", str(out)]
        subprocess.run(
            command, check=True, timeout=1200
        )  # ranks meet under a name that counts the groups of a process: each run has its own
        losses.append([json.loads(line).get("eval/loss") for line in (out / "metrics.jsonl").read_text().splitlines()])
    found = [[value for value in one if value is not None] for one in losses]
    assert len(found[0]) == 2 and found[1] == pytest.approx(found[0], rel=1e-7)
