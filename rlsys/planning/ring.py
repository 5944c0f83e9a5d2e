"""What a sample costs besides sampling, scoring and training it: CPU time of a short run of all processes in which these three only wait.

Heartbeats, observations and polls go by the clock, messages by the sample; so an iteration is made to take about as long as it is expected to.
"""

from __future__ import annotations

from typing import Any

from protocol.errors import ConfigError
from protocol.holds import Hold
from rlsys.config import RunConfig
from rlsys.planning.figures import Figures
from rlsys.planning.limits import Split
from rlsys.planning.simulate import Simulation
from rlsys.prepare import prepare
from rlsys.report import summarise
from rlsys.rundir import RunDir
from rlsys.supervisor import Supervisor

ITERATIONS = 12
LONGEST_S = 1.5
"""Seconds of an iteration at most, so that the run ends in time; by then what goes by the sample is most of it, or nothing is much."""


def waiting_run(config: RunConfig, figures: Figures, iteration_s: float) -> RunConfig:
    """The run with everything simulated: the same actors, batch and schedule, an iteration of about `iteration_s`."""
    split = Split(generators=config.generators.count, trainers=config.learner.ranks)
    alone_s = Simulation(figures, split, config.schedule, iterations=8 * (config.schedule.bound + 1)).run().s_per_iteration
    speed = alone_s / iteration_s
    sampling, training = figures.sampling, figures.training
    settings: dict[str, Any] = {
        "name": "ring",
        "iterations": max(ITERATIONS, 4 * (config.schedule.bound + 1)),
        "model": {"path": "builtin:simulated"},
        "data": {"train": "builtin:simulated"},
        "sampling": {
            "groups_per_iteration": figures.groups_per_iteration,
            "group_size": figures.group_size,
            "max_tokens": config.sampling.max_tokens,
        },
        "schedule": config.schedule.model_dump(),
        "evaluation": {"at_start": False, "at_end": False},
        "generators": {
            "count": config.generators.count,
            "slots": config.generators.slots,
            "engine": "simulated",
            "options": {
                "tokens_per_s_sample": min(sampling.tokens_per_s_sample, sampling.tokens_per_s),
                "tokens_per_s": sampling.tokens_per_s,
                "update_s": sampling.update_s,
                "lengths": figures.lengths.model_dump(mode="json", exclude_none=True),
                "speed": speed,
            },
        },
        "rewarders": {
            "count": config.rewarders.count,
            "concurrency": config.rewarders.concurrency,
            "reward": "simulated",
            "options": {"seconds": figures.reward.seconds, "speed": speed},
        },
        "learner": {
            "ranks": config.learner.ranks,
            "step": "simulated",
            "step_options": {
                "tokens_per_s": training.tokens_per_s / training.trained_share,
                "fixed_s": training.fixed_s,
                "publish_s": training.publish_s,
                "speed": speed,
            },
            "zero_variance": "keep",
            "overlong": "keep",
        },
    }
    return RunConfig.model_validate(settings)


def ring_cpu_s(config: RunConfig, figures: Figures, expected_s: float) -> float:
    """CPU-seconds of a sample in all processes together. Raises ConfigError when the run does not reach its end.

    `expected_s` is how long an iteration is expected to take.
    """
    run = prepare(waiting_run(config, figures, min(expected_s, LONGEST_S)), lambda _: None).config
    with Hold.of_new("rlsys-plan-") as directory:
        run_dir = RunDir(directory / "run")
        run_dir.claim(run)
        try:
            ending = Supervisor(run, run_dir).run()
        finally:
            run_dir.release()
        if ending.outcome == "interrupted":
            raise KeyboardInterrupt
        if ending.outcome != "done":
            raise ConfigError(f"--measure: a run in which all parts only wait {ending.outcome}: {ending.reason}")
        seconds: float = summarise(run_dir.path)["cpu_s_per_iteration"]
    return seconds / figures.samples
