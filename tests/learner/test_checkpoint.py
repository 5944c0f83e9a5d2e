"""Checkpoints: whole or not there, found out when changed, and training goes on from them as if nothing had been."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.checkpoint import Snapshot, load, read_tensors, snapshot, write
from learner.checkpoint_files import MANIFEST, Checkpoint, clean, complete, keep, latest_good, prune, read_manifest, verify
from learner.parallel import SingleProcess
from learner.settings import LearnerSettings
from learner.step import Step
from protocol.errors import DataError, DeadlineExceeded
from tests.learner.conftest import save_model
from tests.learner.samples import random_samples


def make_step(model_dir: Path, **changes: Any) -> Step:
    settings = {"dtype": "float32", "device": "cpu", "optimizer": {"lr": 1e-2}, "updates_per_batch": 2} | changes
    return Step(LearnerSettings.model_validate(settings), model_dir, SingleProcess())


def save(step: Step, iteration: int, directory: Path, **extra: Any) -> Checkpoint:
    done = write(snapshot(step, iteration, extra), directory)
    assert done is not None
    return done


def train(step: Step, iterations: range) -> list[dict[str, float]]:
    return [step.train(random_samples(9, i), i, 10).values for i in iterations]


def test_training_goes_on_to_the_same_bits(tmp_path: Path, model_dir: Path) -> None:
    """With everything that has a state: optimizer, adaptive entropy, the correction that turns itself on, random numbers."""
    entropy = {"adaptive": True, "coefficient": 0.1, "target": 9.0, "delta": 0.01}
    whole, again = (make_step(model_dir, entropy=entropy) for _ in range(2))
    train(whole, range(3))
    done = save(whole, 3, tmp_path, journal=17)
    expected, numbers = train(whole, range(3, 6)), torch.rand(5)
    assert (done.iteration, done.extra, done.ranks, done.path) == (3, {"journal": 17}, 1, tmp_path / "00000003")
    assert verify(done.path) == done
    assert load(done.path, again).manifest_sha256 == done.manifest_sha256
    torch.manual_seed(99)
    load(done.path, again, verified=True)
    assert train(again, range(3, 6)) == expected
    assert torch.equal(torch.rand(5), numbers)
    before, after = whole.training_state(), again.training_state()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert before["control.entropy_coefficient"] > 0.1 and before["control.corrected"]


def test_a_snapshot_does_not_change_while_training_goes_on(tmp_path: Path, model_dir: Path) -> None:
    step, again = make_step(model_dir), make_step(model_dir)
    train(step, range(1))
    state = step.training_state()
    taken = snapshot(step, 1)
    written = threading.Thread(target=write, args=(taken, tmp_path))
    written.start()
    train(step, range(1, 3))
    written.join()
    load(tmp_path / "00000001", again)
    found = again.training_state()
    assert all(torch.equal(state[name], found[name]) for name in state)
    assert taken.num_bytes >= sum(tensor.nbytes for tensor in state.values())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "flipped": (flip, "shard-*", "does not match the manifest's hash"),
    "cut": (cut, "shard-*", "bytes, the manifest says"),
    "lost": (Path.unlink, "shard-*", "cannot be read"),
    "manifest cut": (cut, MANIFEST, "torn"),
    "manifest lost": (Path.unlink, MANIFEST, "cannot be read"),
    "manifest edited": (lambda path: path.write_text(path.read_text().replace('"iteration": 2', '"iteration": 3')), MANIFEST, "checksum"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_the_one_before_is_used(tmp_path: Path, model_dir: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    step = make_step(model_dir)
    for iteration in (1, 2):
        save(step, iteration, tmp_path)
    hurt, pattern, message = DAMAGE[damage]
    hurt(next((tmp_path / "00000002").glob(pattern)))
    before = step.training_state()
    with pytest.raises(DataError, match=message):
        load(tmp_path / "00000002", step)
    assert all(torch.equal(before[name], tensor) for name, tensor in step.training_state().items())
    with caplog.at_level(logging.WARNING):
        found = latest_good(tmp_path)
    assert found is not None and found.iteration == 1
    assert "checkpoint 00000002 is not used" in caplog.text and message in caplog.text and "falling back" in caplog.text


def test_another_model_is_refused_with_named_differences(tmp_path: Path, model_dir: Path) -> None:
    save(make_step(model_dir), 1, tmp_path)
    wider = make_step(save_model(tmp_path / "wider", intermediate_size=48, num_hidden_layers=3))
    with pytest.raises(DataError) as caught:
        load(tmp_path / "00000001", wider)
    text = str(caught.value)
    assert "11 tensors are missing (model.model.layers.2.input_layernorm.weight" in text and "6 have another shape" in text
    assert "model.model.layers.0.mlp.down_proj.weight is [32, 64], expected [32, 48]" in text and str(tmp_path) in text
    smaller = make_step(save_model(tmp_path / "smaller", num_hidden_layers=1))
    with pytest.raises(DataError, match="11 are not of this model"):
        load(tmp_path / "00000001", smaller)


def test_only_what_is_complete_counts_and_the_rest_is_cleaned(tmp_path: Path, model_dir: Path) -> None:
    step = make_step(model_dir)
    assert latest_good(tmp_path / "nowhere") is None and complete(tmp_path) == []
    save(step, 4, tmp_path)
    left = tmp_path / ".00000005.abc.writing"
    left.mkdir()
    (left / "rank-00000.json").write_text("{}")
    found = latest_good(tmp_path)
    assert found is not None and found.iteration == 4 and latest_good(tmp_path, at_most=3) is None
    clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["00000004"]


def test_a_second_write_of_an_iteration_replaces_the_first(tmp_path: Path, model_dir: Path) -> None:
    step = make_step(model_dir)
    first = save(step, 1, tmp_path, attempt=1)
    second = save(step, 1, tmp_path, attempt=2)
    assert first.manifest_sha256 != second.manifest_sha256 and verify(second.path).extra == {"attempt": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


def test_a_part_that_never_comes_is_a_named_error(tmp_path: Path, model_dir: Path) -> None:
    taken = snapshot(make_step(model_dir), 1)
    two = Snapshot(**{name: getattr(taken, name) for name in Snapshot.__dataclass_fields__} | {"ranks": 2})
    with pytest.raises(DeadlineExceeded, match=r"waited 0.1 s for the parts of ranks 1;"):
        write(two, tmp_path, timeout_s=0.1)
    assert list(tmp_path.iterdir()) == []


def test_pruning_keeps_the_newest_and_every_mth(tmp_path: Path, model_dir: Path) -> None:
    assert keep(range(0, 101, 10), 2, 30) == {90, 100, 30, 60}
    assert keep([5], 1, None) == {5}
    step = make_step(model_dir)
    for iteration in range(6):
        save(step, iteration, tmp_path)
    assert prune(tmp_path, keep_last=1, keep_every=2, protect=[3]) == [0, 1]
    assert [int(path.name) for path in complete(tmp_path)] == [2, 3, 4, 5]
    assert prune(tmp_path, keep_last=1) == [2, 3, 4]


def test_tensors_are_read_without_a_step(tmp_path: Path, model_dir: Path) -> None:
    step = make_step(model_dir)
    done = save(step, 0, tmp_path)
    found = read_tensors(done, {"model.model.norm.weight": torch.bfloat16})
    expected = step.state_dict_for_publishing()["model.norm.weight"].bfloat16()
    assert torch.equal(found["model.model.norm.weight"], expected)


def test_a_newer_format_is_refused(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.checkpoint_files.FORMAT", 2)
    done = save(make_step(model_dir), 0, tmp_path)
    monkeypatch.undo()
    assert json.loads((done.path / MANIFEST).read_text())["format"] == 2
    with pytest.raises(DataError, match="checkpoint format 2, this rlsys reads 1"):
        read_manifest(done.path)
