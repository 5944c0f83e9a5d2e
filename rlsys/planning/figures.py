"""What planning starts from: how fast one device samples and trains, how long completions and rewards are. One YAML file, or a configuration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from actors.engines.lengths import LengthOptions
from actors.engines.simulated_options import Options as EngineFigures
from actors.rewards.simulated import Options as RewardFigures
from actors.settings import Positive
from learner.simulated_options import Options as StepFigures
from protocol.errors import ConfigError
from protocol.settings import Settings
from rlsys.config import RunConfig, explain

Rate = Annotated[float, Field(ge=1e-3, le=1e12)]
"""Tokens per second."""
Seconds = Annotated[float, Field(ge=0, le=1e9)]


class SamplingFigures(Settings):
    """One generator device."""

    tokens_per_s_sample: Rate = Field(description="tokens per second of a sample that runs alone")
    tokens_per_s: Rate = Field(description="tokens per second of all samples of the device together")
    slots: Positive = Field(64, description="samples that run at once")
    additive: bool = Field(
        False, description="a step takes a fixed part and one for each sample in turn, as on a CPU, not the longer of both"
    )
    prefill_tokens_per_s: Rate | None = Field(None, description="prompt tokens per second; not given, prompts cost nothing")
    update_s: Seconds = Field(0.0, description="how long a weight update holds up everything that runs")
    cores: Positive = Field(1, description="CPU cores that a device keeps busy; counts where parts share cores")


class TrainingFigures(Settings):
    """One learner device."""

    tokens_per_s: Rate = Field(description="tokens of prompt and completion per second")
    fixed_s: Seconds = Field(0.0, description="time of a step besides its tokens")
    publish_s: Seconds = Field(0.0, description="time from the end of a step to the announcement of the version")
    trained_share: float = Field(1.0, gt=0, le=1, description="share of sampled tokens that is trained on; groups without variance are not")
    cores: Positive = Field(1, description="CPU cores that a device keeps busy; counts where parts share cores")


class RewardFigureSettings(Settings):
    """The scoring fleet."""

    seconds: Seconds = Field(0.0, description="of one sample in one sandbox")
    sandboxes: Positive = Field(1, description="samples that are scored at once")
    cores: float = Field(1.0, ge=0, le=1024, description="CPU cores that a sample keeps busy meanwhile; 0 for a judge elsewhere")


class Figures(Settings):
    """One workload on a kind of device."""

    name: str = Field("figures", description="what the file is about")
    devices: Positive = Field(8, description="devices in all")
    groups_per_iteration: Positive = Field(128, description="prompts per iteration")
    group_size: Positive = Field(8, description="completions per prompt")
    prompt_tokens: float = Field(0.0, ge=0, description="mean tokens of a prompt")
    lengths: LengthOptions = Field(description="tokens of a completion")
    sampling: SamplingFigures = Field(description="one generator device")
    training: TrainingFigures = Field(description="one learner device")
    reward: RewardFigureSettings = Field(default_factory=RewardFigureSettings, description="the scoring fleet")
    switch_s: Seconds = Field(0.0, description="to turn all devices from sampling to training, or back (colocated schedules)")
    cores: Positive | None = Field(None, description="all parts share so many CPU cores; not given, every device is its own")
    ring_s: Seconds = Field(
        0.0, description="CPU-seconds of a sample for messages, journal, batching and bookkeeping; counts where parts share cores"
    )
    dispatch_s: Seconds = Field(0.0, description="of one iteration for everything between the parts: messages, batching, journal")

    @property
    def samples(self) -> int:
        """Per iteration."""
        return self.groups_per_iteration * self.group_size

    @model_validator(mode="after")
    def _prefill_is_known(self) -> Figures:
        if self.sampling.prefill_tokens_per_s is not None and self.prompt_tokens == 0:
            raise ValueError("sampling.prefill_tokens_per_s is given, so prompt_tokens is needed too")
        return self


def read_figures(path: Path) -> Figures:
    """Figures from a YAML file. Raises ConfigError, one line per fault."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds no keys; expected figures such as lengths, sampling, training")
    file = (content.get("lengths") or {}).get("file") if isinstance(content.get("lengths"), dict) else None
    if isinstance(file, str):
        content["lengths"]["file"] = str((path.parent / file).resolve())
    try:
        return Figures.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {explain(fault, Figures)}" for fault in error.errors())) from None


def from_simulated(config: RunConfig) -> Figures:
    """The figures of a simulated run, which its configuration states. Raises ConfigError when a part of it is not simulated."""
    parts = {
        "generators.engine": config.generators.engine,
        "rewarders.reward": config.rewarders.reward,
        "learner.step": config.learner.step,
    }
    real = [f"{key} is {name}" for key, name in parts.items() if name != "simulated"]
    if real:
        raise ConfigError(f"no figures: {', '.join(real)}; measure them with --measure or give a file with --figures")
    try:
        return _from_options(config)
    except ValidationError as error:
        raise ConfigError("\n".join(f"figures of a simulated run: {explain(fault, Figures)}" for fault in error.errors())) from None


def configured_devices(config: RunConfig) -> tuple[float, float]:
    """Devices of the generators and of the learner. Only simulated parts have shares of a device."""
    generators, trainers = float(config.generators.count), float(config.learner.ranks)
    if config.generators.engine == "simulated":
        engine = EngineFigures.model_validate(config.generators.options)
        generators = math.fsum(engine.share(i) for i in range(config.generators.count))
    if config.learner.step == "simulated":
        trainers *= StepFigures.model_validate(config.learner.step_options).devices
    return generators, trainers


def _from_options(config: RunConfig) -> Figures:
    engine = EngineFigures.model_validate(config.generators.options)
    reward = RewardFigures.model_validate(config.rewarders.options)
    step = StepFigures.model_validate(config.learner.step_options)
    sampling: dict[str, Any] = engine.model_dump(exclude={"lengths", "recompute_cache", "speed", "device_shares"})
    return Figures(
        name=config.name,
        devices=max(1, round(sum(configured_devices(config)))),
        groups_per_iteration=config.sampling.groups_per_iteration,
        group_size=config.sampling.group_size,
        prompt_tokens=2.0,
        lengths=engine.lengths.cut(config.sampling.max_tokens),
        sampling=SamplingFigures(slots=config.generators.slots, **sampling),
        training=TrainingFigures(tokens_per_s=step.tokens_per_s, fixed_s=step.fixed_s, publish_s=step.publish_s),
        reward=RewardFigureSettings(seconds=reward.seconds, sandboxes=config.rewarders.count * config.rewarders.concurrency),
    )
