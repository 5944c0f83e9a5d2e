"""A schedule's two rules from the configuration: when groups are issued (actors/pacing.py) and which make a batch (learner/line.py)."""

from __future__ import annotations

from actors.pacing import PacingRule
from actors.settings import ScheduleSettings
from learner.line import BatchRule
from rlsys.config import RunConfig

REFILL_ROUNDS = 4


def pacing_rule(config: RunConfig) -> PacingRule:
    """What the dispatcher issues by."""
    return rules(config.schedule, config.iterations, config.sampling.groups_per_iteration)[0]


def batch_rule(config: RunConfig) -> BatchRule:
    """What the learner closes batches by."""
    groups, learner = config.sampling.groups_per_iteration, config.learner
    rounds = (learner.refill_rounds or REFILL_ROUNDS) if learner.zero_variance == "refill" else 0
    return rules(config.schedule, config.iterations, groups, refills=rounds * groups)[1]


def rules(schedule: ScheduleSettings, iterations: int, groups: int, refills: int = 0) -> tuple[PacingRule, BatchRule]:
    """Both rules of a schedule: the run's, and those that its plan is simulated with (rlsys/planning)."""
    pacing = PacingRule(
        iterations=iterations,
        groups_per_iteration=groups,
        max_staleness=schedule.bound,
        reorder=schedule.overtaking,
        over_issue=schedule.over_issue,
    )
    batching = BatchRule(
        iterations=iterations,
        groups_per_iteration=groups,
        max_staleness=schedule.bound,
        stragglers=schedule.stragglers,
        may_lag=schedule.may_lag(groups),
        over_issue=schedule.over_issue,
        reorder=schedule.overtaking,
        parts=schedule.parts,
        refills=refills,
    )
    return pacing, batching


def describe_schedule(config: RunConfig) -> str:
    """The schedule in a line, for `rlsys check`."""
    rule = batch_rule(config)
    words = [f"{config.schedule.name}: staleness at most {rule.max_staleness}"]
    if rule.parts > 1:
        words.append(f"{rule.parts} optimizer steps per iteration, on groups as they come")
    if rule.stragglers != "wait":
        words.append(f"a batch closes without at most {rule.may_lag} late groups ({rule.stragglers})")
    elif rule.reorder:
        words.append(f"a late group is overtaken by at most {rule.reorder} others")
    if rule.over_issue:
        words.append(f"{rule.over_issue} groups beyond what is needed")
    if rule.refills:
        words.append(f"filtered groups are replaced, at most {rule.refills} per iteration")
    return "; ".join(words)
