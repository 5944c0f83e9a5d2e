"""The sections that metrics are shown in, in the order in which they are read. What each name means stands in docs/metrics.md."""

from __future__ import annotations

SECTIONS = (
    ("1_learning", ("reward", "eval")),
    ("2_optimisation", ("train",)),
    ("3_data", ("data",)),
    ("4_staleness", ("staleness",)),
    ("5_throughput", ("throughput", "queues")),
    ("6_idle", ("idle", "busy")),
    ("7_sandbox", ("sandbox", "verdict")),
    ("8_engine", ("engine", "weights")),
    ("9_processes", ("memory", "cpu")),
)
"""Section -> what its metrics' names begin with."""
OTHER = "z_more"

_SECTION_OF = {prefix: section for section, prefixes in SECTIONS for prefix in prefixes}

BEST_CURVES = (
    (
        "1 learning",
        (("Reward and pass@1", ("reward/mean", "reward/pass_rate", "eval/pass_at_1")),),
    ),
    (
        "2 optimisation",
        (
            ("Entropy", ("train/entropy",)),
            ("Ratio", ("train/ratio_mean", "train/ratio_max", "train/ratio_min")),
            ("Gradient norm", ("train/grad_norm",)),
            ("Drift between sampler and trainer (nats)", ("train/logprob_drift", "train/logprob_drift_max")),
        ),
    ),
    (
        "3 data",
        (
            ("Completion length (tokens)", ("data/completion_tokens_mean", "data/completion_tokens_max")),
            ("Truncated share", ("data/truncated_share",)),
            (
                "Groups",
                ("data/groups_trained", "data/groups_filtered", "data/groups_failed", "data/groups_rejected", "data/groups_dropped"),
            ),
        ),
    ),
    ("4 staleness", (("Staleness (versions)", ("staleness/mean", "staleness/max")),)),
    (
        "5 throughput",
        (
            ("Tokens per second", ("throughput/sampled_tokens_per_s", "throughput/trained_tokens_per_s")),
            ("Samples that wait", ("queues/samples_waiting", "queues/completions_unscored", "queues/completions_unacknowledged")),
        ),
    ),
    ("6 idle", (("Idle share", ("idle/generator", "idle/rewarder", "idle/learner")),)),
)
"""Pages of TensorBoard's custom scalars: (category, ((chart, names), ...))."""


def section(name: str) -> str:
    """The section of a metric: "reward/mean" -> "1_learning"."""
    return _SECTION_OF.get(name.partition("/")[0], OTHER)


def tag(name: str) -> str:
    """The name under which TensorBoard shows a metric: "1_learning/reward/mean"."""
    return f"{section(name)}/{name}"


def exposed(name: str) -> str:
    """The name under which Prometheus scrapes a metric: "rlsys_reward_mean"."""
    return "rlsys_" + "".join(c if c.isalnum() else "_" for c in name)
