"""Iterations per second of a run while strangers flood all of its sockets, beside the same run left alone and one whose neighbour is flooded.

    python -m benchmarks.flood [--iterations 30] [--rounds 3] [--json]

The strangers are those of tests/system/test_flood.py, one thread per socket, in this process. What they compute themselves is taken from the run
wherever cores are shared, so the same strangers also flood as many sockets of nobody's (`elsewhere`): that ratio is what the flood does to
rlsys, the one to `alone` what it does to the machine and rlsys together. The processor seconds of the run's own processes per iteration say what
refusing costs them, and so what their rate falls by where the strangers have another machine. No weight changes, so that all runs sample alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import zmq

from benchmarks.observe import NO_STEP
from benchmarks.runs import running, status_when
from protocol.channels import Keys
from rlsys.launchers.local import cpu_seconds
from tests.system.test_flood import flood

SIDES = ("alone", "elsewhere", "flooded")
ITERATION_S = 300.0


@contextmanager
def strangers(addresses: list[str], run_id: int, keys: Keys) -> Iterator[None]:
    stop = threading.Event()
    threads = [threading.Thread(target=flood, args=(address, run_id, keys, stop), daemon=True) for address in addresses]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=30)


@contextmanager
def nobodys(number: int, keys: Keys) -> Iterator[list[str]]:
    """Sockets with the run's kind of lock that take nothing in: what comes waits in the kernel and in ZeroMQ until they are full."""
    context: zmq.Context[Any] = zmq.Context()
    addresses = []
    try:
        for _ in range(number):
            sink = context.socket(zmq.ROUTER)
            sink.linger, sink.rcvhwm = 0, 100
            sink.curve_server, sink.curve_publickey, sink.curve_secretkey = True, keys.public, keys.secret
            port = sink.bind_to_random_port("tcp://127.0.0.1")
            addresses.append(f"tcp://127.0.0.1:{port}")
        yield addresses
    finally:
        context.destroy(linger=0)


def measure(side: str, config: Path, directory: Path, iterations: int) -> tuple[float, float]:
    """One run; iterations per second, and processor seconds per iteration, between iteration 3 and the end of its training."""
    run = directory / "run"
    changes = [f"iterations={iterations}", "transport.kind=tcp", "evaluation.at_start=false", "evaluation.at_end=false"]
    changes.append(f"learner.optimizer.lr={NO_STEP}")
    with running(config, run, changes) as process:
        with ExitStack() as stack:
            status = status_when(run, process, lambda s: s.get("iteration", 0) >= 3, ITERATION_S)
            started = time.monotonic()
            content = json.loads((run / "keys.json").read_text())
            keys = Keys(content["public"].encode(), content["secret"].encode())
            addresses = sorted({a for p in status["processes"] for a in p["addresses"].values() if a.startswith("tcp://")})
            if side == "elsewhere":
                addresses = stack.enter_context(nobodys(len(addresses), keys))
            if side != "alone":
                stack.enter_context(strangers(addresses, int(status["run_id"], 16), keys))
            first = status["iteration"]
            pids = {process.pid, *(p["pid"] for p in status["processes"])}
            before_s = cpu_seconds(pids)
            status = status_when(run, process, lambda s: s["iteration"] >= iterations - 1, ITERATION_S)
            ended = time.monotonic()
            spent_s = cpu_seconds(pids) - before_s
            num = status["iteration"] - first
        process.wait(timeout=120)
        return num / (ended - started), spent_s / num


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="rlsys-flood-") as name:
        for i in range(options.rounds):
            for side in SIDES:
                place = Path(name) / f"{side}-{i}"
                place.mkdir()
                rate, spent_s = measure(side, options.config, place, options.iterations)
                rates[side].append(rate)
                seconds[side].append(spent_s)
                print(f"{side:<10} {rate:.3f} iterations/s, {spent_s:.2f} processor s of its own each", file=sys.stderr, flush=True)
    middle = {side: statistics.median(values) for side, values in rates.items()}
    spent = {side: statistics.median(values) for side, values in seconds.items()}
    ratios = {f"flooded_to_{other}": middle["flooded"] / middle[other] for other in ("alone", "elsewhere")}
    costs = {f"cost_to_{other}": spent["flooded"] / spent[other] - 1 for other in ("alone", "elsewhere")}
    if options.json:
        print(json.dumps({"rates": rates, "processor_s": seconds, **ratios, **costs}))
        return 0
    print(f"alone {middle['alone']:.3f} iterations per second; flooded {ratios['flooded_to_alone']:.2f} of that, and")
    print(f"{ratios['flooded_to_elsewhere']:.2f} of the rate beside the same flood at other sockets")
    print(
        f"processor seconds of the run per iteration: {costs['cost_to_alone']:+.1%} of alone, {costs['cost_to_elsewhere']:+.1%} of elsewhere"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
