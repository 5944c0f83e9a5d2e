"""The configuration of a run: YAML in, a checked and frozen `RunConfig` out. Imports no heavy library.

Every key stands beside its owner: actors/settings.py, learner/settings.py, and the few of the whole run here.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from actors.settings import (
    DataSettings,
    EvaluationSettings,
    GeneratorSettings,
    Positive,
    RewarderSettings,
    SamplingSettings,
    ScheduleSettings,
    StageSettings,
)
from learner.advantages import DRAWN
from learner.settings import LearnerSettings
from protocol.errors import ConfigError
from protocol.settings import Settings
from rlsys.guards import GuardSettings
from rlsys.restarts import RestartSettings

BUILTIN = "builtin:"
"""Prefix of models and datasets that rlsys makes itself on first use."""


class ModelSettings(Settings):
    """The policy to train."""

    path: Path = Field(description="a Hugging Face directory, or builtin:quickstart, or builtin:simulated")
    max_context: Positive | None = Field(None, description="most tokens of prompt and completion; default: the model's own limit")


class WeightsSettings(Settings):
    """Published versions."""

    directory: Path | None = Field(
        None, description="where versions are written; default: memory (/dev/shm) if it has room, else the run directory"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the published tensors and the final model")
    transfer: Literal["auto", "directory", "network"] = Field(
        "auto",
        description="how generators get versions: as files of a directory that they see, or over the network into a cache of their host; "
        "auto: over the network where they do not see the directory",
    )
    cache: Path | None = Field(
        None,
        description="where a host keeps what came over the network; default: memory (/dev/shm) if it has room, else a temporary directory",
    )


class TransportSettings(Settings):
    """How processes of a run reach each other."""

    kind: Literal["ipc", "tcp"] = Field(
        "ipc", description="ipc: files in a private directory; tcp: free ports, encrypted and authenticated by the run's key"
    )
    host: str = Field("127.0.0.1", description="address that tcp sockets are bound to")


class RaySettings(Settings):
    """What one process of each role takes of a Ray cluster, beside or instead of what its own settings say (`up --launcher ray`)."""

    learner: dict[str, float] = Field(default_factory=dict, description="such as {CPU: 4, GPU: 1}; default: threads, and a GPU on cuda")
    generator: dict[str, float] = Field(default_factory=dict, description="default: threads, and a GPU on cuda")
    rewarder: dict[str, float] = Field(default_factory=dict, description="default: a CPU for each of `concurrency`")


class DeadlineSettings(Settings):
    """What may take how long before the run ends with a sentence that says who waited for whom. Seconds."""

    startup_s: float = Field(300.0, gt=0, description="from the start of a process to its first sign of life")
    heartbeat_s: float = Field(30.0, gt=0, description="silence after which a process counts as hung and is replaced")
    busy_s: float = Field(
        3600.0,
        gt=0,
        description="longest time at one piece of work without any result, after which a process counts as hung and is replaced",
    )
    silent_s: float = Field(5.0, gt=0, description="silence, without using the processor, after which `rlsys why` blames a process")
    quiet_s: float = Field(30.0, gt=0, description="time without any movement after which the run says by itself who waits for whom")
    stall_s: float = Field(900.0, gt=0, description="time in which nothing in the whole ring moves and the learner computes nothing")
    leave_s: float = Field(
        300.0, gt=0, description="from the order to leave (`rlsys scale`) until a process is ended with what it has, which is issued again"
    )
    shutdown_s: float = Field(8.0, gt=0, description="from the stop to the end of the last process")


class ObserveSettings(Settings):
    """What a run records about itself. All of it on costs less than 2 % of the quickstart's time."""

    intervals: bool = Field(True, description="who did what when, for the timeline; rates and queues are recorded in any case")
    loggers: tuple[str, ...] = Field(("tensorboard",), description="tensorboard, wandb, trackio, mlflow, or package.module:Class")
    histograms: bool = Field(True, description="of lengths, rewards, ratios and staleness, each iteration")
    samples_every: int = Field(10, ge=0, description="iterations between samples that are shown as text; 0 never")
    samples: Positive = Field(4, description="how many samples are shown then")
    prometheus: bool = Field(False, description="serve the newest numbers for Prometheus on a free port of 127.0.0.1")
    log_mb: float = Field(64.0, gt=0, description="size of a log file before it is moved aside; one older one is kept")


class JournalSettings(Settings):
    """The record of every trajectory and batch, which restarts and `rlsys replay` read."""

    keep: Literal["all"] | Annotated[float, Field(gt=0)] = Field(
        "all", description="all, or so many GB: older records go once no kept checkpoint needs them, and replay starts later"
    )


class RunConfig(Settings):
    """Everything about one run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]{1,60}$", description="part of the run directory's name")
    seed: int = Field(0, ge=0, description="of sampling and of the order of problems")
    iterations: Positive = Field(description="batches to train on; each publishes one version")
    model: ModelSettings = Field(description="the policy to train")
    data: DataSettings = Field(description="the problems")
    sampling: SamplingSettings = Field(description="how completions are drawn, and how many")
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings, description="how far sampling may run ahead of training")
    stages: list[StageSettings] = Field(default_factory=list, description="parts of the run with settings of their own; default: one stage")
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings, description="held-out pass@1")
    generators: GeneratorSettings = Field(default_factory=GeneratorSettings, description="the sampling fleet")
    rewarders: RewarderSettings = Field(default_factory=RewarderSettings, description="the scoring fleet")
    learner: LearnerSettings = Field(default_factory=LearnerSettings, description="how a batch becomes an update")
    journal: JournalSettings = Field(default_factory=JournalSettings, description="the record that restarts and replay read")
    weights: WeightsSettings = Field(default_factory=WeightsSettings, description="published versions")
    transport: TransportSettings = Field(default_factory=TransportSettings, description="how processes reach each other")
    ray: RaySettings = Field(default_factory=RaySettings, description="resources on a Ray cluster")
    observe: ObserveSettings = Field(default_factory=ObserveSettings, description="what a run records about itself")
    guards: GuardSettings = Field(default_factory=GuardSettings, description="when learning looks wrong")
    deadlines: DeadlineSettings = Field(default_factory=DeadlineSettings, description="what may take how long")
    restarts: RestartSettings = Field(default_factory=RestartSettings, description="how often what dies is replaced")

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        sampling, context = self.sampling, self.model.max_context
        if self.learner.ranks > sampling.groups_per_iteration:
            raise ValueError(
                f"learner.ranks is {self.learner.ranks} but an iteration has only {sampling.groups_per_iteration} groups "
                "(sampling.groups_per_iteration), so some ranks would have nothing to train on"
            )
        try:
            self.learner.check_group()
        except ValueError as error:
            raise ValueError(f"learner.{error}") from None
        self._check_schedule()
        self._check_stages()
        for key, tokens in self.token_limits().items():
            if context is not None and tokens >= context:
                raise ValueError(f"{key} is {tokens}, which leaves no room for a prompt in model.max_context {context}")
        penalised = self.learner.overlong_penalty_tokens
        for key, tokens in self.token_limits().items():
            if penalised is not None and penalised > tokens:
                raise ValueError(
                    f"learner.overlong_penalty_tokens is {penalised}, more than {key} ({tokens}): the score would fall with the first token"
                )
        if sampling.temperature == 0:
            raise ValueError("sampling.temperature is 0: greedy samples of a group are all alike, so nothing can be learned from them")
        if sampling.group_size < 2 and self.learner.advantage == "grpo":
            raise ValueError("sampling.group_size is 1: group-relative advantages need at least 2 samples of a prompt")
        if sampling.group_size < 2 and self.learner.zero_variance != "keep":
            raise ValueError(
                f"sampling.group_size is 1: every group has one score, so learner.zero_variance '{self.learner.zero_variance}' leaves nothing "
                "to train on"
            )
        weights = self.learner.reward_weights
        if weights is not None and list(weights) != [self.rewarders.reward]:
            raise ValueError(
                f"learner.reward_weights names {', '.join(weights) or 'nothing'}, but scores have the part {self.rewarders.reward}"
            )
        drawn = self.learner.advantage_options.get("k", DRAWN)
        if self.learner.advantage == "pass_at_k" and drawn > sampling.group_size:
            raise ValueError(
                f"learner.advantage 'pass_at_k' draws k = {drawn} samples from a group (learner.advantage_options.k, {DRAWN} if not given), but "
                f"sampling.group_size is {sampling.group_size}: choose a k of at most {sampling.group_size}, or larger groups"
            )
        minimum = self.learner.min_samples
        if minimum is not None and minimum > sampling.group_size:
            raise ValueError(f"learner.min_samples is {minimum}, more than the sampling.group_size of {sampling.group_size}")
        return self

    def token_limits(self) -> dict[str, int]:
        """The longest completions that the run may ask for, by the key that says so."""
        limits = {f"stages.{i}.max_tokens": stage.max_tokens for i, stage in enumerate(self.stages) if stage.max_tokens is not None}
        if len(limits) < max(1, len(self.stages)):
            limits["sampling.max_tokens"] = self.sampling.max_tokens
        return limits

    def _check_stages(self) -> None:
        names = [stage.name for stage in self.stages if stage.name]
        before = 0
        for i, stage in enumerate(self.stages):
            if stage.name and names.count(stage.name) > 1:
                raise ValueError(f"stages.{i}.name: two stages are called {stage.name!r}")
            last = i == len(self.stages) - 1
            if last and stage.until is not None:
                raise ValueError(f"stages.{i}.until: the last stage ends with the run, after iteration {self.iterations}")
            if not last and stage.until is None:
                raise ValueError(f"stages.{i}.until is missing: stage {i + 1} would never begin")
            if i == 0 and (stage.filters.drop_solved or stage.filters.solved_at_most):
                raise ValueError("stages.0.filters: nothing was sampled before the first stage, so there is nothing to filter by")
            if stage.until is not None and stage.until.iteration is not None:
                if not before < stage.until.iteration < self.iterations:
                    raise ValueError(
                        f"stages.{i}.until.iteration is {stage.until.iteration}: expected more than {before} and less than "
                        f"iterations ({self.iterations})"
                    )
                before = stage.until.iteration

    def _check_schedule(self) -> None:
        schedule, groups = self.schedule, self.sampling.groups_per_iteration
        reorder = schedule.overtaking
        if schedule.parts > groups:
            raise ValueError(f"schedule.minibatches is {schedule.parts} but an iteration has only {groups} groups")
        if schedule.stragglers != "wait" and not schedule.may_lag(groups):
            raise ValueError(
                f"schedule.quorum is {schedule.quorum or 0.85:g} of {groups} groups (sampling.groups_per_iteration), which is all of them: "
                f"stragglers '{schedule.stragglers}' would never happen; choose a smaller quorum, or wait"
            )
        if schedule.parts > 1 and schedule.may_lag(groups) >= (last := groups // schedule.parts):
            raise ValueError(
                f"schedule.quorum is {schedule.quorum or 0.85:g} of {groups} groups: an iteration may lack {schedule.may_lag(groups)} of them, "
                f"and the last of its {schedule.parts} parts has {last}: it could be empty; choose a larger quorum or fewer minibatches"
            )
        if reorder > schedule.bound * groups:
            raise ValueError(
                f"schedule.reorder is {reorder}: more than staleness {schedule.bound} x {groups} groups leaves no room to sample ahead"
            )
        if schedule.over_issue > groups:
            raise ValueError(
                f"schedule.over_issue is {schedule.over_issue}, more than an iteration's {groups} groups: most of them could never be used"
            )


class _OnceLoader(yaml.SafeLoader):
    """YAML in which a key stands once: the second one would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys differ. Raises a YAML error that names the line of the second one."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a configuration. `overrides` are "learner.optimizer.lr=1e-6". Raises ConfigError, one line per fault."""
    return parse_config(read_content(path, overrides, "model, data, sampling"), str(path), path.parent)


def read_content(path: Path, overrides: Sequence[str], expected: str) -> dict[str, Any]:
    """The keys of a YAML file with overrides, not checked yet. Raises ConfigError; `expected` names keys of such a file."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise ConfigError(f"{path}: not YAML ({reason})") from None
    if content is None:
        raise ConfigError(f"{path}: is empty, expected keys such as {expected}")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}, expected keys such as {expected}")
    for override in overrides:
        _set(content, override)
    return content


def parse_config(content: Mapping[str, Any], source: str, base: Path | None = None) -> RunConfig:
    """A checked configuration from plain data. Relative paths count from `base`."""
    try:
        return RunConfig.model_validate(with_paths(content, source, base))
    except ValidationError as error:
        sft = SFT_HINT if any(fault["type"] == "extra_forbidden" and fault["loc"][0] in SFT_KEYS for fault in error.errors()) else ""
        raise ConfigError("\n".join(f"{source}: {explain(fault, RunConfig)}" for fault in error.errors()) + sft) from None


SFT_KEYS = ("epochs", "steps", "samples_per_step", "checkpoint_every")
SFT_HINT = "\nThese are keys of a fine-tuning: rlsys sft FILE --check looks one over."


def with_paths(content: Mapping[str, Any], source: str, base: Path | None) -> Mapping[str, Any]:
    """`absolute`, if relative paths count from anywhere; an error names the file."""
    try:
        return absolute(content, base) if base else content
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _set(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, such as learner.optimizer.lr=1e-6")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value is not YAML") from None
    if isinstance(value, str) and _EXPONENT.fullmatch(value):  # YAML 1.1 takes 1e-6 for text
        value = float(value)
    place: Any = content
    *parents, last = key.split(".")
    for parent in parents:
        if isinstance(place, list):
            place = place[_index(parent, place, override)]
            continue
        if place.get(parent) is None:  # not there, or there without a value
            place[parent] = {}
        child = place[parent]
        if not isinstance(child, dict | list):
            raise ConfigError(f"--set {override}: {parent} is {child!r}, not a group of keys")
        place = child
    place[_index(last, place, override) if isinstance(place, list) else last] = value


def _index(part: str, place: list[Any], override: str) -> int:
    if not part.isdigit() or int(part) >= len(place) or not isinstance(place[int(part)], dict):
        raise ConfigError(f"--set {override}: {part!r} is no place in a list of {len(place)} groups of keys; the first is 0")
    return int(part)


_PATHS = (
    ("model", "path"),
    ("data", "train"),
    ("data", "eval"),
    ("weights", "directory"),
    ("weights", "cache"),
    ("learner", "kl", "reference"),
)


_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)")


def absolute(content: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Paths with ~ and $VARIABLES expanded, relative ones counted from the configuration file."""
    changed: dict[str, Any] = copy.deepcopy(dict(content))
    for *groups, key in _PATHS:
        section: Any = changed
        for group in groups:
            section = section.get(group) if isinstance(section, dict) else None
        value = section.get(key) if isinstance(section, dict) else None
        if isinstance(value, str) and not value.startswith(BUILTIN):
            section[key] = _absolute_path(value, base, ".".join([*groups, key]))
    for i, stage in enumerate(changed.get("stages") or []):
        if isinstance(stage, dict) and isinstance(stage.get("train"), str) and not stage["train"].startswith(BUILTIN):
            stage["train"] = _absolute_path(stage["train"], base, f"stages.{i}.train")
    return changed


def _absolute_path(value: str, base: Path, where: str) -> str:
    expanded = os.path.expandvars(value)
    if unset := _VARIABLE.search(expanded):
        raise ConfigError(f"{where} is {value}: the environment variable {unset[1]} is not set; set it, or give --set {where}=...")
    return str((base / Path(expanded).expanduser()).resolve())


def explain(fault: Any, model: type[BaseModel], prefix: str = "") -> str:
    """One pydantic fault as a sentence with the key's full path, and the nearest known key for an unknown one."""
    start = [prefix] if prefix else []
    where = ".".join([*start, *_keys(fault["loc"])])
    if fault["type"] == "extra_forbidden":
        known = _known_keys(model, fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
        return f"unknown key {where}" + (
            f"; did you mean {'.'.join([*start, *map(str, fault['loc'][:-1]), near[0]])}?" if near else f"; known here: {', '.join(known)}"
        )
    if fault["type"] == "missing":
        return f"{where} is missing"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if fault["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{where} is {fault['input']!r}: expected keys with values"
    near = (
        difflib.get_close_matches(str(fault["input"]), re.findall(r"'([^']+)'", message), n=1) if fault["type"] == "literal_error" else []
    )
    return f"{where} is {fault['input']!r}: {message[:1].lower()}{message[1:]}" + (f"; did you mean {near[0]}?" if near else "")


def _keys(loc: Sequence[Any]) -> list[str]:
    """The parts of a place that are keys; pydantic adds the branch of a union, such as `constrained-int`."""
    return [str(part) for part in loc if isinstance(part, int) or str(part).isidentifier()]


def _known_keys(model: Any, loc: Sequence[Any]) -> list[str]:
    for part in loc:
        spec = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        model = spec.annotation if spec is not None else None
    return sorted(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal one."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text
