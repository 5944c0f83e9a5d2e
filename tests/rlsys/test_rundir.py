"""The run directory: held by one process, found out by others, and the places that belong to it."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from protocol.errors import ConfigError
from rlsys import rundir
from rlsys.config import RunConfig, load_config, parse_config
from rlsys.rundir import RunDir, check_room, choose_weights_dir, default_run_dir, holder, make_scratch_dir, read_json, write_atomically
from tests.configuration import minimal


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return parse_config(minimal(tmp_path), "test")


def test_a_claimed_directory_is_held_and_holds_the_configuration(tmp_path: Path, config: RunConfig) -> None:
    path = tmp_path / "run"
    directory = RunDir(path)
    assert holder(path) is None
    directory.claim(config)
    try:
        assert holder(path) == os.getpid()
        assert load_config(path / "config.yaml") == config
        with pytest.raises(ConfigError, match=rf"run directory {path} is in use by process {os.getpid()}; choose another --run-dir"):
            RunDir(path).claim(config)
        assert holder(path) == os.getpid(), "a refused claim takes nothing away"
    finally:
        directory.release()
    assert holder(path) is None
    with pytest.raises(ConfigError, match="already holds a run; choose another --run-dir"):
        RunDir(path).claim(config)
    assert holder(path) is None, "a refused claim leaves no lock"


def test_looking_who_holds_it_does_not_disturb_a_claim(tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """`holder` has the lock for an instant; a claim at that instant waits for it."""
    monkeypatch.setattr(rundir, "PROBE_S", 120.0)
    path = tmp_path / "run"
    path.mkdir()
    probe = os.open(path / "lock", os.O_RDONLY | os.O_CREAT)
    fcntl.flock(probe, fcntl.LOCK_SH)
    directory = RunDir(path)
    claim = threading.Thread(target=directory.claim, args=(config,), daemon=True)
    claim.start()
    assert not (path / "config.yaml").exists()
    os.close(probe)
    claim.join(120.0)
    assert (path / "config.yaml").exists()
    directory.release()


def test_a_place_that_cannot_be_a_directory_is_one_line(tmp_path: Path, config: RunConfig) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run directory .*file: cannot be made \((File exists|Not a directory)\)"):
        RunDir(tmp_path / "file").claim(config)


def test_default_directories_do_not_repeat(tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlsys.rundir.time.strftime", lambda pattern: "20260101-000000")
    first = default_run_dir(config)
    first.mkdir(parents=True)
    assert (str(first), str(default_run_dir(config))) == ("runs/run-20260101-000000", "runs/run-20260101-000000-1")


def test_weights_go_where_they_fit(tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=0)
    monkeypatch.setattr("rlsys.rundir.shutil.disk_usage", lambda path: usage)
    size = (config.model.path / "model.safetensors").stat().st_size
    usage.free = 12 * size + 1
    monkeypatch.setattr(rundir, "SHM", tmp_path)
    assert choose_weights_dir(config, tmp_path / "run", "ab") == tmp_path / "rlsys-ab"
    usage.free = 12 * size
    assert choose_weights_dir(config, tmp_path / "run", "ab") == tmp_path / "run" / "weights"
    own = parse_config({**minimal(tmp_path), "weights": {"directory": "/mnt/fast"}}, "test")
    assert choose_weights_dir(own, tmp_path / "run", "ab") == Path("/mnt/fast/rlsys-ab")
    usage.free = 3 * size
    check_room(tmp_path / "not" / "yet" / "there", config)
    usage.free = 3 * size - 1
    with pytest.raises(ConfigError, match=rf"{tmp_path}: 0 MB are free, three versions of the model need 0 MB; set weights\.directory"):
        check_room(tmp_path / "not" / "yet" / "there", config)


def test_sockets_are_private_and_their_paths_short() -> None:
    with make_scratch_dir("0123456789abcdef") as directory:
        assert directory.stat().st_mode & 0o777 == 0o700
        assert len(str(directory / "generator-100.100.completions")) < 107
    assert not directory.exists()


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    assert read_json(path) is None
    write_atomically(path, '{"a": 1}')
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]
    for text in ('{"a": ', "[1]"):
        path.write_text(text)
        assert read_json(path) is None
