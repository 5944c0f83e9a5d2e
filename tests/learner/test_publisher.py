"""Publishing: versions that generators can trust, an export that transformers loads, and a disk that is full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from learner import publisher as module
from learner.publisher import Publisher, next_incarnation
from protocol.errors import UserError
from protocol.ledger import Ledger
from protocol.manifest import verify
from protocol.messages import Version
from tests.directories import tokenizer_directory


@pytest.fixture
def tensors(model_dir: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_an_announced_version_verifies_and_keeps_every_tensor(tmp_path: Path, model_dir: Path, tensors: dict[str, torch.Tensor]) -> None:
    ready = Publisher(tmp_path / "weights", model_dir, "bfloat16").publish(Version(3, 1), tensors.items())
    assert (ready.number, ready.incarnation) == (3, 1)
    shards = verify(Path(ready.directory), ready.manifest_sha256)["shards"]
    described = {name: entry for shard in shards.values() for name, entry in shard.items()}
    assert described.keys() == tensors.keys()
    assert all(entry["dtype"] == "BF16" and entry["shape"] == list(tensors[name].shape) for name, entry in described.items())
    assert ready.num_bytes == sum(path.stat().st_size for path in Path(ready.directory).iterdir())


def test_two_complete_versions_stay_also_while_the_next_is_written(
    tmp_path: Path, model_dir: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that has begun with the one before the newest must not lose it before it could hear of the newest."""
    root = tmp_path / "weights"
    publisher, seen = Publisher(root, model_dir, "float32"), []
    write = module.save_shards

    def spy(directory: Path, *arguments: Any) -> None:
        seen.append(sorted(path.name for path in root.iterdir() if not path.name.startswith(".")))
        write(directory, *arguments)

    monkeypatch.setattr(module, "save_shards", spy)
    for number in range(4):
        publisher.publish(Version(number), tensors.items())
    assert seen == [[], ["v0"], ["v0", "v1"], ["v1", "v2"]]
    assert sorted(path.name for path in root.iterdir()) == ["v2", "v3"]


def test_a_version_that_was_renamed_and_not_entered_does_not_stop_the_next_learner(
    tmp_path: Path, model_dir: Path, tensors: dict[str, torch.Tensor]
) -> None:
    """The learner was killed between the rename and the end of the ledger's transaction, when it published the first version of an incarnation."""
    root, path = tmp_path / "weights", tmp_path / "ledger.sqlite"
    assert next_incarnation(root, []) == 0
    Publisher(root, model_dir, "float32").publish(Version(5, 0), tensors.items())
    ledger = Ledger(path)
    incarnation = next_incarnation(root, ledger.versions())
    assert (ledger.versions(), incarnation) == ([], 1)
    publisher = Publisher(root, model_dir, "float32", ledger)
    publisher.publish(Version(5, incarnation), tensors.items())
    publisher.remove_older_incarnations(incarnation)
    assert sorted(path.name for path in root.iterdir()) == ["v5.1"]
    assert next_incarnation(tmp_path / "elsewhere", ledger.versions()) == 2
    ledger.close()


def test_the_first_version_after_a_rollback_stays_beside_newer_numbers_from_before(
    tmp_path: Path, model_dir: Path, tensors: dict[str, torch.Tensor]
) -> None:
    root = tmp_path / "weights"
    publisher = Publisher(root, model_dir, "float32")
    for version in (Version(7), Version(8), Version(3, 1)):
        publisher.publish(version, tensors.items())
    assert sorted(path.name for path in root.iterdir()) == ["v3.1", "v8"]


@pytest.mark.parametrize("shard_bytes", [module.SHARD_BYTES, 20_000])
def test_an_export_loads_and_computes_the_same(
    tmp_path: Path, model_dir: Path, tensors: dict[str, torch.Tensor], shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", shard_bytes)
    target = tmp_path / "final_model"
    target.mkdir()
    (target / "old").touch()
    Publisher(tmp_path / "weights", model_dir, "float32").export(target, tensors.items())
    assert (len(list(target.glob("*.safetensors"))) > 1) == (shard_bytes == 20_000)
    assert not (target / "old").exists()
    loaded, original = (AutoModelForCausalLM.from_pretrained(d) for d in (target, model_dir))
    ids = torch.tensor([[5, 9, 2, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, original(ids).logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final_model", "weights"]


def test_an_export_carries_the_tokenizer(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    model = tokenizer_directory(tmp_path / "model")
    Publisher(tmp_path / "weights", model, "float32").export(tmp_path / "out", tensors.items())
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tiny_disk: Path, model_dir: Path) -> None:
    publisher = Publisher(tiny_disk / "weights", model_dir, "float32")
    fits, too_large = ({"weight": torch.zeros(n)} for n in (1000, 1_000_000))
    publisher.publish(Version(0), fits.items())
    with pytest.raises(UserError, match=r"weights: version v1 cannot be written \(.*No space left.*\); \d MB are free"):
        publisher.publish(Version(1), too_large.items())
    assert [path.name for path in (tiny_disk / "weights").iterdir()] == ["v0"]
    with pytest.raises(UserError, match=r"final: the model cannot be written \(.*No space left.*\); \d MB are free"):
        publisher.export(tiny_disk / "final", too_large.items())
    assert [path.name for path in tiny_disk.iterdir()] == ["weights"]
    publisher.publish(Version(1), fits.items())
