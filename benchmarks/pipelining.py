"""How much of what the devices allow the real processes reach, under every schedule: a simulated fleet, everything else production code.

    python -m benchmarks.pipelining [--profile NAME|FILE]... [--schedule NAME]... [--devices 8] [--json] [--results FILE]

A profile (benchmarks/profiles/) says how fast a device samples and trains and how long answers and rewards are. For each schedule a
simulation by events (`rlsys/planning`) picks the split and the slots; then the real processes run that split with simulated devices, faster
by a factor that gives an iteration some seconds of real time. Printed in simulated seconds per iteration, over the steady iterations:

    measured        real processes: dispatcher, generators, reward actors, channels, journal, batcher, ledger, publisher
    of the limit    max(sampling work / generators, training work / learners, scoring, (latency + reward + train) / (S + 1)), from the lengths drawn
    of the model    the simulation by events of the same run, which knows about tails; the tighter of the two is what can be reached
    of the fluid    (sampling + training work) / devices: not reachable by a split into whole devices that do not divide the work evenly
    colocated       all devices sample (rewards beside it), switch, all train, switch back

Time runs faster by a factor, so every process handles that factor more messages per second than it would beside devices. Tokens are counted in
units of TOKENS (lengths and rates alike, which changes no time), so that the bytes per second stay below that factor; even so they are two to
three times those of the profile.

With --results each run is appended to a JSON lines file, and what stands there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.settings import ScheduleSettings
from protocol.errors import ConfigError, UserError
from rlsys.config import RunConfig
from rlsys.planning.figures import Figures, read_figures
from rlsys.planning.limits import Split, best_split_share, colocated_limit_s, drawn_load, fluid_limit_s, schedule_limit
from rlsys.planning.simulate import Outcome, simulate, simulate_colocated, steady
from rlsys.prepare import prepare
from rlsys.report import read_iterations, summarise
from rlsys.rundir import RunDir
from rlsys.supervisor import Supervisor
from rlsys.usage import read_rows, usage

PROFILES = Path(__file__).parent / "profiles"
COLOCATED = "colocated"
SCHEDULES: dict[str, dict[str, Any]] = {
    COLOCATED: {"name": "synchronous"},
    "synchronous": {"name": "synchronous"},
    "minibatch": {"name": "minibatch"},
    "one_off": {"name": "one_off"},
    "bounded": {"name": "bounded"},
    "bounded_mask": {"name": "bounded", "stragglers": "mask"},
    "bounded_drop": {"name": "bounded", "stragglers": "drop"},
}
"""Name in the table -> settings of the schedule; all else is the default (bounded: S = 2)."""
COMPARED = (COLOCATED, "synchronous", "minibatch", "one_off", "bounded")
"""Run when no schedule is named."""
ITERATIONS = 13
SLOTS = (32, 64, 128, 256)
TOKENS = 10
"""Tokens of the profile that one token of the run stands for."""
SAMPLE_S = 0.008
"""Real seconds that a sample is given: several times what all processes together need for it, so that they are not what is measured."""
SHORTEST_S = 5.0
"""Real seconds of an iteration at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One run: a profile, a schedule, a split, slots."""

    profile: str
    schedule: str
    generators: float
    trainers: float
    slots: int
    iterations: int
    predicted_s: float

    @property
    def key(self) -> str:
        """What makes it the same run."""
        return f"{self.profile}/{self.schedule}/{self.generators:g}+{self.trainers:g}/{self.slots}/{self.iterations}"


def settings(schedule: str) -> ScheduleSettings:
    """The schedule as it is configured."""
    return ScheduleSettings.model_validate(SCHEDULES[schedule])


def in_units(figures: Figures, unit: int) -> Figures:
    """The same profile with tokens counted in units: every time stays as it is, up to the rounding of a length."""
    lengths, sampling = figures.lengths, figures.sampling
    if lengths.mean is None:
        return figures
    return figures.model_copy(
        update={
            "lengths": lengths.model_copy(
                update={
                    "mean": (lengths.mean or 0.0) / unit,
                    "cap": None if lengths.cap is None else lengths.cap // unit,
                    "straggler_tokens": None if lengths.straggler_tokens is None else lengths.straggler_tokens // unit,
                }
            ),
            "sampling": sampling.model_copy(
                update={"tokens_per_s_sample": sampling.tokens_per_s_sample / unit, "tokens_per_s": sampling.tokens_per_s / unit}
            ),
            "training": figures.training.model_copy(update={"tokens_per_s": figures.training.tokens_per_s / unit}),
        }
    )


def with_slots(figures: Figures, slots: int) -> Figures:
    return figures.model_copy(update={"sampling": figures.sampling.model_copy(update={"slots": slots})})


def model(figures: Figures, schedule: str, split: Split, iterations: int) -> Outcome:
    """The simulation by events of one schedule."""
    if schedule == COLOCATED:
        return simulate_colocated(figures, iterations=iterations)
    return simulate(figures, split, settings(schedule), iterations=iterations)


def splits(figures: Figures, schedule: str, *, shared: bool) -> list[Split]:
    """Every split into whole devices; `shared` adds those with one device that both fleets share."""
    if schedule == COLOCATED:
        return [Split(generators=figures.devices, trainers=figures.devices)]
    step = 0.5 if shared else 1.0
    count = round((figures.devices - 1) / step)
    found = [Split(generators=1 + i * step, trainers=figures.devices - 1 - i * step) for i in range(count)]
    return [s for s in found if s.trainers > 0 and (s.generators % 1 == 0 or s.trainers > 0.5)]


def choose(figures: Figures, schedule: str, *, shared: bool = False, iterations: int = ITERATIONS) -> Setting:
    """The split and the slots with which the model is fastest. Splits that the limit already rules out are not simulated.

    More slots must be worth 1 %: with fewer, long answers run faster and end earlier.
    """
    load = drawn_load(figures, 0, 0, 3)
    best: tuple[float, Split, int] | None = None
    candidates = splits(figures, schedule, shared=shared)
    if schedule != COLOCATED:
        candidates = sorted(candidates, key=lambda s: schedule_limit(figures, load, s, settings(schedule).bound).seconds)[:4]
    for split in candidates:
        for slots in SLOTS:
            found = model(with_slots(figures, slots), schedule, split, iterations).s_per_iteration
            if best is None or found < best[0] * (0.999 if slots == SLOTS[0] else 0.99):
                best = found, split, slots
    assert best is not None
    return Setting(
        profile=figures.name,
        schedule=schedule,
        generators=best[1].generators,
        trainers=best[1].trainers,
        slots=best[2],
        iterations=iterations,
        predicted_s=best[0],
    )


def configuration(figures: Figures, setting: Setting, speed: float) -> RunConfig:
    """The real run of a setting."""
    whole = math.floor(setting.generators + 1e-9)
    count = math.ceil(setting.generators - 1e-9)
    longest = figures.lengths.straggler_tokens or 0
    cap = max(figures.lengths.cap or 1 << 19, longest)
    sampling = figures.sampling
    engine: dict[str, Any] = {
        "tokens_per_s_sample": sampling.tokens_per_s_sample,
        "tokens_per_s": sampling.tokens_per_s,
        "update_s": sampling.update_s,
        "lengths": figures.lengths.model_dump(mode="json", exclude_none=True),
        "speed": speed,
    }
    if count > whole:
        engine["device_shares"] = [1.0] * whole + [setting.generators - whole]
    switching = 2 * figures.switch_s if setting.schedule == COLOCATED else 0.0
    actors = min(4, max(1, figures.reward.sandboxes // 32))
    return RunConfig.model_validate(
        {
            "name": "pipelining",
            "iterations": setting.iterations,
            "model": {"path": "builtin:simulated"},
            "data": {"train": "builtin:simulated"},
            "sampling": {"groups_per_iteration": figures.groups_per_iteration, "group_size": figures.group_size, "max_tokens": cap},
            "schedule": SCHEDULES[setting.schedule],
            "evaluation": {"at_start": False, "at_end": False},
            "generators": {"count": count, "slots": setting.slots, "engine": "simulated", "options": engine},
            "rewarders": {
                "count": actors if figures.reward.seconds else 1,
                "concurrency": max(1, figures.reward.sandboxes // actors) if figures.reward.seconds else 4,
                "reward": "simulated",
                "options": {"seconds": figures.reward.seconds, "speed": speed},
            },
            "learner": {
                "step": "simulated",
                "step_options": {
                    "tokens_per_s": figures.training.tokens_per_s,
                    "devices": setting.trainers,
                    "fixed_s": figures.training.fixed_s + switching,
                    "publish_s": figures.training.publish_s,
                    "speed": speed,
                },
                "zero_variance": "keep",
                "overlong": "keep",
            },
        }
    )


def idle(run_dir: Path, window: tuple[float, float]) -> dict[str, dict[str, float]]:
    """Share of the window by what each fleet did; the shares of a fleet sum to 1."""
    found: dict[str, dict[str, float]] = {}
    for role in ("generator", "learner"):
        names = sorted({path.stem.partition("+")[0] for path in (run_dir / "events").glob(f"{role}-*.jsonl")})
        total: dict[str, float] = {}
        for name in names:
            used = usage(read_rows(run_dir, name), *window)
            for cause, seconds in {**used.work_s, **used.idle_s}.items():
                total[cause] = total.get(cause, 0.0) + seconds / used.wall_s / len(names)
        found[role] = {cause: share for cause, share in sorted(total.items(), key=lambda item: -item[1]) if share > 5e-4}
    return found


def measure(
    figures: Figures, setting: Setting, *, look: Callable[[Path], dict[str, Any]] | None = None, real_s: float = SHORTEST_S
) -> dict[str, Any]:
    """Run the real processes; figures in simulated seconds, and what `look` finds in the run directory before it is removed."""
    target_s = max(real_s, SAMPLE_S * figures.samples + 0.02 * setting.generators)
    speed = setting.predicted_s / target_s
    config = prepare(configuration(figures, setting, speed), lambda _: None).config
    directory = Path(tempfile.mkdtemp(prefix="rlsys-pipelining-"))
    try:
        run_dir = RunDir(directory / "run")
        run_dir.claim(config)
        ending = Supervisor(config, run_dir).run()
        if ending.outcome != "done":
            raise ConfigError(f"{setting.key}: the run {ending.outcome}: {ending.reason}")
        records = read_iterations(run_dir.path)
        first, last = steady(setting.iterations, settings(setting.schedule).bound)
        ends = [0.0, *(record["time_s"] for record in records)]
        summary = summarise(run_dir.path)
        return {
            "speed": speed,
            "measured_s": (ends[last] - ends[first]) / (last - first) * speed,
            "real_s": (ends[last] - ends[first]) / (last - first),
            "cpu_s": summary.get("cpu_s_per_iteration"),
            "staleness_max": summary["staleness_max"],
            "groups": {
                state: sum(r.get(f"data/groups_{state}", 0.0) or 0.0 for r in records)
                for state in ("trained", "dropped", "rejected", "superseded")
            },
            "idle": idle(run_dir.path, (ends[first], ends[last])),
            **(look(run_dir.path) if look is not None else {}),
        }
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def report(figures: Figures, setting: Setting, measured: dict[str, Any]) -> dict[str, Any]:
    """The measured run beside its limits, from the lengths that its own iterations drew."""
    bound = settings(setting.schedule).bound
    first, last = steady(setting.iterations, bound)
    load = drawn_load(figures, 0, first, last)
    if setting.schedule == COLOCATED:
        limit, by = colocated_limit_s(figures, load), "all in turn"
    else:
        parts = settings(setting.schedule).parts
        found = schedule_limit(figures, load, Split(generators=setting.generators, trainers=setting.trainers), bound, parts)
        limit, by = found.seconds, found.bound
    tightest = max(limit, setting.predicted_s)
    seconds = measured["measured_s"]
    return {
        **asdict(setting),
        **measured,
        "limit_s": limit,
        "limited_by": by,
        "fluid_s": fluid_limit_s(figures, load),
        "of_limit": limit / seconds,
        "of_model": setting.predicted_s / seconds,
        "of_tightest": tightest / seconds,
        "of_fluid": fluid_limit_s(figures, load) / seconds,
        "best_whole_split": best_split_share(figures, load),
        "prediction_error": setting.predicted_s / seconds - 1,
    }


def line(row: dict[str, Any], colocated_s: float | None) -> str:
    """One row for people."""
    speed_up = f"{colocated_s / row['measured_s']:.2f}x" if colocated_s else "-"
    causes = {role: ", ".join(f"{c} {s:.0%}" for c, s in row["idle"][role].items()) for role in ("generator", "learner")}
    return (
        f"{row['schedule']:<12} {row['generators']:g}+{row['trainers']:g} x{row['slots']:<4} {row['measured_s']:7.1f} s  limit {row['limit_s']:6.1f} "
        f"({row['of_limit']:.1%})  model {row['predicted_s']:6.1f} ({row['of_model']:.1%})  fluid {row['fluid_s']:6.1f} ({row['of_fluid']:.1%})  "
        f"speed-up {speed_up}  staleness {row['staleness_max']:.0f}  real {row['real_s']:.1f} s, {row['cpu_s']:.2f} CPU-s\n"
        f"             generators: {causes['generator']}\n             learner: {causes['learner']}"
    )


def profile(name: str, devices: int | None) -> Figures:
    """A profile by name or file."""
    path = Path(name) if name.endswith(".yaml") else PROFILES / f"{name}.yaml"
    figures = in_units(read_figures(path), TOKENS)
    return figures if devices is None else figures.model_copy(update={"devices": devices, "name": f"{figures.name}-{devices}"})


def recorded(path: Path | None) -> dict[str, dict[str, Any]]:
    """Rows of earlier calls by key."""
    if path is None or not path.is_file():
        return {}
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    return {row["key"]: row for row in rows}


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every profile under every schedule."""
    rows, known = [], recorded(options.results)
    stop_s = time.monotonic() + options.minutes * 60 if options.minutes else math.inf
    names = options.profile or sorted((path.stem for path in PROFILES.glob("*.yaml")), key=lambda n: (n not in ("math", "code"), n))
    for name in names:
        figures = profile(name, options.devices)
        colocated_s: float | None = None
        if not options.json:
            print(f"\n{figures.name}: {figures.devices} devices, {figures.samples} samples an iteration", flush=True)
        for schedule in options.schedule or COMPARED:
            setting = choose(figures, schedule, shared=options.shared)
            row = known.get(setting.key)
            if row is None:
                if time.monotonic() > stop_s:
                    continue
                measured = measure(with_slots(figures, setting.slots), setting, real_s=options.real_seconds)
                row = {"key": setting.key, **report(with_slots(figures, setting.slots), setting, measured)}
                if options.results is not None:
                    with options.results.open("a") as file:
                        file.write(json.dumps(row) + "\n")
            if schedule == COLOCATED:
                colocated_s = row["measured_s"]
            rows.append(row)
            if not options.json:
                print(line(row, colocated_s), flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="append", metavar="NAME", help="of benchmarks/profiles, or a YAML file (default: all)")
    parser.add_argument("--schedule", action="append", choices=list(SCHEDULES), help=f"default: {', '.join(COMPARED)}")
    parser.add_argument("--devices", type=int, help="other than the profile's")
    parser.add_argument("--shared", action="store_true", help="also splits in which one device is shared by both fleets")
    parser.add_argument("--results", type=Path, metavar="FILE", help="JSON lines: append runs, and skip those that stand there")
    parser.add_argument(
        "--real-seconds", type=float, default=SHORTEST_S, metavar="S", help=f"of an iteration at least (default {SHORTEST_S:g})"
    )
    parser.add_argument("--minutes", type=float, help="begin no further run after so long")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        rows = run_all(options)
    except UserError as error:
        print(f"rlsys: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
