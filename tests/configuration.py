"""The smallest configuration that passes every check, and files for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from tests.directories import dataset, problems, tokenizer_directory


def minimal(directory: Path) -> dict[str, Any]:
    """Plain data of a configuration whose model directory and dataset exist under `directory`."""
    model = tokenizer_directory(directory / "model")
    save_file({"weight": np.zeros(4, np.float32)}, model / "model.safetensors")
    return {
        "iterations": 3,
        "model": {"path": str(model)},
        "data": {"train": str(dataset(directory / "train.jsonl", problems(4)))},
        "sampling": {"groups_per_iteration": 2, "group_size": 2, "max_tokens": 8},
        "learner": {"optimizer": {"lr": 0.001}},
    }


def write(path: Path, content: Any) -> Path:
    """As YAML."""
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def empty_run(tmp_path: Path) -> Path:
    """The directory of a run that has a minimal configuration and nothing else yet; the configuration's files lie beside it."""
    (tmp_path / "files").mkdir()
    directory = tmp_path / "run"
    directory.mkdir()
    write(directory / "config.yaml", minimal(tmp_path / "files"))
    return directory
