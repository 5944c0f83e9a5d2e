"""The engine benchmark does the same work on both sides."""

from __future__ import annotations

import json

import pytest

from benchmarks import engine


def test_both_sides_sample_the_lengths_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A short stream. Who is ahead is for benchmarks/engine.py itself, on a quiet machine."""
    counted: list[tuple[int, int]] = []
    rate = engine.rate

    def counting_rate(work: engine.Work, model: object, groups: list[engine.Group], *rest: int) -> float:
        counted.append((work(model, groups, *rest), sum(int(group.lengths.sum()) for group in groups)))
        return rate(work, model, groups, *rest)

    monkeypatch.setattr(engine, "rate", counting_rate)
    engine.main(["--json", "--repeats", "1", "--groups", "6", "--group-size", "4", "--concurrent", "16", "--dtypes", "float32"])
    figures = json.loads(capsys.readouterr().out)
    assert len(counted) == 2 and all(tokens == expected for tokens, expected in counted)
    assert figures["float32"]["ratio"] > 0
