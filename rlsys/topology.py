"""Which processes a run consists of, and what would run where. Pure."""

from __future__ import annotations

from typing import Any

from rlsys.config import RunConfig
from rlsys.schedules import describe_schedule
from rlsys.stages import describe_stages


def processes(config: RunConfig) -> list[tuple[str, int]]:
    """(role, index) of every process besides the supervisor, in the order of their start: the slow ones first."""
    fleet = [("learner", i) for i in range(config.learner.ranks)]
    fleet += [("generator", i) for i in range(config.generators.count)]
    fleet += [("rewarder", i) for i in range(config.rewarders.count)]
    return [*fleet, ("dispatcher", 0), ("dashboard", 0)]


def repeatable(config: RunConfig) -> bool:
    """Whether two runs of this configuration and seed on the CPU of one machine give the same tokens, rewards and weights, bit by bit.

    That takes no overlap, so that it is fixed what is sampled with which weights, one actor of each kind, and a reward that says the same twice.
    """
    generators = config.generators
    alone = (generators.count, config.rewarders.count) == (1, 1)
    return alone and (generators.engine, generators.device) == ("embedded", "cpu") and config.schedule.name == "synchronous"


def engine_options(config: RunConfig) -> dict[str, Any]:
    """The engine's own options; a repeatable run asks the embedded engine for samples that do not depend on their neighbours."""
    return ({"batch_invariant": True} if repeatable(config) else {}) | config.generators.options


def describe(config: RunConfig) -> list[str]:
    """The run in a few lines, for `rlsys check`."""
    s, g, w, lr = config.sampling, config.generators, config.rewarders, config.learner
    samples = s.groups_per_iteration * s.group_size
    evaluation = "no held-out problems"
    if config.data.eval is not None:
        when = [word for word, on in (("at the start", config.evaluation.at_start), ("at the end", config.evaluation.at_end)) if on]
        when += [f"every {config.evaluation.every} iterations"] if config.evaluation.every else []
        evaluation = f"{config.data.eval}, {config.evaluation.samples} samples each, {' and '.join(when) or 'never'}"
    invariant = ", batch-invariant" if engine_options(config).get("batch_invariant") else ""
    notes = []
    if lr.kl.coefficient and lr.kl.estimator == "k1":
        notes.append("note        learner.kl.estimator k1 has a gradient of 0 on average, so it holds nothing back; k2 and k3 do")
    return [
        f"run         {config.name}: {config.iterations} iterations of {s.groups_per_iteration} groups x {s.group_size} = {samples} samples",
        f"schedule    {describe_schedule(config)}",
        *describe_stages(config),
        f"model       {config.model.path}",
        f"train       {config.data.train}",
        f"evaluate    {evaluation}",
        f"generators  {g.count} x {g.engine} on {g.device}, {g.slots} slots, {g.threads} thread(s), {g.dtype}{invariant}",
        f"rewarders   {w.count} x {w.reward}, {w.concurrency} at once",
        f"learner     {lr.ranks} rank(s) on {lr.device}, {lr.threads} thread(s), {lr.dtype}, {lr.objective}, {lr.advantage}, lr {lr.optimizer.lr:g}",
        f"processes   {len(processes(config)) + 1} with the supervisor, over {config.transport.kind}",
        *notes,
    ]
