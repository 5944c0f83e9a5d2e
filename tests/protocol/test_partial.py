"""An incomplete version: what has come, and that it is hashed as it becomes whole, once, and again after it was fetched again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from protocol import partial as module
from protocol.manifest import MANIFEST, publish, verify
from protocol.messages import Version
from protocol.partial import Partial, partial_path
from protocol.pieces import BLOCK_BYTES, Layout, Region

FILE = "model.safetensors"


class Half:
    """A published version, and its incomplete copy beside it."""

    def __init__(self, root: Path) -> None:
        def write(directory: Path) -> None:
            rng = np.random.default_rng(3)
            sizes = {"a": 3 * BLOCK_BYTES // 2, "b": 100, "c": BLOCK_BYTES}
            save_file({name: rng.integers(0, 256, size, np.uint8) for name, size in sizes.items()}, directory / FILE)

        self.root = root
        self.published = publish(root / "learner", Version(1), "base", write)
        self.bytes = (self.published.directory / FILE).read_bytes()
        self.manifest = (self.published.directory / MANIFEST).read_bytes()
        self.partial = self.begin()

    def begin(self) -> Partial:
        return Partial.begin(partial_path(self.root, Version(1)), self.manifest, sha256(self.manifest).hexdigest())

    def have_open(self) -> int:
        """How often this process has the list of its blocks open."""
        path = str(partial_path(self.root, Version(1)) / module.HAVE)
        return [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()].count(path)

    @property
    def layout(self) -> Layout:
        return self.partial.layout

    def bring(self, number: int, damage: int = 0) -> None:
        start = number * BLOCK_BYTES
        data = bytearray(self.bytes[start : start + BLOCK_BYTES])
        data[len(data) // 2] ^= damage
        self.partial.write(FILE, start, data)
        self.partial.mark([number])
        self.partial.check(number)


@pytest.fixture
def half(tmp_path: Path) -> Iterator[Half]:
    made = Half(tmp_path)
    yield made
    made.partial.close()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Region]:
    """Regions in the order in which they were read."""
    found: list[Region] = []
    real = module._hash

    def noting(path: Path, region: Region) -> str:
        found.append(region)
        return real(path, region)

    monkeypatch.setattr(module, "_hash", noting)
    return found


def test_each_region_is_read_once_when_its_last_block_has_come(half: Half, hashed: list[Region]) -> None:
    assert half.layout.num_blocks == 3
    for number in (2, 0):
        half.bring(number)
        assert all(region.end - region.start < BLOCK_BYTES for region in hashed), "no long one is whole yet"
    half.bring(1)
    assert sorted(hashed, key=lambda region: region.start) == half.layout.regions, "all of them, while it could still be coming"
    assert half.partial.wrong() == []
    assert len(hashed) == len(half.layout.regions), "and not again"
    target = half.root / "v1"
    half.partial.finish(target)
    verify(target, half.published.manifest_sha256)


def test_what_came_wrong_is_found_and_hashed_anew_once_it_was_fetched_again(half: Half) -> None:
    for number in range(3):
        half.bring(number, damage=number == 1)
    wrong = half.partial.wrong()
    assert wrong
    assert all(half.layout.number(FILE, r.start) <= 1 <= half.layout.number(FILE, r.end - 1) for r in wrong)
    blocks = half.layout.blocks(wrong)
    half.partial.mark((block.number for block in blocks), here=False)
    assert half.partial.missing(half.layout.regions), "what shares a block with them is not whole either"
    for block in blocks:
        half.bring(block.number)
    assert half.partial.wrong() == []


def test_right_bytes_that_are_fetched_again_are_hashed_again(half: Half) -> None:
    for number in range(3):
        half.bring(number)
    half.partial.mark([0], here=False)
    half.bring(0, damage=1)
    assert half.partial.wrong(), "that they were right before says nothing"


def test_who_goes_on_takes_nothing_for_checked(half: Half) -> None:
    for number in range(3):
        half.bring(number)
    assert half.partial.wrong() == []
    half.partial.write(FILE, len(half.bytes) - 1, bytes([half.bytes[-1] ^ 1]))
    half.partial.close()
    half.partial = half.begin()
    assert half.partial.missing(half.layout.regions) == []
    assert [region.end for region in half.partial.wrong()] == [len(half.bytes)]


def test_every_block_knows_the_regions_that_it_holds_a_part_of(half: Half) -> None:
    layout = Layout(json.loads(half.manifest))
    for number in range(layout.num_blocks):
        assert layout.regions_of(number) == [region for region in layout.regions if number in layout.numbers(region)]
    assert layout.regions_of(layout.num_blocks) == []


def test_a_list_of_blocks_that_is_cut_short_is_nothing_to_read_and_is_closed_again(half: Half) -> None:
    directory = partial_path(half.root, Version(1))
    (directory / module.HAVE).write_bytes(b"")
    before = half.have_open()
    assert Partial.look(directory) is None
    assert half.have_open() == before
