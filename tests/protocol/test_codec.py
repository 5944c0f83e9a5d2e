"""Bytes <-> messages: golden bytes, refusals that name what is wrong, and no bytes that break the decoder."""

import json
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import HEADER, MAGIC, decode, encode
from protocol.errors import WireError
from protocol.messages import MESSAGES, PROTOCOL_VERSION, Completion, Credit, Trajectory
from tests.protocol.examples import equal, example

RUN = 0x0123456789ABCDEF
GOLDEN = Path(__file__).parent.parent / "golden" / f"messages-v{PROTOCOL_VERSION}.json"


def frames(tag: str) -> list[bytes]:
    return [bytes(frame) for frame in encode(example(tag), RUN)]


@pytest.mark.parametrize("tag", MESSAGES)
def test_examples_survive_the_wire(tag: str) -> None:
    assert equal(decode(frames(tag), RUN), example(tag))


@pytest.mark.parametrize("tag", MESSAGES)
def test_bytes_are_the_golden_ones(tag: str) -> None:
    """A change of these bytes is a change of the protocol: raise PROTOCOL_VERSION and write a new golden file."""
    golden = json.loads(GOLDEN.read_text())
    assert [frame.hex() for frame in frames(tag)] == golden[tag]
    assert equal(decode([bytes.fromhex(frame) for frame in golden[tag]], RUN), example(tag))


def test_golden_file_has_every_message() -> None:
    assert sorted(json.loads(GOLDEN.read_text())) == sorted(MESSAGES)


def refused(parts: list[bytes], run: int = RUN) -> str:
    with pytest.raises(WireError) as caught:
        decode(parts, run, "generator-3@1")
    assert "generator-3@1" in str(caught.value)
    return str(caught.value)


def test_foreign_protocol_version_is_refused() -> None:
    parts = frames("Credit")
    parts[0] = HEADER.pack(MAGIC, 9, RUN) + b"Credit"
    assert f"protocol version 9, this process speaks {PROTOCOL_VERSION}" in refused(parts)


def test_foreign_run_is_refused() -> None:
    assert "of run 0123456789abcdef, this is run 0000000000000001" in refused(frames("Credit"), run=1)


def test_unknown_tag_is_refused() -> None:
    parts = frames("Credit")
    parts[0] = parts[0][: HEADER.size] + b"Pickle"
    assert "unknown tag 'Pickle'" in refused(parts)


def test_wrong_magic_is_refused() -> None:
    parts = frames("Credit")
    parts[0] = b"XX" + parts[0][2:]
    assert "starts with b'XX'" in refused(parts)


def test_missing_frame_is_refused() -> None:
    assert "frames, expected" in refused(frames("Completion")[:-1])


def test_array_of_wrong_length_is_refused() -> None:
    parts = frames("Completion")
    parts[3] = parts[3][:-1]
    assert "token_ids" in refused(parts)


def test_unknown_and_missing_fields_are_refused() -> None:
    parts = frames("Credit")
    content = msgpack.unpackb(parts[1])
    parts[1] = msgpack.packb({**content, "extra": 1})
    assert "extra" in refused(parts)
    parts[1] = msgpack.packb({"total": 1})
    assert "expected ['loaded', 'total']" in refused(parts)


@pytest.mark.parametrize(("field", "value"), [("total", "many"), ("total", True), ("total", 1.5), ("loaded", [1]), ("loaded", None)])
def test_fields_of_wrong_type_are_refused(field: str, value: object) -> None:
    parts = frames("Credit")
    parts[1] = msgpack.packb({**msgpack.unpackb(parts[1]), field: value})
    assert field in refused(parts)


def test_literals_are_checked() -> None:
    parts = frames("Completion")
    parts[1] = msgpack.packb({**msgpack.unpackb(parts[1]), "finish_reason": "tired"})
    assert "finish_reason is 'tired'" in refused(parts)


def test_arrays_of_a_completion_must_fit_together() -> None:
    completion = example("Completion")
    assert isinstance(completion, Completion)
    short = replace(completion, behaviour_logprobs=completion.behaviour_logprobs[:-1])
    assert "completion 7/0: 3 token_ids but (2,) behaviour_logprobs" in refused([bytes(f) for f in encode(short, RUN)])
    late = replace(completion, spans=np.array([[0, 0, 2], [1, 0, 4]], np.int32))
    assert "spans that end at 4" in refused([bytes(f) for f in encode(late, RUN)])
    falling = replace(completion, spans=np.array([[1, 0, 2], [0, 0, 3]], np.int32))
    assert "versions fall" in refused([bytes(f) for f in encode(falling, RUN)])


def test_mask_of_another_length_is_refused() -> None:
    trajectory = example("Trajectory")
    assert isinstance(trajectory, Trajectory)
    wrong = replace(trajectory, loss_mask=np.ones(5, np.bool_))
    assert "loss_mask" in refused([bytes(f) for f in encode(wrong, RUN)])


def test_decoded_arrays_cannot_be_written() -> None:
    completion = decode(frames("Completion"), RUN)
    assert isinstance(completion, Completion)
    with pytest.raises(ValueError, match="read-only"):
        completion.token_ids[0] = 1


@given(st.lists(st.binary(max_size=80), max_size=6))
@settings(max_examples=300, deadline=None)
def test_random_bytes_raise_wire_errors_alone(parts: list[bytes]) -> None:
    with pytest.raises(WireError):
        decode(parts, RUN)


@given(tag=st.sampled_from(sorted(MESSAGES)), where=st.integers(0, 10_000), value=st.integers(0, 255), drop=st.booleans())
@settings(max_examples=500, deadline=None)
def test_damaged_messages_decode_or_raise_wire_errors(tag: str, where: int, value: int, drop: bool) -> None:
    parts = frames(tag)
    frame = where % len(parts)
    if parts[frame]:
        data = bytearray(parts[frame])
        place = where % len(data)
        if drop:
            del data[place]
        else:
            data[place] = value
        parts[frame] = bytes(data)
    try:
        decode(parts, RUN)
    except WireError:
        pass


def test_credit_needs_no_arrays() -> None:
    assert len(encode(Credit(total=1), RUN)) == 2
