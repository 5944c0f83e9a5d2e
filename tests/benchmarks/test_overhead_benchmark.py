"""The overhead benchmark measures every part with the production objects."""

import json

import pytest

from benchmarks.learning import table
from benchmarks.overhead import main


def test_every_part_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--samples", "200", "--no-ring", "--json"])
    found = json.loads(capsys.readouterr().out)
    parts = found["parts_us"]
    assert set(parts) == {"transport generator", "transport rewarder", "transport learner", "pacing", "batching", "ledger"}
    assert min(parts.values()) > 0
    assert found["sum_us"] == pytest.approx(sum(parts.values()))


def test_the_table_of_learning_compares_with_synchronous() -> None:
    def row(schedule: str, seed: int, value: float) -> dict[str, object]:
        return {"schedule": schedule, "seed": seed, "pass_at_1": value, "staleness_mean": 0.5, "staleness_max": 1.0}

    rows = [row("synchronous", i, v) for i, v in enumerate((0.80, 0.82, 0.84))] + [row("one_off", i, v) for i, v in enumerate((0.79, 0.81))]
    first, second = table(rows)
    assert (first["pass_at_1"], first["standard_error"], first["difference"]) == pytest.approx((0.82, 0.02 / 3**0.5, 0.0))
    assert (second["pass_at_1"], second["difference"], second["seeds"]) == pytest.approx((0.80, -0.02, 2))
    assert second["difference_error"] == pytest.approx((0.01**2 + 0.02**2 / 3) ** 0.5)
