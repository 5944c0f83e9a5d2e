"""Weights: what is announced is verified before the engine sees it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from actors.engines import EngineOptions
from actors.engines.embedded import EmbeddedEngine
from actors.weights import WeightsIntake
from protocol.manifest import publish
from protocol.messages import Version, WeightsReady
from tests.actors import tiny_models


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.build(), tmp_path_factory.mktemp("base"))


@pytest.fixture
def intake(base: Path) -> WeightsIntake:
    engine = EmbeddedEngine(EngineOptions(model_path=base, max_context=tiny_models.CONTEXT, slots=2))
    return WeightsIntake("generator-0@1", engine)


def published(root: Path, base: Path, number: int, incarnation: int = 0) -> WeightsReady:
    done = publish(root, Version(number, incarnation), "base", lambda d: shutil.copy(base / "model.safetensors", d))  # type: ignore[arg-type]
    return WeightsReady(
        number=number, incarnation=incarnation, directory=str(done.directory), manifest_sha256=done.manifest_sha256,
        num_bytes=done.num_bytes, published_s=0.0,
    )  # fmt: skip


def pending(intake: WeightsIntake) -> WeightsReady | None:
    return intake.pending


def flip_last_byte(ready: WeightsReady) -> None:
    shard = Path(ready.directory) / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))


def test_the_newest_announcement_is_loaded_once(intake: WeightsIntake, tmp_path: Path, base: Path) -> None:
    assert pending(intake) is None
    versions = [published(tmp_path, base, 0), published(tmp_path, base, 1), published(tmp_path, base, 1, 1)]
    for place in (1, 0, 2, 1):
        intake.announce(versions[place])
    ready = pending(intake)
    assert ready is versions[2], "a higher incarnation of the same number is newer"
    loaded = intake.load(ready)
    assert (loaded.generator, loaded.number, loaded.incarnation, loaded.error) == ("generator-0@1", 1, 1, "")
    assert 0 <= loaded.pause_s <= loaded.load_s
    assert pending(intake) is None
    intake.announce(versions[0])
    assert pending(intake) is None, "an old version is never loaded over a newer one"


def test_damaged_weights_never_reach_the_engine(intake: WeightsIntake, tmp_path: Path, base: Path) -> None:
    first, broken, third = (published(tmp_path, base, number) for number in range(3))
    intake.announce(first)
    intake.load(first)
    flip_last_byte(broken)
    intake.announce(broken)
    refused = intake.load(broken)
    assert "model.safetensors: differs from its manifest in model." in refused.error
    assert pending(intake) is None, "it is not tried again"
    intake.announce(third)
    assert pending(intake) is third
    assert intake.load(third).error == ""


def test_a_version_that_is_gone_or_does_not_fit_is_an_error_not_a_crash(intake: WeightsIntake, tmp_path: Path, base: Path) -> None:
    gone = published(tmp_path, base, 0)
    shutil.rmtree(gone.directory)
    intake.announce(gone)
    assert "no readable manifest.json" in intake.load(gone).error
    larger = tiny_models.save(tiny_models.build(hidden_size=64), tmp_path / "larger")
    foreign = published(tmp_path, larger, 1)
    intake.announce(foreign)
    assert intake.load(foreign).error
    assert pending(intake) is None
