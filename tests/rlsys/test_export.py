"""`rlsys export`: what comes out loads with transformers and computes what the learner computed; every wrong input is one line."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from learner.checkpoint import snapshot, write
from learner.parallel import SingleProcess
from learner.settings import LearnerSettings
from learner.step import Step
from rlsys.cli import main
from tests.directories import tokenizer_directory
from tests.learner.conftest import save_model
from tests.learner.samples import random_samples


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_directory(save_model(tmp_path_factory.mktemp("model")))


def make_run(run: Path, model_dir: Path, **learner: Any) -> Step:
    """The files of a run after three iterations, with checkpoints of the second and third."""
    settings = {"dtype": "float32", "device": "cpu", "optimizer": {"lr": 1e-2}, "layout": "sorted", **learner}
    step = Step(LearnerSettings.model_validate(settings), model_dir, SingleProcess())
    for iteration in range(3):
        step.train(random_samples(9, iteration), iteration, 3)
        if iteration:
            write(snapshot(step, iteration + 1), run / "checkpoints")
    content = {"model": {"path": str(model_dir)}, "learner": learner, "weights": {"dtype": "float32"}}
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    return step


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[5, 9, 2, 7]])).logits
    return found


def export(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_run_is_exported_whole(tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = make_run(tmp_path, model_dir)
    code, out, _ = export(capsys, tmp_path, tmp_path / "out", "--json")
    figures = json.loads(out)
    assert code == 0 and figures["iteration"] == 3 and figures["dtype"] == "float32" and figures["bytes"] > 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(step.model.network))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model_dir / "tokenizer.json").read_bytes()

    code, out, _ = export(capsys, tmp_path / "checkpoints" / "00000002", tmp_path / "second", "--dtype", "bfloat16")
    assert code == 0 and "after 2 iterations" in out and "bfloat16" in out
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype="auto")
    assert second.dtype == torch.bfloat16 and not torch.allclose(logits(second).float(), logits(loaded))

    code, _, _ = export(capsys, tmp_path / "out", tmp_path / "half", "--dtype", "float16")
    assert code == 0 and logits(AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")).dtype == torch.float16


def test_adapters_are_merged_or_alone(tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = make_run(tmp_path, model_dir, lora={"rank": 2})
    assert export(capsys, tmp_path, tmp_path / "out")[0] == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(step.model.network), rtol=1e-4, atol=1e-4)
    assert export(capsys, tmp_path, tmp_path / "adapter", "--adapter")[0] == 0
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert named == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_a_checkpoint_that_was_copied_away_still_says_what_it_is(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = make_run(tmp_path, model_dir, lora={"rank": 2, "target_modules": ["q_proj", "v_proj"]})
    moved = shutil.copytree(tmp_path / "checkpoints" / "00000003", tmp_path / "elsewhere" / "my-best")
    assert export(capsys, moved, tmp_path / "out", "--model", model_dir)[0] == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(step.model.network), rtol=1e-4, atol=1e-4)


def test_a_damaged_checkpoint_is_passed_over_and_said(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    make_run(tmp_path, model_dir)
    shard = next((tmp_path / "checkpoints" / "00000003").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        code, out, _ = export(capsys, tmp_path, tmp_path / "out")
    assert code == 0 and "after 2 iterations" in out and "falling back" in caplog.text
    code, _, err = export(capsys, tmp_path, tmp_path / "other", "--iteration", "3")
    assert code == 2 and "bytes, the manifest says" in err and not (tmp_path / "other").exists()


def test_wrong_input_is_one_line(tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    make_run(run, model_dir)
    empty = tmp_path / "empty"
    empty.mkdir()
    other = save_model(tmp_path / "other", intermediate_size=48)
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "nowhere", tmp_path / "out"], "no such directory"),
        ([empty, tmp_path / "out"], "neither a run with checkpoints/"),
        ([run, run], "exists already"),
        ([run, tmp_path / "out", "--iteration", "7"], "no checkpoint of iteration 7; there are: 2, 3"),
        ([run, tmp_path / "out", "--adapter"], "trains the whole model"),
        ([run, tmp_path / "out", "--model", empty], "no config.json"),
        ([run, tmp_path / "out", "--model", other], "6 have another shape"),
    ]
    for arguments, message in cases:
        code, _, err = export(capsys, *arguments)
        assert code == 2 and message in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "out").exists()
