"""A whole run whose other host is far away: every frame takes 20 ms each way, and connections break at random moments until the run is over."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import WeightsError
from protocol.intervals import ACTIVITIES, is_waiting
from protocol.ledger import Ledger
from protocol.manifest import MANIFEST, verify, versions
from tests.system.conftest import Run, alive
from tests.system.hosts import two_hosts, why_not
from tests.system.test_join import Joiner, join, over_tcp, there, token_of  # noqa: F401  (a fixture)
from tests.system.test_ring import trajectories
from tests.system.test_scale import pids_of
from tests.system.test_simulated import simulated  # noqa: F401  (a fixture)
from tests.system.test_survival import sound
from tests.system.test_weights_over_network import at, joined_apart

ITERATIONS, CUTS, SHARE = 150, 12, 0.3


class Versions:
    """What the learner published, by its manifests, and whether that is what stands in the cache of the far host."""

    def __init__(self, published: Path, cache: Path) -> None:
        self._published, self._cache = published, cache
        self._manifests: dict[str, bytes] = {}
        self.compared: set[str] = set()

    def look(self) -> None:
        """Often enough to see each version before newer ones replace it. Fails for one that is there under its name and not whole."""
        for path in self._published.glob(f"rlsys-*/v*/{MANIFEST}"):
            with suppress(FileNotFoundError):
                self._manifests.setdefault(path.parent.name, path.read_bytes())
        for _, directory in [found for kept in self._cache.glob("*-cache") for found in versions(kept)]:
            expected = self._manifests.get(directory.name)
            if expected is None or directory.name in self.compared:
                continue
            try:
                verify(directory, sha256(expected).hexdigest())
            except (WeightsError, FileNotFoundError):
                if directory.exists():  # else a newer one has replaced it meanwhile
                    raise
            else:
                self.compared.add(directory.name)


@pytest.mark.faults
def test_a_run_over_a_slow_path_whose_connections_break_at_random_is_whole(
    simulated: dict[str, Any],  # noqa: F811
    start: Callable[..., Run],
    join: Callable[..., Joiner],  # noqa: F811
    tmp_path: Path,
) -> None:
    if why_not():
        pytest.skip(why_not())
    cache, chance = tmp_path / "kept", random.Random(5)
    weights = Versions(tmp_path / "weights", cache)

    def later(until_s: float) -> Callable[[dict[str, Any]], bool]:
        def condition(status: dict[str, Any]) -> bool:
            weights.look()
            return bool(status.get("time_s", 0) > until_s)

        return condition

    seen: set[tuple[str, str]] = set()
    broken = 0
    with two_hosts(delay_s=0.02) as hosts:
        config = at(tmp_path, over_tcp(simulated, hosts.address))
        config["iterations"] = ITERATIONS
        config["deadlines"] = {"heartbeat_s": 60.0}
        config["learner"]["step_options"]["weight_bytes"] = 8 << 20  # several blocks, so that cuts come in the middle of a version
        run = start(config, inside=hosts.ours)
        run.until(lambda status: status.get("iteration", 0) >= 1, "first iteration", 300)
        scorers = join(token_of(run, inside=hosts.ours), "--role", "rewarder", "--count", "2", inside=hosts.theirs)
        with joined_apart(run, tmp_path / "weights", inside=hosts.theirs, asked_in=hosts.ours) as generators:
            run.until(there(run, "generator-1", "generator-2", "rewarder-1", "rewarder-2"), "work on the other host", 200)
            for _ in range(CUTS):
                broken += hosts.sever_some(chance, SHARE)
                run.until(later(run.status()["time_s"] + chance.uniform(0.2, 3.0)), "a moment between two cuts")
                seen |= {(p["doing"], p["peer"]) for p in run.status()["processes"]}
            assert run.wait(400) == 0, run.err
            for joiner in (generators, scorers.process):
                out, _ = joiner.communicate(timeout=60)
                assert joiner.returncode == 0, out
    assert broken >= 2 * CUTS and len(weights.compared) >= 3, (broken, weights.compared)
    sound(run, ITERATIONS)
    who = {t.generator.partition("@")[0] for t in trajectories(run.path)}, {t.rewarder.partition("@")[0] for t in trajectories(run.path)}
    assert {"generator-1", "generator-2"} <= who[0] and {"rewarder-1", "rewarder-2"} <= who[1], "the far host worked"
    ledger = Ledger(run.path / "ledger.sqlite", read_only=True)
    known = {number for number, _ in ledger.versions()}
    ledger.close()
    assert {int(version) for t in trajectories(run.path) for version in t.spans[:, 0]} <= known
    waits = {(doing, peer) for doing, peer in seen if is_waiting(doing)}
    assert waits and all(doing in ACTIVITIES and peer for doing, peer in waits), waits
    events = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines() if '"event"' in line]
    assert not [event for event in events if event["event"] == "weights refused"], "what is loaded is whole"
    assert not any(alive(pid) for pid in pids_of(run))
