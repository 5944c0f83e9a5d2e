"""Published versions: atomic, immutable, and checked tensor by tensor."""

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors.numpy import save_file

from protocol.errors import WeightsError
from protocol.manifest import _STEP, Published, prune, publish, verify
from protocol.messages import Version


def write(directory: Path) -> None:
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.int64)}, directory / "model.safetensors")


def made(root: Path, number: int = 0, incarnation: int = 0) -> Published:
    return publish(root, Version(number, incarnation), "base", write, sync=True)


def test_what_is_published_verifies(tmp_path: Path) -> None:
    published = made(tmp_path, 3, 1)
    assert published.directory == tmp_path / "v3.1"
    manifest = verify(published.directory, published.manifest_sha256)
    assert (manifest["number"], manifest["incarnation"]) == (3, 1)
    assert manifest["shards"]["model.safetensors"]["a"]["shape"] == [2, 3]


def test_bytes_of_a_version_never_change(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(WeightsError, match="already published"):
        made(tmp_path)


def test_a_changed_tensor_is_named(tmp_path: Path) -> None:
    published = made(tmp_path)
    shard = published.directory / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(WeightsError, match=r"model\.safetensors: differs from its manifest in a"):
        verify(published.directory, published.manifest_sha256)


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    published = made(tmp_path)
    path = published.directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "number": 9}))
    with pytest.raises(WeightsError, match="SHA-256 differs"):
        verify(published.directory, published.manifest_sha256)


@pytest.mark.parametrize("size", [0, 4, 60, -1])
def test_a_torn_shard_is_refused(tmp_path: Path, size: int) -> None:
    published = made(tmp_path)
    shard = published.directory / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        verify(published.directory, published.manifest_sha256)


def test_a_version_that_is_gone_is_an_error_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no readable manifest\.json"):
        verify(tmp_path / "v9", "0" * 64)


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    def broken(directory: Path) -> None:
        write(directory)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        publish(tmp_path, Version(0), "base", broken)
    assert list(tmp_path.iterdir()) == []


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for number in range(4):
        made(tmp_path, number)
    made(tmp_path, 3, 1)
    (tmp_path / "notes").mkdir()
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "v3", "v3.1"]


def test_a_tensor_is_read_in_steps_to_its_end(tmp_path: Path) -> None:
    tensor = np.random.default_rng(0).integers(0, 256, 5 * _STEP // 2, np.uint8)
    published = publish(tmp_path, Version(0), "base", lambda directory: save_file({"long": tensor}, directory / "model.safetensors"))
    manifest = verify(published.directory, published.manifest_sha256)
    assert manifest["shards"]["model.safetensors"]["long"]["xxh3_128"] == xxhash.xxh3_128_hexdigest(tensor.tobytes())
    shard = published.directory / "model.safetensors"
    for place in (-1, -_STEP, -2 * _STEP):
        data = bytearray(shard.read_bytes())
        data[place] ^= 1
        shard.write_bytes(data)
        with pytest.raises(WeightsError, match="differs from its manifest in long"):
            verify(published.directory, published.manifest_sha256)
        data[place] ^= 1
        shard.write_bytes(data)


def test_a_header_that_turns_a_tensor_round_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [8, 4]}}).encode()

    def write_backwards(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))

    with pytest.raises(WeightsError, match="a has 0 bytes, expected 4"):
        publish(tmp_path, Version(0), "base", write_backwards)
