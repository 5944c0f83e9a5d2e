"""What a user gets wrong is told before anything starts, with the nearest known name, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from learner.settings import LoraSettings
from protocol.errors import ConfigError
from rlsys.cli import main
from rlsys.prepare import check_adapters
from rlsys.quickstart import cache
from tests.learner.conftest import save_model

QUICKSTART = str(Path(__file__).parent.parent.parent / "configs" / "quickstart.yaml")


@pytest.mark.parametrize("host", ["192.0.2.1", "255.255.255.255", "no-such-host.invalid"])
def test_an_address_of_another_host_is_told_each_time_and_the_directory_stays_free(
    host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulated = str(Path(QUICKSTART).with_name("simulated.yaml"))
    for _ in range(2):
        over = ["--set", "transport.kind=tcp", "--set", f"transport.host={host}"]
        assert main(["up", simulated, "--run-dir", str(tmp_path / "run"), *over]) == 2
        assert f"rlsys: transport.host is {host}: n" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock", "logs"}, "what a next start may find"


@pytest.mark.parametrize("command", ["check", "up"])
def test_a_logger_whose_package_is_missing_is_found(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rlsys.loggers.PACKAGES", {"wandb": "a_package_that_is_not_there"})
    extra = ["--run-dir", str(tmp_path / "run")] if command == "up" else []
    assert main([command, QUICKSTART, "--set", "observe.loggers=[wandb]", *extra]) == 2
    assert "observe.loggers: a_package_that_is_not_there is not installed; pip install 'rlsys[wandb]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rewarders.options.fense=x", "unknown key rewarders.options.fense; did you mean rewarders.options.fence?"),
        ("rewarders.options.fence=maybe", "rewarders.options.fence is 'maybe'"),
        ("generators.options.prefil_tokens=3", "did you mean generators.options.prefill_tokens?"),
        ("rewarders.reward=nope.mod:Class", "no module named 'nope'; put its directory on PYTHONPATH or install it"),
        ("model.path=/nonexistent", "model.path is /nonexistent: no such directory"),
        ("data.train=/nonexistent.jsonl", "/nonexistent.jsonl: cannot be read"),
        ("learner.step=simulatd", "step 'simulatd' is not known; did you mean 'simulated'?"),
        ("learner.step_options.speed=3", "learner.step_options: step 'gradient' has no options, found speed"),
        ("observe.loggers=[tensorbord]", "logger 'tensorbord' is not known; did you mean 'tensorboard'?"),
        ("generators.count=true", "generators.count is True: input should be a valid integer"),
        ("rewarders.reward=os:path", "rewarders.reward 'os:path' is a module, expected a class of (options) with score and close"),
        ("rewarders.reward=actors.rewards:Score", "rewarders.reward 'actors.rewards:Score'"),
        (
            "learner.optimizer.name=tests.learner.bad_recipes:likelihood_of_all",
            "takes (tokens), expected a function of (trained, settings, *, options)",
        ),
        ("learner.kl={coefficient: 0.1, reference: /nonexistent}", "learner.kl.reference is /nonexistent: no such directory"),
        ("learner.correction.mode=on", "learner.correction.mode is True: input should be 'auto', 'off', 'truncate' or 'mask'"),
        ("learner.commit_every=-1", "learner.commit_every: expected a number of iterations, 0 for never, or auto"),
        (
            "model.path=$NO_SUCH_VARIABLE",
            "quickstart.yaml: model.path is $NO_SUCH_VARIABLE: the environment variable NO_SUCH_VARIABLE is not set",
        ),
    ],
)
@pytest.mark.parametrize("command", ["check", "up"])
def test_faults_are_found_by_check_and_by_up(
    command: str, override: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLSYS_CACHE", str(tmp_path / "cache"))
    extra = ["--run-dir", str(tmp_path / "run")] if command == "up" else []
    assert main([command, QUICKSTART, "--set", override, *extra]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "neither a run directory nor a base model was begun"


def test_a_bare_off_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", QUICKSTART, "--set", "learner.correction.mode=off"]) == 0, capsys.readouterr().err


def test_a_fine_tuning_is_pointed_to_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", QUICKSTART.replace("quickstart", "sft-tiny")]) == 2
    assert "rlsys sft FILE --check" in capsys.readouterr().err


def test_adapters_for_layers_that_the_model_has_not(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    check_adapters(LoraSettings(target_modules=("q_proj", "model.layers.0.mlp.up_proj")), model)
    with pytest.raises(ConfigError, match=r"has no matrix q_porj; did you mean q_proj\?"):
        check_adapters(LoraSettings(target_modules=("q_porj",)), model)


@pytest.mark.parametrize("engine", ["sglang", "simulated"])
def test_adapters_alone_for_an_engine_that_cannot_take_them(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--set", "learner.lora={publish: adapter}", "--set", f"generators.engine={engine}", "--set", "generators.options={}"]
    assert main(["check", QUICKSTART, *changes]) == 2
    assert f"learner.lora.publish is adapter, which engine {engine!r} does not take" in capsys.readouterr().err
    assert main(["check", QUICKSTART, "--set", "learner.lora={publish: adapter}"]) == 0


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "rewarders.options.speed=3",
            "simulated parts of one run need one speed: generators.options.speed is 50, rewarders.options.speed is 3",
        ),
        ("learner.step_options.devises=3", "unknown key learner.step_options.devises; did you mean learner.step_options.devices?"),
        ("generators.options.lengths.mean=16000", "mean 16000 must lie below cap 16000"),
    ],
)
def test_faults_of_a_simulated_run_are_found(override: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", QUICKSTART.replace("quickstart", "simulated"), "--set", override]) == 2
    assert says in capsys.readouterr().err


def test_a_key_that_stands_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(Path(QUICKSTART).read_text() + "\nseed: 7\n")
    assert main(["check", str(path)]) == 2
    assert "key 'seed' stands twice line" in capsys.readouterr().err


@pytest.mark.parametrize("occupied", ["a file", "something in it"])
def test_a_run_directory_that_cannot_be_used_is_refused_before_a_model_is_made(
    occupied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLSYS_CACHE", str(tmp_path / "cache"))
    target = tmp_path / "run"
    if occupied == "a file":
        target.write_text("")
    else:
        target.mkdir()
        (target / "thesis.tex").write_text("")
    assert main(["up", QUICKSTART, "--run-dir", str(target)]) == 2
    assert "cannot be made" in (error := capsys.readouterr().err) or "is not empty (it holds thesis.tex)" in error
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_warm_start_can_be_interrupted(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """One line, no traceback, nothing left in the cache, no process left."""
    environment: dict[str, Any] = {**os.environ, "RLSYS_CACHE": str(tmp_path)}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit an interrupt that is ignored
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "rlsys", "up", QUICKSTART, "--run-dir", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, before)
    try:
        entries = tmp_path / "quickstart"
        end = time.monotonic() + 600
        while not list(entries.glob("base-*.building")):
            assert time.monotonic() < end, "the warm start never began"
        os.kill(child.pid, number)
        _, error = child.communicate(timeout=300)
    finally:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.communicate(timeout=30)
    assert child.returncode == code
    assert "Traceback" not in error
    assert not list(entries.glob("base-*"))


def test_an_interrupt_as_soon_as_the_directory_stands_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSYS_CACHE", str(tmp_path))
    made: list[str] = []
    mkdir = os.mkdir

    def interrupted(path: Any, *arguments: Any, **options: Any) -> None:
        mkdir(path, *arguments, **options)
        if str(path).endswith(".building"):
            made.append(str(path))
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.ensure_entry("entry", lambda directory: None)
    assert len(made) == 1
    assert not list((tmp_path / "quickstart").iterdir())


def test_what_a_killed_builder_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSYS_CACHE", str(tmp_path))
    old, young = (tmp_path / "quickstart" / f"base-{name}.building" for name in ("old", "young"))
    for directory in (old, young):
        directory.mkdir(parents=True)
    os.utime(old, (time.time() - 2 * cache.STALE_S,) * 2)
    cache.ensure_entry("entry", lambda directory: (directory / "file").write_text("x") and None)
    assert not old.exists()
    assert young.exists()


def test_what_another_builder_takes_away_meanwhile_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSYS_CACHE", str(tmp_path))
    gone = tmp_path / "quickstart" / "base-gone.building"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([gone]))
    made, cached = cache.ensure_entry("entry", lambda directory: (directory / "file").write_text("x") and None)
    assert (made.name, cached) == ("entry", False)


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "rlsys check" in capsys.readouterr().out
