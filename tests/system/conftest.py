"""Whole runs through `rlsys up`: a tiny random model, real processes, real sockets, the real sandbox."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlsys.quickstart.tasks import write_dataset
from rlsys.rundir import holder, read_json

DEADLINE_S = 300.0
"""Ten times what the longest of these runs takes: a machine that is busy, or stands still for a while, is no fault."""
LOOK_S = 0.05
"""Between two looks at what changes by itself."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of 2 layers with a trained tokenizer, in a Hugging Face directory."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from rlsys.quickstart.tasks import make_problem
    from rlsys.quickstart.tokenizer import BOS_ID, EOS_ID, PAD_ID, save_tokenizer, train_tokenizer

    directory = tmp_path_factory.mktemp("model")
    rng = random.Random(0)
    tokenizer = train_tokenizer([make_problem(rng, "train").prompt for _ in range(200)])
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID)
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory, 256)
    return directory


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with train.jsonl and held_out.jsonl."""
    directory = tmp_path_factory.mktemp("data")
    write_dataset(directory / "train.jsonl", "train", 24, 0)
    write_dataset(directory / "held_out.jsonl", "held_out", 6, 0)
    return directory


@pytest.fixture
def config(tiny_model: Path, problems: Path, tmp_path: Path) -> dict[str, Any]:
    """A small run: 4 iterations of 4 groups x 4 samples, with evaluation at both ends."""
    return {
        "name": "test",
        "iterations": 4,
        "model": {"path": str(tiny_model)},
        "data": {
            "train": str(problems / "train.jsonl"),
            "eval": str(problems / "held_out.jsonl"),
            "prompt_template": "<|bos|>{prompt}<|sep|>",
        },
        "sampling": {"groups_per_iteration": 4, "group_size": 4, "max_tokens": 24},
        "evaluation": {"samples": 2},
        "generators": {"slots": 16},
        "rewarders": {"reward": "tests.system.rewards:LengthReward"},
        "learner": {"dtype": "float32", "overlong": "keep", "optimizer": {"lr": 1e-3}},
        "deadlines": {"heartbeat_s": 60.0, "shutdown_s": 30.0},
    }


class Run:
    """A started `rlsys up`. Ended by its id, whatever the test does."""

    def __init__(self, config: dict[str, Any], directory: Path, *arguments: str, inside: str = "") -> None:
        self.config_path = directory / "config.yaml"
        self.config_path.write_text(yaml.safe_dump(config))
        self.path = directory / "run"
        self._inside = ["ip", "netns", "exec", inside] if inside else []  # a network namespace, where it stands for a host
        self.process = self._start("up", str(self.config_path), "--run-dir", str(self.path), *arguments)
        self.out = self.err = ""

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._inside, sys.executable, "-P", "-m", "rlsys", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)},
            start_new_session=True,
        )

    def wait(self, deadline_s: float = DEADLINE_S, *, restarts: bool = False) -> int:
        """The exit code; the output is in `out` and `err`. A process that died and came back fails the test, unless `restarts`."""
        self.out, self.err = self.process.communicate(timeout=deadline_s)
        assert restarts or not self.exit_record.get("restarts"), self.exit_record["restarts"]
        return self.process.returncode

    def status(self) -> dict[str, Any]:
        return read_json(self.path / "status.json") or {}

    def until(self, condition: Callable[[dict[str, Any]], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
        """What `condition(status)` gives once it is true."""
        end = time.monotonic() + deadline_s
        while True:
            late, over = time.monotonic() > end, self.over  # before the look: what came to be and ended meanwhile counts
            if found := condition(self.status()):
                return found
            if over:
                if self.process.stdout is not None and not self.process.stdout.closed:
                    self.wait(restarts=True)
                raise AssertionError(f"the run ended before {what}:\n{self.out}\n{self.err}")
            assert not late, f"no {what} within {deadline_s} s; status: {json.dumps(self.status(), indent=1)[:3000]}"
            time.sleep(LOOK_S)

    @property
    def over(self) -> bool:
        """Whether neither the process that was started lives nor, when it was detached, the supervisor that it left behind."""
        return self.process.poll() is not None and holder(self.path) is None

    def resume(self, *arguments: str) -> None:
        """Start `rlsys up --resume` on the run, whose supervisor is gone."""
        self.process.communicate(timeout=DEADLINE_S)
        self.process = self._start("up", "--resume", str(self.path), "--plain", *arguments)

    def until_gone(self, what: Callable[[], Any], name: str, deadline_s: float = 60.0) -> None:
        """Wait until `what()` gives nothing any more."""
        end = time.monotonic() + deadline_s
        while found := what():
            assert time.monotonic() < end, f"{name} are still there: {found}"
            time.sleep(LOOK_S)

    def pids(self) -> dict[str, int]:
        """Process name -> pid."""
        return {p["name"]: p["pid"] for p in self.status().get("processes", [])}

    @property
    def exit_record(self) -> dict[str, Any]:
        return read_json(self.path / "exit.json") or {}


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_gone(pids: set[int], deadline_s: float = 60.0) -> None:
    """Nothing is left in the sessions led by these pids, or nothing is soon."""
    end = time.monotonic() + deadline_s
    while True:
        late = time.monotonic() > end
        if not (left := members(pids)):
            return
        assert not late, f"processes {left} are still there after {deadline_s:g} s"
        time.sleep(LOOK_S)


def members(sessions: set[int]) -> list[int]:
    """Processes that live in any of the sessions led by these pids. 0 is the pid of a process on another host that is not known yet, and the
    session of much that is none of ours."""
    sessions = sessions - {0}
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) in sessions and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start runs; every process of theirs is gone when the test ends, and a test that left one behind fails."""
    runs: list[Run] = []

    def make(config: dict[str, Any], *arguments: str, inside: str = "") -> Run:
        directory = tmp_path / f"r{len(runs)}"
        directory.mkdir()
        runs.append(Run(config, directory, *arguments, inside=inside))
        return runs[-1]

    yield make
    left: list[int] = []
    for run in runs:
        sessions = {pid for pid in run.pids().values() if pid} | {run.process.pid}  # 0 is of none that runs here
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.communicate(timeout=60)
        supervisor = holder(run.path)
        if supervisor is not None:
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(supervisor, signal.SIGKILL)
        try:
            assert_gone(sessions)
        except AssertionError:
            for pid in members(sessions):
                left.append(pid)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert not left, f"processes {left} outlived their run"
