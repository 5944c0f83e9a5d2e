"""The command line from outside: help, what it imports, and bad input, which ends in one line and exit code 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlsys.cli import build_parser, main
from rlsys.config import parse_config
from rlsys.rundir import RunDir
from tests.configuration import minimal, write

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "up",
    "check",
    "status",
    "scale",
    "sandbox",
    "token",
    "join",
    "top",
    "why",
    "timeline",
    "audit",
    "replay",
    "chaos",
    "down",
    "logs",
    "samples",
    "plan",
    "grade",
    "sft",
    "engines",
    "export",
    "doctor",
)
HEAVY = ("torch", "transformers", "ray", "tensorboard", "sglang", "zmq")


def check_and_list_heavy_imports(*configs: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`rlsys check` in a fresh interpreter; the last line of its output names the heavy libraries that it imported."""
    program = (
        f"import sys; from rlsys.cli import main; code = main(['check', *{configs!r}]); "
        f"print('HEAVY', *sorted(set(sys.modules) & set({HEAVY!r}))); sys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def rlsys(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "rlsys", *arguments], capture_output=True, text=True, timeout=600, check=False, cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert text.startswith(f"usage: rlsys {command}")
    description = text.split("\n\n")[1]
    assert description[0].isupper()
    assert description.strip().endswith(".")


@pytest.mark.parametrize("given", ["0", "-1", "4097", "9" * 5000, "five"])
@pytest.mark.parametrize(
    "command", [["sandbox", "serve", "--token-file", "token", "--cells"], ["grade", "problems", "submissions", "--jobs"]]
)
def test_a_sandbox_of_no_programs_or_of_more_than_any_machine_runs_is_refused(
    command: list[str], given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, given])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"error: argument {command[-1]}: {given[:20]!r}: expected a whole number from 1 to 4096")


def test_the_list_of_commands_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    listed = [
        line.split()[0] for line in capsys.readouterr().out.split("commands:")[1].splitlines() if line.startswith("    ") and line[4] != " "
    ]
    assert sorted(name for name in listed if name != "COMMAND") == sorted(COMMANDS), "a new command needs a line in COMMANDS, and a test"
    assert build_parser().prog == "rlsys"


def test_checking_every_shipped_configuration_needs_no_heavy_library(tmp_path: Path) -> None:
    """Those for GPUs name model and problems by MODEL and TRAIN: any of a long enough context will do. Recipes name what users bring."""
    files = minimal(tmp_path)
    model = Path(files["model"]["path"])
    (model / "config.json").write_text(json.dumps({**json.loads((model / "config.json").read_text()), "max_position_embeddings": 131072}))
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "w1 {{ messages[0].content }} w5"}))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    written = "".join(path.read_text() for path in (tmp_path / "configs").glob("*.yaml"))
    for name in set(re.findall(r"models/[\w.-]+", written)):
        shutil.copytree(model, tmp_path / "configs" / name)
    for name in re.findall(r"data/[\w-]+\.jsonl", written):
        if not (place := tmp_path / "configs" / name).exists():
            place.parent.mkdir(exist_ok=True)
            shutil.copy(files["data"]["train"], place)
    (tmp_path / "my_rewards.py").write_text("from actors.rewards.math_answer import MathAnswer as MathOrCode\n")
    configs = sorted(str(path) for path in (tmp_path / "configs").glob("*.yaml") if not path.name.startswith("sft"))
    done = check_and_list_heavy_imports(*configs, MODEL=str(model), TRAIN=files["data"]["train"], PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].split() == ["HEAVY", "transformers"], "chat templates need its tokenizers, but no torch"
    assert done.stdout.count(": ok") == len(configs) > 0


def test_a_path_with_a_variable_that_is_not_set_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL", raising=False)
    assert main(["check", str(ROOT / "configs" / "1-gpu.yaml")]) == 2
    assert "model.path is $MODEL: the environment variable MODEL is not set" in capsys.readouterr().err


def test_a_configuration_with_its_own_files_is_checked_without_heavy_libraries(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", minimal(tmp_path))
    done = check_and_list_heavy_imports(str(path))
    assert done.stderr == ""
    assert f"{path}: ok" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["HEAVY"]


def without_model(content: dict[str, Any], tmp_path: Path) -> None:
    content["model"] = {"path": str(tmp_path / "nowhere")}


def without_weights(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model" / "model.safetensors").unlink()


def without_tokenizer(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model" / "tokenizer.json").unlink()


def with_a_broken_line(content: dict[str, Any], tmp_path: Path) -> None:
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"id": "x"\n')


def with_prompts_too_long(content: dict[str, Any], tmp_path: Path) -> None:
    content["model"]["max_context"] = 9


def with_chats_too_long(content: dict[str, Any], tmp_path: Path) -> None:
    """The prompts alone would fit."""
    content["data"]["chat"] = True
    content["model"]["max_context"] = 13
    settings = {"chat_template": "w1 w2 w3 w4 {{ messages[0].content }} w5"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))


def with_chats_without_a_template(content: dict[str, Any], tmp_path: Path) -> None:
    content["data"]["chat"] = True
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")


def with_a_context_too_large(content: dict[str, Any], tmp_path: Path) -> None:
    content["model"]["max_context"] = 65


def with_completions_too_long(content: dict[str, Any], tmp_path: Path) -> None:
    content["sampling"]["max_tokens"] = 64


def with_a_typo(content: dict[str, Any], tmp_path: Path) -> None:
    content["smapling"] = {}


def with_an_unknown_builtin(content: dict[str, Any], tmp_path: Path) -> None:
    content["data"]["train"] = "builtin:slowstart"


def with_a_missing_reference(content: dict[str, Any], tmp_path: Path) -> None:
    content["learner"]["kl"] = {"coefficient": 0.1, "reference": str(tmp_path / "nobody")}


BAD: list[tuple[Callable[[dict[str, Any], Path], None], str]] = [
    (without_model, "model.path is {dir}/nowhere: no such directory; expected a Hugging Face model directory"),
    (without_weights, "model.path is {dir}/model: holds no *.safetensors weights"),
    (without_tokenizer, "{dir}/model: no tokenizer.json"),
    (with_a_broken_line, "{dir}/train.jsonl, line 5: not JSON"),
    (with_prompts_too_long, "{dir}/train.jsonl: every prompt is longer than 1 tokens"),
    (with_chats_too_long, "{dir}/train.jsonl: every prompt is longer than 5 tokens"),
    (with_chats_without_a_template, "{dir}/model: data.chat is set, but the tokenizer has no chat template"),
    (with_a_context_too_large, "model.max_context is 65, but the model in {dir}/model was built for 64 tokens"),
    (with_completions_too_long, "sampling.max_tokens is 64, which leaves no room for a prompt in the model's 64 tokens"),
    (with_a_typo, "{dir}/run.yaml: unknown key smapling; did you mean sampling?"),
    (with_an_unknown_builtin, "data.train is builtin:slowstart: the built-in ones are builtin:quickstart and builtin:simulated"),
    (with_a_missing_reference, "learner.kl.reference is {dir}/nobody: no such directory"),
]


@pytest.mark.parametrize(("spoil", "sentence"), BAD)
@pytest.mark.parametrize("command", ["check", "up"])
def test_bad_input_is_one_line_and_nothing_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, spoil: Callable[[dict[str, Any], Path], None], sentence: str
) -> None:
    content = minimal(tmp_path)
    spoil(content, tmp_path)
    path = write(tmp_path / "run.yaml", content)
    run_dir = tmp_path / "run"
    code = main([command, str(path), *(["--run-dir", str(run_dir)] if command == "up" else [])])
    output = capsys.readouterr()
    assert code == 2
    assert output.err.startswith("rlsys: " + sentence.format(dir=tmp_path))
    assert output.err.count("\n") == 1
    assert not run_dir.exists()


def test_no_room_for_weights_is_found_before_the_run_directory_is_claimed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlsys.rundir.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    path = write(tmp_path / "run.yaml", minimal(tmp_path))
    assert main(["up", str(path), "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "three versions of the model need" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("detach", [[], ["--detach"]])
def test_a_run_directory_in_use_or_already_used_is_refused(tmp_path: Path, detach: list[str]) -> None:
    content = minimal(tmp_path)
    path, run_dir = write(tmp_path / "run.yaml", content), tmp_path / "run"
    directory = RunDir(run_dir)
    directory.claim(parse_config(content, "test"))
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    try:
        done = rlsys("up", str(path), "--run-dir", str(run_dir), *detach)
    finally:
        directory.release()
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"rlsys: run directory {run_dir} is in use")
    assert line.endswith("choose another --run-dir")
    again = rlsys("up", str(path), "--run-dir", str(run_dir), *detach)
    assert (again.returncode, len(again.stderr.splitlines())) == (2, 1)
    assert "already holds a run; choose another --run-dir" in again.stderr
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == before, "nothing in it was touched"


@pytest.mark.parametrize("detach", [[], ["--detach"]])
def test_a_run_directory_that_cannot_be_made_is_one_line(tmp_path: Path, detach: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "run.yaml", minimal(tmp_path))
    (tmp_path / "file").touch()
    assert main(["up", str(path), "--run-dir", str(tmp_path / "file" / "run"), *detach]) == 2
    error = capsys.readouterr().err
    assert "cannot be made (Not a directory)" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["status", "down", "logs"])
def test_a_directory_without_a_run_is_one_line(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rlsys: {tmp_path}: ")
    assert error.count("\n") == 1


def test_check_goes_on_after_a_fault_and_prints_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = minimal(tmp_path)
    good, bad = write(tmp_path / "good.yaml", content), write(tmp_path / "bad.yaml", {**content, "iterations": 0})
    lost = write(tmp_path / "lost.yaml", {**content, "model": {"path": "/nowhere"}})
    assert main(["check", str(bad), str(lost), str(good), "--set", "generators.count=2"]) == 2
    output = capsys.readouterr()
    assert f"rlsys: {lost}: model.path is /nowhere: no such directory" in output.err, "of several files each fault names its own"
    assert f"{good}: ok" in output.out
    assert "generators  2 x embedded" in output.out
    assert f"rlsys: {bad}: iterations is 0" in output.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["up", "CONFIG", "--launcher", "slurm"], "launcher 'slurm' is not known. Known: local, ray, or your own"),
        (["up", "CONFIG", "--address", "auto"], "--address auto: the local launcher starts children of its own"),
        (["scale", "EMPTY", "generators=2"], "holds no run"),
        (["scale", "EMPTY", "generators=two"], "'generators=two': expected FLEET=COUNT"),
        (["scale", "EMPTY"], "is not running"),
        (["token", "EMPTY"], "holds no run"),
        (["join", "hello", "--role", "generator"], "'hello' is no join token"),
        (["join", "rlsys1.AAAA", "--role", "rewarder"], "damaged join token"),
        (["join", "rlsys1.AAAA", "--role", "rewarder", "--count", "0"], "--count 0: at least one actor"),
        (["join", "rlsys1.AAAA", "--role", "rewarder", "--count", "99999"], "--count 99999: at least one actor is added, and at most 4096"),
        (["join", "rlsys1.AAAA", "--role", "generator", "--devices", "cuda:0"], "--devices cuda:0: expected CUDA devices with commas"),
    ],
)
def test_wrong_words_about_fleets_and_hosts_are_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path / "config.yaml", minimal(tmp_path))
    (tmp_path / "empty").mkdir()
    assert main([{"CONFIG": str(config), "EMPTY": str(tmp_path / "empty")}.get(word, word) for word in arguments]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_ray_without_ray_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    monkeypatch.setattr("rlsys.commands.check_room", lambda directory, config: None)
    config = write(tmp_path / "config.yaml", minimal(tmp_path))
    run = tmp_path / "run"
    assert main(["up", str(config), "--launcher", "ray", "--run-dir", str(run)]) == 2
    assert "the ray launcher needs Ray: pip install 'rlsys[ray]'" in capsys.readouterr().err
    assert not run.exists()
