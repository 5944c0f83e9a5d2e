"""A run's stages from the configuration, as the dispatcher and as the learner need them."""

from __future__ import annotations

from actors.stages import StageFilters, StagePlan
from learner.stages import StageRule
from rlsys.config import RunConfig

OVER = 10
"""Iterations over which a condition looks back if it is not said."""


def stage_plans(config: RunConfig) -> tuple[StagePlan, ...]:
    """What the dispatcher issues in each stage."""
    sampling = config.sampling
    if not config.stages:
        return (StagePlan(name="0", train=config.data.train, max_tokens=sampling.max_tokens, temperature=sampling.temperature),)
    plans = []
    for i, stage in enumerate(config.stages):
        solved = stage.filters.solved_at_most
        plans.append(
            StagePlan(
                name=stage.name or str(i),
                train=stage.train or config.data.train,
                max_tokens=stage.max_tokens or sampling.max_tokens,
                temperature=sampling.temperature if stage.temperature is None else stage.temperature,
                filters=StageFilters(drop_solved=stage.filters.drop_solved, solved_at_most=(solved.times, solved.of) if solved else None),
            )
        )
    return tuple(plans)


def stage_rules(config: RunConfig) -> tuple[StageRule, ...]:
    """When each stage ends, and its learning rate."""
    lr = config.learner.optimizer.lr
    if not config.stages:
        return (StageRule(lr=lr),)
    rules = []
    for stage in config.stages:
        until = stage.until
        rules.append(
            StageRule(
                lr=stage.lr or lr,
                iteration=until.iteration if until else None,
                reward=until.reward if until else None,
                truncated=until.truncated if until else None,
                over=(until.over or OVER) if until else OVER,
            )
        )
    return tuple(rules)


def describe_stages(config: RunConfig) -> list[str]:
    """A line for each stage, for `rlsys check`; none for a run of one."""
    lines = []
    for rule, plan in zip(stage_rules(config), stage_plans(config), strict=True):
        ends = [f"iteration {rule.iteration}"] if rule.iteration is not None else []
        ends += [f"reward {rule.reward:g} over {rule.over} iterations"] if rule.reward is not None else []
        ends += [f"{rule.truncated:.0%} cut off over {rule.over} iterations"] if rule.truncated is not None else []
        words = [f"until {' or '.join(ends)}" if ends else "to the end", f"{plan.max_tokens} tokens", f"temperature {plan.temperature:g}"]
        words += [f"lr {rule.lr:g}", str(plan.train)]
        if plan.filters.drop_solved:
            words.append("without what the stage before always solved")
        if plan.filters.solved_at_most:
            words.append("solved at most {} of {} times".format(*plan.filters.solved_at_most))
        lines.append(f"stage       {plan.name}: {', '.join(words)}")
    return lines if config.stages else []
