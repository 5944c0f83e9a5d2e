"""One answer in 200 as long as three iterations: what it costs under each policy, and whether long answers are still learned from.

    python -m benchmarks.stragglers [--profile math] [--iterations 16] [--schedule NAME]... [--json] [--results FILE]

The real processes run the profile twice under each schedule, without and with stragglers (benchmarks/pipelining.py says what is real and what is
simulated), on the split and with the slots that a simulation by events finds best with them. Of the steady iterations: tokens of ordinary answers
trained per simulated second with stragglers against without. Stragglers are work themselves, so the loss is set against their share of all
tokens; the goal is that share + 3 %, under the recommended policy (bounded, mask).
Of groups with a terminal state other than unfinished: the share of stragglers, and of all samples, that were in trained groups.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.dispatcher import sample_seed
from actors.engines.lengths import Lengths
from benchmarks.pipelining import SCHEDULES, Setting, choose, measure, profile, recorded, settings, with_slots
from protocol.errors import UserError
from rlsys.planning.figures import Figures
from rlsys.planning.simulate import steady

ONE_IN = 200
ITERATIONS_LONG = 3
GOAL = 0.03
RECOMMENDED = "bounded_mask"


def with_stragglers(figures: Figures, s_per_iteration: float) -> Figures:
    """The profile with one sample in 200 that takes three iterations even if it runs at a sample's full rate."""
    tokens = round(ITERATIONS_LONG * s_per_iteration * figures.sampling.tokens_per_s_sample)
    lengths = figures.lengths.model_copy(update={"straggler_share": 1 / ONE_IN, "straggler_tokens": tokens})
    return figures.model_copy(update={"lengths": lengths, "name": f"{figures.name}-stragglers"})


def looker(figures: Figures, bound: int, iterations: int) -> Callable[[Path], dict[str, Any]]:
    """What to read from a run directory: ordinary tokens of the steady batches, and what became of long answers."""
    lengths = Lengths(figures.lengths)
    first, last = steady(iterations, bound)

    def look(run_dir: Path) -> dict[str, Any]:
        database = sqlite3.connect(run_dir / "ledger.sqlite")
        try:
            rows = database.execute("SELECT group_id, iteration, state FROM ended WHERE purpose = 'train'").fetchall()
        finally:
            database.close()
        ordinary = 0
        count = {"long": 0, "long_trained": 0, "all": 0, "all_trained": 0}
        for group_id, iteration, state in rows:
            seeds = [sample_seed(0, group_id, i) for i in range(figures.group_size)]
            long = sum(map(lengths.is_straggler, seeds))
            if state == "trained" and first <= iteration < last:
                ordinary += sum(lengths(seed) for seed in seeds if not lengths.is_straggler(seed))
            if state != "unfinished":
                count["all"] += len(seeds)
                count["long"] += long
                count["all_trained"] += len(seeds) * (state == "trained")
                count["long_trained"] += long * (state == "trained")
        return {"ordinary_tokens": ordinary / (last - first), **count}

    return look


def run_pair(name: str, schedule: str, iterations: int, known: dict[str, dict[str, Any]], results: Path | None) -> dict[str, Any]:
    """Without and with stragglers, both on the split and with the slots that are best with them."""
    plain = profile(name, None)
    long = with_stragglers(plain, choose(plain, schedule, iterations=iterations).predicted_s)
    setting = choose(long, schedule, iterations=iterations)
    rows = []
    for figures in (plain, long):
        one = Setting(**{**{f: getattr(setting, f) for f in Setting.__slots__}, "profile": figures.name})
        key = f"{one.key}/stragglers"
        row = known.get(key)
        if row is None:
            sized = with_slots(figures, setting.slots)
            row = {"key": key, **measure(sized, one, look=looker(sized, settings(schedule).bound, iterations))}
            if results is not None:
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        rows.append(row)
    before, after = rows
    share = long.lengths.straggler_share * (long.lengths.straggler_tokens or 0) / Lengths(long.lengths).mean
    rates = [row["ordinary_tokens"] / row["measured_s"] for row in (before, after)]
    return {
        "schedule": schedule,
        "split": f"{setting.generators:g}+{setting.trainers:g}",
        "slots": setting.slots,
        "straggler_tokens_share": share,
        "tokens_per_s": rates[0],
        "tokens_per_s_with_stragglers": rates[1],
        "loss": 1 - rates[1] / rates[0],
        "long_share_of_samples": after["long"] / max(1, after["all"]),
        "long_trained": after["long_trained"] / max(1, after["long"]),
        "all_trained": after["all_trained"] / max(1, after["all"]),
        "staleness_max": after["staleness_max"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="math")
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument(
        "--schedule", action="append", choices=[s for s in SCHEDULES if s != "colocated"], help="default: bounded_mask, bounded"
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="JSON lines: append runs, and skip those that stand there")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        rows = []
        for schedule in options.schedule or [RECOMMENDED, "bounded"]:
            rows.append(run_pair(options.profile, schedule, options.iterations, recorded(options.results), options.results))
            row = rows[-1]
            if not options.json:
                print(
                    f"{schedule:<13} {row['split']} x{row['slots']}: ordinary tokens trained per s {row['tokens_per_s']:,.0f} -> "
                    f"{row['tokens_per_s_with_stragglers']:,.0f} ({-row['loss']:+.1%}); stragglers are {row['straggler_tokens_share']:.1%} of the "
                    f"tokens, so at most {row['straggler_tokens_share'] + GOAL:.1%} may be lost\n"
                    f"              long answers: {row['long_share_of_samples']:.2%} of the samples, {row['long_trained']:.0%} of them trained "
                    f"(of all samples {row['all_trained']:.0%}); staleness {row['staleness_max']:.0f}",
                    flush=True,
                )
    except UserError as error:
        print(f"rlsys: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
