"""From a checked configuration to one that can run: built-in models and datasets are made, files are read, nothing is started."""

from __future__ import annotations

import difflib
import inspect
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from actors.dataset import Problem, read_problems
from actors.engines import ENGINE_CHECKS, ENGINE_OPTIONS, ENGINES, TAKES_ADAPTERS
from actors.rewards import REWARDS
from actors.text import Text, context_length, stop_token_ids
from learner.optimizers import OPTIMIZERS
from learner.options import num_positional
from learner.settings import LoraSettings
from learner.steps import STEP_OPTIONS, STEPS
from protocol.errors import ConfigError, DataError
from protocol.registry import resolve
from rlsys.config import BUILTIN, RunConfig, explain
from rlsys.loggers import check_installed

QUICKSTART = "builtin:quickstart"
SIMULATED = "builtin:simulated"
PROMPTS_AT_ONCE = 64
"""Encoded together when a prompt is looked for that fits; the first ones nearly always do."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A configuration whose paths exist, and what it took to get there."""

    config: RunConfig
    base_model_s: float
    base_model_cached: bool


def uses_builtin(config: RunConfig) -> bool:
    """Whether the model or a dataset is one that rlsys makes itself."""
    return any(str(p).startswith(BUILTIN) for p in (config.model.path, config.data.train, config.data.eval or ""))


def check_builtin(config: RunConfig) -> None:
    """Raise ConfigError for a built-in that does not exist."""
    for key, path in (("model.path", config.model.path), ("data.train", config.data.train), ("data.eval", config.data.eval)):
        if path is not None and str(path).startswith(BUILTIN) and str(path) not in (QUICKSTART, SIMULATED):
            raise ConfigError(f"{key} is {path}: the built-in ones are {QUICKSTART} and {SIMULATED}")
    for i, stage in enumerate(config.stages):
        if stage.train is not None and _built_in(stage.train):
            raise ConfigError(f"stages.{i}.train is {stage.train}: a built-in data set is given as data.train, for all stages")


def prepare(config: RunConfig, say: Callable[[str], None]) -> Prepared:
    """Make what is built in, and read what is not. Raises ConfigError or DataError, with nothing started."""
    check_builtin(config)
    if missing := check_plugins(config):
        raise ConfigError("; ".join(missing))
    check_files(config)
    started, cached = time.monotonic(), True
    if uses_builtin(config):
        config, cached = _make_builtin(config, say)
    seconds = time.monotonic() - started
    check_files(config)
    return Prepared(config, seconds, cached)


def check_plugins(config: RunConfig) -> list[str]:
    """What is missing on this host for a run, in sentences. Starts nothing, imports no torch of ours.

    Raises UserError for a reward that cannot be imported, or options that a part does not have.
    """
    settings = config.rewarders
    reward = resolve(settings.reward, REWARDS, "reward")
    check_reward(reward, settings.reward)
    check_optimizer(config.learner.optimizer.name)
    _check_published(config)
    options = getattr(sys.modules.get(getattr(reward, "__module__", "")), "Options", None)
    if isinstance(options, type) and issubclass(options, BaseModel):
        check_options(options, settings.options, "rewarders.options")
    if settings_of_engine := ENGINE_OPTIONS.get(config.generators.engine):
        check_options(resolve("options", {"options": settings_of_engine}, "options"), config.generators.options, "generators.options")
    if settings_of_step := STEP_OPTIONS.get(config.learner.step):
        check_options(resolve("options", {"options": settings_of_step}, "options"), config.learner.step_options, "learner.step_options")
    elif config.learner.step in STEPS and config.learner.step_options:
        raise ConfigError(
            f"learner.step_options: step {config.learner.step!r} has no options, found {', '.join(config.learner.step_options)}"
        )
    check_installed(config.observe.loggers)
    _check_speeds(config)
    return _missing(config)


def _missing(config: RunConfig) -> list[str]:
    """What the engine lacks here."""
    generators = config.generators
    if generators.engine not in ENGINE_CHECKS:
        return []
    options = resolve("options", {"options": ENGINE_OPTIONS[generators.engine]}, "options").model_validate(generators.options)
    found: list[str] = resolve("check", {"check": ENGINE_CHECKS[generators.engine]}, "check")(options, generators.device, generators.count)
    return [f"generators: {text}" for text in found]


def _check_published(config: RunConfig) -> None:
    """Raise ConfigError when versions hold adapters alone and the engine wants whole models."""
    lora, engine = config.learner.lora, config.generators.engine
    if lora is None or lora.publish == "merged" or engine in TAKES_ADAPTERS:
        return
    if engine in ENGINES or not getattr(resolve(engine, ENGINES, "engine"), "takes_adapters", False):
        raise ConfigError(
            f"learner.lora.publish is adapter, which engine {engine!r} does not take: choose merged, which every engine takes "
            f"(adapters alone: {', '.join(TAKES_ADAPTERS)})"
        )


def check_reward(reward: Any, name: str) -> None:
    """Raise ConfigError for what is no reward: a class of (options) with `score(sample)` and `close()`. Builds nothing."""
    if not callable(reward):
        raise ConfigError(f"rewarders.reward {name!r} is a {type(reward).__name__}, expected a class of (options) with score and close")
    if not isinstance(reward, type):  # a function that makes one: what it makes is seen when it is first used
        return
    for method, takes in (("__init__", "options"), ("score", "sample"), ("close", "")):
        found = getattr(reward, method, None)
        if not callable(found):
            raise ConfigError(f"rewarders.reward {name!r} has no method {method}({takes})")
        try:
            inspect.signature(found).bind(*[None] * (1 + bool(takes)))
        except TypeError:
            raise ConfigError(
                f"rewarders.reward {name!r}: {method}{inspect.signature(found)} cannot be called as {method}({takes})"
            ) from None
        except ValueError:  # written in C: nothing is known about it
            continue


def check_optimizer(name: str) -> None:
    """Raise UserError for an optimizer of one's own that cannot be imported or called; those of the table are not imported."""
    if name not in OPTIMIZERS:
        try:
            num_positional(resolve(name, OPTIMIZERS, "optimizer"), name, "optimizer")
        except ValueError as error:
            raise ConfigError(f"learner.optimizer.name: {error}") from None


def _check_speeds(config: RunConfig) -> None:
    """Raise ConfigError when simulated parts of one run would live at different speeds."""
    parts = (
        ("generators.options.speed", config.generators.engine, config.generators.options),
        ("rewarders.options.speed", config.rewarders.reward, config.rewarders.options),
        ("learner.step_options.speed", config.learner.step, config.learner.step_options),
    )
    speeds = {key: float(options.get("speed", 1.0)) for key, name, options in parts if name == "simulated"}
    if len(set(speeds.values())) > 1:
        found = ", ".join(f"{key} is {speed:g}" for key, speed in speeds.items())
        raise ConfigError(f"simulated parts of one run need one speed: {found}")


def check_options(model: type[BaseModel], options: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError, one line per fault, for options that are not those of `model`."""
    try:
        model.model_validate(options)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(fault, model, where) for fault in error.errors())) from None


def check_files(config: RunConfig) -> None:
    """Raise DataError for a model directory or dataset that cannot be read, ConfigError for a context that is too short.

    What is built in is not looked at.
    """
    train = [] if _built_in(config.data.train) else read_problems(config.data.train)
    if config.data.eval is not None and not _built_in(config.data.eval):
        read_problems(config.data.eval)
    for stage in config.stages:
        if stage.train is not None and not _built_in(stage.train):
            read_problems(stage.train)
    reference = config.learner.kl.reference
    if reference is not None and config.learner.kl.coefficient > 0 and not Path(reference).is_dir():
        raise DataError(f"learner.kl.reference is {reference}: no such directory; expected a Hugging Face model directory")
    if not _built_in(config.model.path):
        _check_model(config, train)
        check_adapters(config.learner.lora, config.model.path)


def _built_in(path: Path) -> bool:
    return str(path).startswith(BUILTIN)


def _check_model(config: RunConfig, train: list[Problem]) -> None:
    model = config.model.path
    if not model.is_dir():
        raise DataError(f"model.path is {model}: no such directory; expected a Hugging Face model directory")
    limit = context_length(model)
    if not any(model.glob("*.safetensors")):
        raise DataError(f"model.path is {model}: holds no *.safetensors weights")
    if config.model.max_context is not None and config.model.max_context > limit:
        raise ConfigError(f"model.max_context is {config.model.max_context}, but the model in {model} was built for {limit} tokens")
    for key, tokens in config.token_limits().items():
        if tokens >= limit:
            raise ConfigError(f"{key} is {tokens}, which leaves no room for a prompt in the model's {limit} tokens")
    text = Text(model)
    if config.sampling.stop_token_ids is None:
        stop_token_ids(model)
    if train:
        _check_prompts(config, text, train, limit)


def check_adapters(lora: LoraSettings | None, model: Path) -> None:
    """Raise ConfigError when a name of learner.lora.target_modules is no matrix of the model. Reads the headers of its weights alone."""
    if lora is None or lora.target_modules == "all-linear":
        return
    matrices: set[str] = set()
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        matrices |= {
            name.removesuffix(".weight") for name, entry in header.items() if name.endswith(".weight") and len(entry.get("shape", ())) == 2
        }
    for target in lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in matrices):
            kinds = sorted({name.rpartition(".")[2] for name in matrices})
            near = difflib.get_close_matches(target, kinds, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(kinds)}"
            raise ConfigError(f"learner.lora.target_modules: the model in {model} has no matrix {target}; {hint}")


def _check_prompts(config: RunConfig, text: Text, problems: list[Problem], limit: int) -> None:
    """Raise DataError when no training prompt leaves room for a completion. Ends at the first one that does."""
    sampling = config.sampling
    longest = min(limit, config.model.max_context or limit) - sampling.max_tokens
    longest = min(longest, sampling.max_prompt_tokens or longest)
    for start in range(0, len(problems), PROMPTS_AT_ONCE):
        prompts = [problem.prompt for problem in problems[start : start + PROMPTS_AT_ONCE]]
        if any(0 < len(ids) <= longest for ids in text.encode_prompts(prompts, config.data.prompt_template, config.data.chat)):
            return
    raise DataError(
        f"{config.data.train}: every prompt is longer than {longest} tokens, which is what context and sampling.max_tokens leave for it"
    )


def _make_builtin(config: RunConfig, say: Callable[[str], None]) -> tuple[RunConfig, bool]:
    content = config.model_dump(mode="json")
    cached = True
    model, data = content["model"], content["data"]
    if SIMULATED in (model["path"], data["train"], data["eval"]):
        from rlsys.simulated_model import ensure_simulated

        files = ensure_simulated()
        model["path"] = str(files.model) if model["path"] == SIMULATED else model["path"]
        for key in ("train", "eval"):
            data[key] = str(files.train) if data[key] == SIMULATED else data[key]
    if model["path"] == QUICKSTART:
        from rlsys.quickstart.base_model import ensure_base_model

        base = ensure_base_model(say)
        model["path"], cached = str(base.path), base.cached
    if QUICKSTART in (data["train"], data["eval"]):
        from rlsys.quickstart.datasets import ensure_datasets

        datasets = ensure_datasets()
        for key, made in (("train", datasets.train), ("eval", datasets.held_out)):
            data[key] = str(made) if data[key] == QUICKSTART else data[key]
    return RunConfig.model_validate(content), cached
