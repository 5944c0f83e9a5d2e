"""The transport benchmark moves every sample through three processes and counts each one's work."""

from __future__ import annotations

import json

import pytest

from benchmarks import transport


@pytest.mark.parametrize("row", ["curve", "ipc"])  # curve is tcp, and more
def test_every_sample_arrives_and_is_acknowledged(row: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A repeat ends only when the generator has heard the last acknowledgement; otherwise `main` raises at its deadline."""
    transport.main(["--json", "--samples", "300", "--repeats", "1", "--tokens", "64", "--rows", row])
    figures = json.loads(capsys.readouterr().out)
    assert [(found["row"], found["journal"]) for found in figures["rows"]] == [(row, False), (row, True)]
    for found in figures["rows"]:
        assert found["samples_per_s"] > 0
        assert set(found["cpu_us_per_sample"]) == set(transport.ROLES)
        assert all(us > 0 for us in found["cpu_us_per_sample"].values())


def test_a_child_that_ends_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(RuntimeError, match="the generator ended with exit code 1"),
        transport.chain("tcp", keys=None, tokens=16, journal="", directory="") as (children, _),
    ):
        children["generator"].tell({"do": "go"})  # without a number of samples
        children["generator"].hear()
    assert "KeyError: 'samples'" in capfd.readouterr().err
