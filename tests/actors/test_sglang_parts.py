"""The parts of the SGLang engine that need no server: decisions, what is read from answers, the guard, the environment's lock files."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save_file

from actors.engines import EngineOptions, guard
from actors.engines.concurrency import DECREASE, Concurrency, ServerLoad
from actors.engines.environments import READY, environment_dir, find_python, read_environment
from actors.engines.sglang import asked_for, check_attached
from actors.engines.sglang_check import check
from actors.engines.sglang_client import Stream, _read_event
from actors.engines.sglang_options import Options
from actors.engines.sglang_server import Server, device_places, server_command, server_environment, write_model_dir
from actors.engines.swaps import choose_swap
from actors.engines.tensors import check_shapes, read_shapes
from protocol.errors import ConfigError, InfrastructureFault, WeightsError
from rlsys.engines import install, read_lock
from tests.actors.processes import descendants, wait_until

# ---------------------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize(
    ("version", "radix", "expected"),
    [
        ("0.5.15.post1", True, "abort_resume"),
        ("0.5.17", True, "abort_resume"),
        ("0.5.17", False, "abort_resume"),
        ("0.5.19", True, "abort_resume"),
        ("0.5.19", False, "retract"),
        ("0.5.21", True, "retract_flush"),
        ("0.5.23", True, "retract_flush"),
        ("0.6.0rc1", True, "retract_flush"),
    ],
)
def test_the_policy_is_one_that_this_server_survives_and_labels(version: str, radix: bool, expected: str) -> None:
    assert choose_swap("auto", version, radix) == expected


@pytest.mark.parametrize(
    ("policy", "version", "radix", "why"),
    [
        ("retract_flush", "0.5.17", True, "dies of it"),
        ("retract", "0.5.21", True, "disable-radix-cache"),
        ("in_place", "0.5.17", True, "which version sampled which token"),
        ("retract", "0.5.17", False, "which version sampled which token"),
    ],
)
def test_a_policy_that_would_lie_or_kill_is_refused(policy: str, version: str, radix: bool, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        choose_swap(policy, version, radix)  # type: ignore[arg-type]


@given(st.integers(1, 64), st.integers(1, 512), st.integers(1, 600), st.integers(20, 200))
def test_concurrency_finds_what_the_server_holds(minimum: int, maximum: int, room: int, rounds: int) -> None:
    """A server with room for `room` requests queues what is above. The limit ends near that, within its borders, whatever they are."""
    control = Concurrency(minimum, maximum)
    for _ in range(rounds + 200):
        given_now = control.limit
        control.observe(
            ServerLoad(running=min(room, given_now), waiting=max(0, given_now - room), cache_used=min(1.0, given_now / room) * 0.9)
        )
        assert min(minimum, maximum) <= control.limit <= maximum
    best = max(min(room, maximum), min(minimum, maximum))
    assert int(best * DECREASE) - 1 <= control.limit <= max(best + max(1, maximum // 32) * 2, minimum)


def test_a_full_cache_and_requests_thrown_out_lower_the_limit_at_once_and_a_single_queue_does_not() -> None:
    for load in (ServerLoad(100, 0, 0.97), ServerLoad(100, 0, 0.5, retracted=1)):
        control = Concurrency(4, 100)
        control.observe(load)
        assert control.limit == 75
    control = Concurrency(4, 100)
    control.observe(ServerLoad(90, 10, 0.5))
    assert control.limit == 100
    control.observe(ServerLoad(90, 10, 0.5))
    assert control.limit == 75


# ---------------------------------------------------------------------------------------------------- answers


def event(ids: list[int], logprobs: list[float], total: int, finish: object = None, **meta: object) -> bytes:
    content = {
        "output_ids": ids,
        "meta_info": {
            "completion_tokens": total,
            "finish_reason": finish,
            "output_token_logprobs": [[value, token, None] for value, token in zip(logprobs, ids, strict=True)],
            **meta,
        },
    }
    return b"data: " + json.dumps(content).encode()


@pytest.mark.parametrize("cumulative", [False, True])
def test_pieces_of_a_stream_become_one_completion(cumulative: bool) -> None:
    stream, ids, logprobs = Stream(0, "r"), [5, 6, 7, 8, 9], [-0.5, -0.6, -0.7, -0.8, -0.9]
    for start, end in ((0, 1), (1, 4), (4, 5)):
        first = 0 if cumulative else start
        last = {"finish": {"type": "stop", "matched": 9}, "weight_versions": [{"version": "0.0", "start": 0, "end": 5}]} if end == 5 else {}
        assert _read_event(stream, event(ids[first:end], logprobs[first:end], end, **last)) == ""  # type: ignore[arg-type]
    assert _read_event(stream, b"data: [DONE]") == ""
    assert (stream.ids, stream.logprobs, stream.spans) == (ids, logprobs, [("0.0", 5)])


def test_a_hole_in_a_stream_and_an_error_in_it_are_told() -> None:
    assert "2 token ids after 0, 5 in all" in _read_event(Stream(0, "r"), event([1, 2], [-1.0, -1.0], 5))
    assert _read_event(Stream(0, "r"), b'data: {"error": {"message": "out of memory"}}') == "out of memory"
    for value in (None, float("nan"), float("-inf")):  # SGLang writes NaN as null
        assert "which is no number" in _read_event(Stream(0, "r"), event([1, 2], [-1.0, value], 2))  # type: ignore[list-item]


def test_only_a_stop_token_that_was_asked_for_ends_a_sample() -> None:
    assert asked_for({"type": "stop", "matched": 5}, (4, 5))
    assert not asked_for({"type": "stop", "matched": 6}, (4, 5)) and not asked_for({"type": "stop", "matched": 6}, ())


# ---------------------------------------------------------------------------------------------------- weights and devices


def test_wrong_tensors_are_told_before_a_server_sees_them(tmp_path: Path) -> None:
    for name, tensors in {
        "base": {"a": torch.zeros(2, 3), "b": torch.zeros(4)},
        "tied": {"a": torch.zeros(2, 3), "b": torch.zeros(4), "lm_head.weight": torch.zeros(2, 3)},
        "less": {"a": torch.zeros(2, 3)},
        "more": {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(1)},
        "other": {"a": torch.zeros(3, 2), "b": torch.zeros(4)},
    }.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    expected = read_shapes(tmp_path / "base")
    check_shapes(tmp_path, read_shapes(tmp_path / "tied"), expected)
    for name, why in (("less", "lacks 1 .* b"), ("more", "model has not.* c"), ("other", r"a has shape \[3, 2\], expected \[2, 3\]")):
        with pytest.raises(WeightsError, match=why):
            check_shapes(tmp_path / name, read_shapes(tmp_path / name), expected)
    with pytest.raises(WeightsError, match=r"no \*\.safetensors"):
        read_shapes(tmp_path)
    (tmp_path / "base" / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(WeightsError, match="header of"):
        read_shapes(tmp_path / "base")


def test_each_server_has_devices_of_its_own() -> None:
    options = Options(tp=2, devices=[3, 4, 5, 6])
    assert [device_places(options, "cuda", i) for i in (0, 1)] == [[3, 4], [5, 6]]
    assert [device_places(options, "cuda", i, joined=True) for i in (0, 1)] == [[0, 1], [2, 3]], "the list is of the run's own host"
    assert [device_places(Options(), device, 2) for device in ("cuda", "cuda:5", "cpu")] == [[2], [5], []]
    with pytest.raises(ConfigError, match="needs devices 4 to 5 of the list, which names 4"):
        device_places(options, "cuda", 2)
    for device in ("cuda:x", "cuda:", "gpu"):
        with pytest.raises(ConfigError, match="expected cpu, cuda or cuda:N"):
            device_places(Options(), device, 0)
    with pytest.raises(ConfigError, match="names one device"):
        device_places(options, "cuda:1", 0)


def test_a_server_sees_its_devices_alone_of_those_that_its_actor_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers of two devices on a host whose scheduler gave it four."""

    def seen(index: int, device: str = "cuda", **more: Any) -> str:
        engine = EngineOptions(model_path=tmp_path, max_context=64, device=device, index=index, **more)
        return server_environment(engine, Options(tp=2 if device == "cuda" else 1))["CUDA_VISIBLE_DEVICES"]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [seen(0), seen(1), seen(0, "cuda:7"), seen(1, "cpu")] == ["0,1", "2,3", "7", ""]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-5f,6,7")
    assert [seen(0), seen(1, joined=True), seen(0, "cuda:1"), seen(1, "cpu")] == ["4,GPU-5f", "6,7", "GPU-5f", ""]
    with pytest.raises(ConfigError, match=r"needs device 4 of CUDA_VISIBLE_DEVICES \(4, GPU-5f,6,7\), which names 4"):
        seen(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="needs device 0 of CUDA_VISIBLE_DEVICES"):
        seen(0)
    environment = server_environment(EngineOptions(model_path=tmp_path, max_context=64), Options(environment={"NCCL_DEBUG": "INFO"}))
    assert environment["NCCL_DEBUG"] == "INFO" and "PYTHONPATH" not in environment


def test_any_flag_of_the_server_passes_through_and_overrides_ours(tmp_path: Path) -> None:
    engine = EngineOptions(model_path=tmp_path, max_context=100, slots=8, device="cuda", dtype="bfloat16")
    options = Options(tp=4, memory_fraction=0.6, server_args={"attention_backend": "fa3", "enable-metrics": True, "sleep-on-idle": False})
    command = server_command(Path("/py"), tmp_path, 12345, engine, options)
    pairs = dict(itertools.pairwise(command))
    assert pairs["--attention-backend"] == "fa3" and "--enable-metrics" in command and "--sleep-on-idle" not in command
    assert (pairs["--tp-size"], pairs["--mem-fraction-static"], pairs["--dtype"], pairs["--port"]) == ("4", "0.6", "bfloat16", "12345")


def test_the_server_knows_no_stop_tokens_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "served").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({"vocab_size": 9, "eos_token_id": [3, 4], "text_config": {"eos_token_id": 3}})
    )
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    write_model_dir(tmp_path / "model", tmp_path / "served")
    assert json.loads((tmp_path / "served" / "config.json").read_text()) == {
        "vocab_size": 9, "eos_token_id": None, "text_config": {"eos_token_id": None}
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "served").iterdir()] == ["config.json"]
    before = (tmp_path / "served" / "config.json").stat().st_ino
    write_model_dir(tmp_path / "model", tmp_path / "served")
    assert (tmp_path / "served" / "config.json").stat().st_ino == before, "on a full disk the one of the start before is good enough"


# ---------------------------------------------------------------------------------------------------- the guard

SERVER = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
print("ready", os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


class Guarded:
    """A guard over a program that ignores SIGTERM and has a child that does too."""

    def __init__(self, log: Path, program: str = SERVER) -> None:
        self.log = log
        reader, self.pipe = os.pipe()
        command = [sys.executable, "-I", "-S", guard.__file__, str(reader), "0.2", str(log), "--", sys.executable, "-u", "-c", program]
        self.process = subprocess.Popen(command, pass_fds=(reader,), process_group=0)
        os.close(reader)

    def pids(self) -> list[int]:
        return [int(word) for word in self.said()[:2]]

    def said(self) -> list[str]:
        """The words after "ready", once the program runs."""
        wait_until(lambda: self.log.exists() and self.log.read_text().endswith("\n"), "the program runs")
        return self.log.read_text().split()[1:]


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("how", ["the pipe closes", "told to end", "the first process dies"])
def test_nothing_of_a_server_outlives_its_guard(tmp_path: Path, how: str) -> None:
    guarded = Guarded(tmp_path / "log")
    pids = guarded.pids()
    if how == "the pipe closes":
        os.close(guarded.pipe)
    else:
        os.kill(guarded.process.pid if how == "told to end" else pids[0], signal.SIGTERM if how == "told to end" else signal.SIGKILL)
    code = guarded.process.wait(120)
    assert gone(pids) and code == 128 + signal.SIGKILL
    if how != "the pipe closes":
        os.close(guarded.pipe)


def test_what_a_server_left_in_shared_memory_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """A semaphore and a segment of a killed server go; a file of published weights that it had mapped stays."""
    weights = Path(f"/dev/shm/rlsys-test-{os.getpid()}")
    weights.write_bytes(b"x" * 4096)
    program = f"""
import mmap, os, signal, sys, time
from multiprocessing import get_context, resource_tracker
from multiprocessing.shared_memory import SharedMemory
resource_tracker.register = lambda *_: None
semaphore, segment = get_context("spawn").Semaphore(), SharedMemory(create=True, size=4096)
weights = mmap.mmap(os.open({str(weights)!r}, os.O_RDWR), 4096)
print("ready", os.getpid(), semaphore._semlock.name.lstrip("/"), segment.name.lstrip("/"), flush=True)
time.sleep(600)
"""
    guarded = Guarded(tmp_path / "log", program)
    try:
        pid, semaphore, segment = guarded.said()
        made = [Path(f"/dev/shm/sem.{semaphore}"), Path(f"/dev/shm/{segment}")]
        assert all(path.exists() for path in made)
        os.close(guarded.pipe)
        guarded.process.wait(120)
        assert gone([int(pid)]) and not any(path.exists() for path in made) and weights.exists()
    finally:
        weights.unlink()


def test_a_killed_guard_takes_the_first_process_with_it(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path / "log")
    pids = guarded.pids()
    guarded.process.kill()
    guarded.process.wait(120)
    wait_until(lambda: gone(pids[:1]), "the kernel ends the server")
    assert gone(pids[:1]) and not gone(pids[1:])
    os.kill(pids[1], signal.SIGKILL)  # SGLang's children ask the kernel for the same; this one does not
    os.close(guarded.pipe)


def test_a_full_disk_costs_lines_of_the_log_and_nothing_else() -> None:
    program = "import sys\nfor i in range(2000):\n    print('x' * 200)\nsys.exit(7)"
    guarded = Guarded(Path("/dev/full"), program)
    assert guarded.process.wait(120) == 7
    os.close(guarded.pipe)


def test_every_process_of_a_server_that_died_is_named_and_names_of_others_may_be_any_bytes(tmp_path: Path) -> None:
    """Whichever died first takes the others along before anybody looks."""
    program = """
import ctypes, os, subprocess, sys, time
named = "import ctypes, time; ctypes.CDLL(None).prctl(15, {!r}, 0, 0, 0); print(end='x', flush=True); time.sleep(600)"
children = [subprocess.Popen([sys.executable, "-c", named.format(name)], stdout=subprocess.PIPE) for name in (b"sglang::schedul", b"\\xc3(")]
assert [child.stdout.read(1) for child in children] == [b"x", b"x"]
print("ready", os.getpid(), *(child.pid for child in children), flush=True)
time.sleep(600)
"""
    guarded = Guarded(tmp_path / "log", program)
    try:
        first, scheduler, odd = map(int, guarded.said())
        assert {first, scheduler, odd} <= descendants(guarded.process.pid)
        server = Server.__new__(Server)
        server._guard = guarded.process
        server._processes = server._members()
        assert server.processes == {first: "HTTP", scheduler: "scheduler"} and not server.fault()
        os.kill(guarded.process.pid, signal.SIGSTOP)  # so that it is seen before the guard ends as well
        os.kill(scheduler, signal.SIGKILL)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: server.fault().count("died") == 2, "both have died")
        assert server.fault() == f"its HTTP process ({first}) died, its scheduler process ({scheduler}) died"
    finally:
        os.kill(guarded.process.pid, signal.SIGCONT)
        os.close(guarded.pipe)
        guarded.process.wait(120)


# ---------------------------------------------------------------------------------------------------- the environment


def test_a_server_is_ready_when_it_answers_itself(tmp_path: Path) -> None:
    """Another one may take the port between its choice and its use, half a minute later; its answers are not those of ours."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    python = tmp_path / "python"  # a server that runs and never answers
    python.write_text('#!/bin/sh\n[ "$1" = -I ] && echo True && exit\nexec sleep 600\n')
    python.chmod(0o755)
    logs = tmp_path / "logs"
    server = Server(EngineOptions(model_path=tmp_path, max_context=64, log_dir=logs, name="x"), Options(python=python, start_s=0.5))
    try:
        for answer, why in (({"model_path": "/another"}, "another server, of /another, answers"), ({}, "another server, of None")):
            with pytest.raises(InfrastructureFault, match=f"did not answer within 0.5 s of its start .*{why}"):
                server.begin()
                server.wait_ready(lambda path, answer=answer: answer, lambda: False)  # type: ignore[misc]
            server.end()
        assert [path.name for path in logs.iterdir()] == ["x-server"], "its model lies beside its log"
        server.begin()
        server.wait_ready(lambda path: {"model_path": str(logs / "x-server")}, lambda: False)
    finally:
        server.close()
    assert not list(logs.iterdir())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_lock_files_pin_every_package_once(device: str) -> None:
    lock = read_lock("sglang", device)
    lines = lock.requirements.splitlines()
    assert all(line.count("==") == 1 for line in lines) and lock.torch.startswith("torch==") and f"sglang=={lock.server}" in lines
    names = [line.partition("==")[0].lower().replace("_", "-") for line in lines]
    assert len(set(names)) == len(names) == lock.num_packages and "torch" not in names


def test_an_environment_is_found_only_when_it_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSYS_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="rlsys engines install sglang --device cuda"):
        find_python("sglang", "cuda", None)
    directory = environment_dir("sglang", "cuda")
    (directory / "bin").mkdir(parents=True)
    (directory / "bin" / "python").symlink_to(sys.executable)
    assert read_environment(directory) is None
    lock = read_lock("sglang", "cuda")
    record = {"engine": "sglang", "device": "cuda", "version": lock.server, "lock": lock.digest}
    (directory / READY).write_text(json.dumps(record))
    assert find_python("sglang", "cuda", None) == directory / "bin" / "python"
    assert install("sglang", "cuda", None, as_json=True) == 0  # complete: left alone
    strangers = {tmp_path / "nothing": "no program that can be run", Path("/bin/true"): "no Python", Path(sys.executable): "has no sglang"}
    for python, why in strangers.items():
        with pytest.raises(ConfigError, match=why):
            find_python("sglang", "cpu", python)
    with pytest.raises(ConfigError, match="device 'tpu': sglang has lock files for cpu, cuda"):
        install("sglang", "tpu", None, as_json=False)


def test_options_that_cannot_work_are_told_before_a_start_and_a_missing_environment_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLSYS_CACHE", str(tmp_path))
    for kind in ("cpu", "cuda"):
        assert "rlsys engines install sglang --device " + kind in check(Options(), kind, 2)[0]
        assert install("sglang", kind, None, as_json=False, dry_run=True) == 0
        assert "MB to download" in capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "asking leaves nothing behind"
    url = "http://127.0.0.1:30000"
    assert check(Options(url=url), "cpu", 1) == []
    for options, device, count, why in (
        (Options(url=url), "cpu", 2, "one server, but generators.count is 2"),
        (Options(), "tpu", 1, "expected cpu, cuda or cuda:N"),
        (Options(devices=[0, 1, 2], tp=2), "cuda", 2, "needs devices 2 to 3 of the list, which names 3"),
        (Options(python=tmp_path / "nothing"), "cpu", 1, "no program"),
    ):
        with pytest.raises(ConfigError, match=why):
            check(options, device, count)
    for flag, why in (
        ("port", "chosen by the actor"),
        ("--model_path", "chosen by the actor"),
        ("tp-size", r"set options\.tp"),
        ("api_key", "sends no key"),
        ("nnodes", "on one host"),
    ):
        with pytest.raises(ValidationError, match=f"server_args.{flag}: .*{why}"):
            Options(server_args={flag: 1})
    with pytest.raises(ValidationError, match="counted from 0"):
        Options(devices=[-1])
    for address in ("localhost:30000", "ftp://host:1", "http://host:port", "http://host:1/v1"):
        with pytest.raises(ValidationError, match="expected an address"):
            Options(url=address)


def test_a_server_that_runs_already_must_be_one_that_fits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "vocab_size": 97}')
    engine = EngineOptions(model_path=tmp_path, max_context=64)
    fits = {"version": "0.5.21", "skip_tokenizer_init": True, "context_length": 72}
    check_attached("http://h", engine, fits, {"model_type": "qwen3"})
    for change, model, why in (
        ({"version": None}, "qwen3", "no SGLang server that we know"),
        ({}, "llama", "a model of type 'llama' .*this run's is 'qwen3'"),
        ({"skip_tokenizer_init": False}, "qwen3", "--skip-tokenizer-init"),
        ({"context_length": 64}, "qwen3", "a context of 64 tokens; 65 are needed"),
    ):
        with pytest.raises(ConfigError, match=why):
            check_attached("http://h", engine, {**fits, **change}, {"model_type": model})


def test_what_a_server_complains_of_is_found_in_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSYS_CACHE", str(tmp_path))
    server = Server(EngineOptions(model_path=tmp_path, max_context=64, log_dir=tmp_path, name="x"), Options(url="http://127.0.0.1:1"))
    assert "it left no log" in server.complaint()
    server.log.write_text("loading\nTraceback (most recent call last):\n  File x\nValueError: tp size is 3\nKilled by its parent\n")
    assert server.complaint().startswith("ValueError: tp size is 3")
    server.log.write_text("usage: x\nsglang serve: error: unrecognized arguments: --bogus 1\n")
    assert server.complaint().startswith("sglang serve: error: unrecognized arguments: --bogus 1 (see ")
    server.log.write_text("one\ntwo\n")
    assert "one | two" in server.complaint()


def test_an_install_that_fails_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "env" / "bin" / "pip").touch()
    with pytest.raises(ConfigError, match="run the same command again"):
        install("sglang", "cpu", tmp_path / "env", as_json=False)
    said = capsys.readouterr().out
    assert "MB to download" in said.splitlines()[0]


def test_the_plug_in_draws_by_seed_and_position_with_the_right_frequencies() -> None:
    import importlib.util

    path = Path(__file__).parent.parent.parent / "rlsys" / "engine_files" / "seeds.py"
    spec = importlib.util.spec_from_file_location("rlsys_sglang_seeds", path)
    assert spec is not None and spec.loader is not None
    seeds = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeds)
    from actors.engines.sampling import uniforms

    given_seeds, positions = np.arange(1000, dtype=np.uint64) * np.uint64(0x9E3779B9), np.arange(1000) % 17
    ours = uniforms(given_seeds, positions)
    theirs = seeds.uniforms(torch.from_numpy(given_seeds.astype(np.int64)), torch.from_numpy(positions)).numpy()
    np.testing.assert_array_equal(ours, theirs)
    weights = torch.tensor([0.5, 0.2, 0.0, 0.3])
    count = 40_000
    drawn = seeds.draw(weights.log().expand(count, 4), torch.arange(count), torch.full((count,), 5))[:, 0]
    shares = torch.bincount(drawn, minlength=4) / count
    assert shares[2] == 0 and torch.allclose(shares, weights, atol=4 * 0.5 / count**0.5)
