"""`rlsys plan`: figures in, a recommendation out."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from protocol.errors import ConfigError
from rlsys.config import BUILTIN, RunConfig, load_config
from rlsys.planning.figures import Figures, configured_devices, from_simulated, read_figures
from rlsys.planning.limits import Split
from rlsys.planning.page import page
from rlsys.planning.plan import Machine, Plan, Prediction, advice, faults, gigabytes, make_plan, table
from rlsys.planning.room import Room, needed, read_model
from rlsys.prepare import check_builtin, check_plugins, prepare
from rlsys.rundir import choose_weights_dir


def plan(
    path: Path,
    overrides: Sequence[str],
    *,
    devices: int | None,
    figures_file: Path | None,
    measure: bool,
    write_figures: Path | None,
    device_memory_gb: float | None,
    html: Path | None,
    as_json: bool,
) -> int:
    """Print the plan; exit code 2 with reasons when the configuration cannot run."""
    if devices is not None and devices < 2:
        raise ConfigError(f"--devices {devices}: sampling and training need one each, so at least 2")
    if device_memory_gb is not None and not 0 < device_memory_gb < 1e6:
        raise ConfigError(f"--device-memory {device_memory_gb:g}: expected gigabytes of one device, such as 80")
    config = load_config(path, overrides)
    check_builtin(config)
    check_plugins(config)
    if devices is None and not math.fsum(configured_devices(config)).is_integer():
        generators, trainers = configured_devices(config)
        raise ConfigError(
            f"generators on {generators:g} devices and a learner on {trainers:g} are no whole number of devices: give --devices N, or whole "
            "ones in learner.step_options.devices and generators.options.device_shares"
        )
    figures, config = _figures(config, figures_file, measure, out=sys.stderr if as_json else sys.stdout)
    figures = _for_config(figures, config, devices, own_batch=figures_file is None)
    if write_figures is not None:
        import yaml

        _write(write_figures, yaml.safe_dump(figures.model_dump(mode="json", exclude_none=True), sort_keys=False))
    made = make_plan(figures, config.schedule, _configured(config))
    tokens = made.best.outcome.tokens / (made.best.outcome.iterations * figures.samples)
    model = None if str(config.model.path).startswith(BUILTIN) else read_model(config.model.path)
    room = needed(config, model, tokens, figures.prompt_tokens)
    taken = made.best.split if made.configured is None or devices is not None else made.configured.split
    wrong = faults(config, figures, taken, room, _machine(config, device_memory_gb))
    facts = _facts(room, config, known=model is not None)
    if html is not None:
        _write(html, page(made, f"Plan of {config.name}", facts))
    if as_json:
        print(json.dumps(_as_json(made, room, wrong), indent=1))
    else:
        _show(made, facts)
    for fault in wrong:
        print(f"rlsys: {path}: cannot run: {fault}", file=sys.stderr)
    return 2 if wrong else 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def _figures(config: RunConfig, file: Path | None, measure: bool, *, out: TextIO) -> tuple[Figures, RunConfig]:
    if file is not None and measure:
        raise ConfigError("--figures and --measure: give one of them")
    if file is not None:
        return read_figures(file), config
    if measure:
        from rlsys.planning.measure import measure_figures

        def say(text: str) -> None:
            print(text, file=out, flush=True)

        config = prepare(config, say).config
        return measure_figures(config, say), config
    return from_simulated(config), config


def _configured(config: RunConfig) -> Split:
    generators, trainers = configured_devices(config)
    return Split(generators=generators, trainers=trainers)


def _for_config(figures: Figures, config: RunConfig, devices: int | None, *, own_batch: bool) -> Figures:
    """The configuration decides about batch and slots; a file of figures about everything else."""
    changes: dict[str, Any] = {}
    if not own_batch:
        configured = _configured(config)
        changes = {
            "groups_per_iteration": config.sampling.groups_per_iteration,
            "group_size": config.sampling.group_size,
            "sampling": figures.sampling.model_copy(update={"slots": config.generators.slots}),
            "devices": round(configured.generators + configured.trainers),
            "lengths": figures.lengths.cut(config.sampling.max_tokens),
        }
    if devices is not None:
        changes["devices"] = devices
    return figures.model_copy(update=changes)


def _machine(config: RunConfig, device_memory_gb: float | None) -> Machine:
    on_cpu = config.generators.device == "cpu" and config.learner.device != "cuda"
    weights = choose_weights_dir(config, Path("runs").absolute(), "")
    existing = next(p for p in (weights, *weights.parents) if p.exists())
    return Machine(
        device=None if device_memory_gb is None else device_memory_gb * 1e9,
        host=float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) if on_cpu else None,
        weights=float(shutil.disk_usage(existing).free),
        disk=float(shutil.disk_usage(Path.cwd()).free),
    )


def _facts(room: Room, config: RunConfig, *, known: bool) -> list[str]:
    model = (
        [
            f"memory of a generator {gigabytes(room.generator)}, of a learner rank {gigabytes(room.learner)}",
            f"three published versions {gigabytes(room.weights)} (tmpfs if it has room), checkpoints {gigabytes(room.checkpoints)}",
        ]
        if known
        else ["memory is not known: the model is a built-in one or does not describe its layers"]
    )
    return [*model, f"journal of {config.iterations} iterations {gigabytes(room.journal)}"]


def _show(made: Plan, facts: list[str]) -> None:
    best, figures = made.best, made.figures
    print(
        f"take        {best.split.generators:g} generators and {best.split.trainers:g} learner devices: {best.s_per_iteration:.4g} s per iteration "
        f"of {figures.samples} samples, {best.outcome.tokens / best.outcome.published[-1]:,.0f} trained tokens/s over the whole run"
    )
    if made.configured is not None and made.configured.split != best.split:
        print(f"configured  {made.configured.split}: {made.configured.s_per_iteration:.4g} s")
    print(f"learner     {_shares(best.outcome.learner_shares())}")
    print(f"generators  {_shares(best.outcome.generator_shares())}; {best.outcome.sampling_share():.0%} of the rate that full slots give")
    print(f"fluid limit {made.fluid_s:.4g} s ({made.fluid_s / best.s_per_iteration:.0%} reached); ", end="")
    print(f"colocated synchronous {made.colocated.s_per_iteration:.4g} s ({made.colocated.s_per_iteration / best.s_per_iteration:.2f}x)")
    print("\n".join(["compared", *table([*made.candidates, *made.others])]))
    for fact in facts:
        print(f"needs       {fact}")
    for word in advice(made):
        print(f"advice      {word}")


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda item: -item[1]))


def _as_json(made: Plan, room: Room, wrong: list[str]) -> dict[str, Any]:
    def row(p: Prediction) -> dict[str, Any]:
        return {
            "schedule": p.schedule.name,
            "max_staleness": p.schedule.bound,
            "generators": p.split.generators,
            "trainers": p.split.trainers,
            "s_per_iteration": p.s_per_iteration,
            "limit_s": p.limit.seconds,
            "limited_by": p.limit.bound,
            "learner": p.outcome.learner_shares(),
            "generator": p.outcome.generator_shares(),
            "generator_rate_share": p.outcome.sampling_share(),
            "staleness_max": p.outcome.staleness_max,
            "groups_dropped": p.outcome.dropped,
        }

    return {
        "figures": made.figures.model_dump(mode="json", exclude_none=True),
        "best": row(made.best),
        "configured": row(made.configured) if made.configured else None,
        "candidates": [row(p) for p in made.candidates],
        "others": [row(p) for p in made.others],
        "colocated_s": made.colocated.s_per_iteration,
        "fluid_s": made.fluid_s,
        "room_bytes": asdict(room),
        "cannot_run": wrong,
        "advice": advice(made),
    }
