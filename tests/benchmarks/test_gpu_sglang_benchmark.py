"""The arguments of the GPU benchmark of SGLang; what it measures needs a server (`--tiny --device cpu` goes through it by hand)."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml

from benchmarks.gpu.sglang import configuration, main, parse
from rlsys.config import load_config


def given(*arguments: str) -> argparse.Namespace:
    return parse(["--tiny", "--device", "cpu", *arguments])


def test_paths_count_from_where_the_command_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of a relative --keep find their model, although paths in a configuration count from its file."""
    monkeypatch.chdir(tmp_path)
    options = given("--keep", "kept", "--python", "venv/bin/python", "--environment", "A=1", "B=x=y")
    directory = tmp_path / "kept"
    assert options.keep == directory
    (directory / "model").mkdir(parents=True)
    (directory / "disk.yaml").write_text(yaml.safe_dump(configuration(directory, options, "disk")))
    config = load_config(directory / "disk.yaml")
    assert config.model.path == directory / "model"
    server = config.generators.options
    assert server["python"] == str(tmp_path / "venv/bin/python")
    assert server["environment"] == {"A": "1", "B": "x=y", "PYTHONPATH": str(directory / "plugin")}
    assert (directory / "plugin" / "rlsys_sglang_seeds.py").exists()


@pytest.mark.parametrize(
    ("arguments", "why"), [(["--keep", "."], "holds a run of lane disk already"), (["--environment", "A"], "NAME=VALUE")]
)
def test_what_cannot_work_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run-disk").mkdir()
    with pytest.raises(SystemExit, match="2"):
        main(["--tiny", "--device", "cpu", *arguments])
    assert why in capsys.readouterr().err
