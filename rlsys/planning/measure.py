"""Figures of this machine, taken with the configured engine, learner and reward, in less than two minutes.

    problems --> engine (steps timed by how many samples run) --> reward (timed alone) --> learner's step (timed at two sizes) --> figures
    all processes, in which these three only wait (CPU time; where parts share cores) ------------------------------------------^

Sampling: least squares of the seconds of a step on (1, running samples, prompt tokens prefilled). Training: two batches, of all samples and of
half of them, give the part that grows with tokens and the part that does not. Rewards are timed one at a time. The three are taken in turn in
several rounds, for the speed of a core that others share changes from one moment to the next.
"""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from actors.dataset import read_problems
from actors.dispatcher import prepare, sample_seed
from actors.engines import ENGINES, Engine, EngineOptions, Sampled, SampleRequest, Sampling
from actors.rewards import REWARDS, Reward, Sample
from actors.rewards.answers import sound
from actors.stages import Prepared
from actors.text import Text, context_length, stop_token_ids
from protocol.errors import ConfigError, DataError, InfrastructureFault, UserError, WeightsError
from protocol.holds import Hold
from protocol.messages import Version
from protocol.registry import resolve
from rlsys.config import RunConfig
from rlsys.planning.company import company
from rlsys.planning.figures import Figures
from rlsys.planning.limits import Split
from rlsys.planning.ring import ring_cpu_s
from rlsys.planning.simulate import simulate

SAMPLING_S = 25.0
"""Time for sampling in one round, after which what still runs is aborted."""
REWARDS_S = 20.0
"""Time for rewards, in one round."""
TRAINING_S = 10.0
"""After so long a step is not timed again."""
DISCARD = 4
"""Rewards that are scored before the clock starts, because the first ones start processes."""
WAITS = 0.1
WAITS_S = 0.02
"""A reward that took longer than this on average, and less than that share of it on a core, waits for something else."""
ROUNDS = 4
ROUNDS_S = 60.0
"""No round begins that would end later than this after the first began, as far as the rounds before tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A completion with the problem and group it belongs to."""

    group: int
    problem: dict[str, Any]
    prompt_ids: Any
    sampled: Sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRates:
    """Seconds of a step: fixed + running * each + prefilled * prompt."""

    fixed_s: float
    each_s: float
    prompt_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRates:
    """Seconds of a sample, and how many cores it keeps busy meanwhile."""

    seconds: float
    cores: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRates:
    """Seconds per token, fixed seconds of a step, seconds to publish."""

    token_s: float
    fixed_s: float
    publish_s: float


def _clock(on_cpu: bool, threads: int) -> Callable[[], float]:
    """What parts on the CPU are timed by: their own CPU time, which other programs on the machine do not change.

    Devices go by the wall clock, and so do parts of several threads, which use up CPU time while they wait for one another.
    """
    return time.process_time if on_cpu and threads == 1 else time.perf_counter


def _learner_on_cpu(config: RunConfig) -> bool:
    from learner.step import pick_device

    return pick_device(config.learner.device, 0).type == "cpu"


@contextmanager
def _told_to_end() -> Iterator[None]:
    """SIGTERM and SIGHUP end what is under way as Ctrl-C does, so that nothing is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _descendants_cpu_s(without: frozenset[int] = frozenset()) -> float:
    """CPU time of everything that this process started, running or reaped, but of the processes `without`."""
    ticks, parents = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)], ticks[int(entry.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    ours, found = set(), {os.getpid()}
    while found:
        ours |= found
        found = {pid for pid, parent in parents.items() if parent in ours} - ours
    return sum(ticks[pid] for pid in ours - without) / os.sysconf("SC_CLK_TCK")


def fit_steps(steps: list[tuple[float, int, int]]) -> SamplingRates:
    """Least squares over (seconds, running samples, prompt tokens prefilled) of each step; no part is below 0.

    The slowest twentieth is left out: there the machine did something else.
    """
    table = np.array(sorted(steps)[: max(3, len(steps) * 19 // 20)], np.float64)
    columns = [0, 1] + ([2] if table[:, 2].any() else [])
    design = np.stack([np.ones(len(table)), table[:, 1], table[:, 2]])[columns].T
    found, *_ = np.linalg.lstsq(design, table[:, 0], rcond=None)
    values = dict(zip(columns, np.maximum(found, 1e-9).tolist(), strict=True))
    return SamplingRates(fixed_s=values[0], each_s=values[1], prompt_s=values.get(2, 0.0))


def measure_figures(config: RunConfig, say: Callable[[str], None]) -> Figures:
    """Measure. Raises ConfigError for parts that cannot be measured in one process.

    What runs on CPUs is timed while as many other cores work as the run's own processes would keep busy.
    """
    if config.generators.engine == "simulated" or config.learner.step == "simulated" or config.rewarders.reward == "simulated":
        raise ConfigError("--measure: a simulated run states its figures itself; leave --measure out")
    started = time.monotonic()
    on_cpu = config.generators.device == "cpu" and _learner_on_cpu(config)
    with _told_to_end(), company(_others(config) if on_cpu else 0) as neighbours:
        found = _rounds(config, neighbours, lambda text: say(f"{time.monotonic() - started:5.1f} s  {text}"), on_cpu=on_cpu)
        figures = _figures(config, found, on_cpu=on_cpu)
        if not on_cpu:
            return figures
        split = Split(generators=config.generators.count, trainers=config.learner.ranks)
        expected = simulate(figures, split, config.schedule, iterations=8 * (config.schedule.bound + 1)).s_per_iteration
        say(f"{time.monotonic() - started:5.1f} s  running all processes, with parts that only wait")
        ring_s = ring_cpu_s(config, figures, expected)
    say(f"{time.monotonic() - started:5.1f} s  passed a sample through all processes for {1e3 * ring_s:.1f} ms of CPU time")
    return figures.model_copy(update={"ring_s": ring_s})


def _others(config: RunConfig) -> int:
    """Threads that are busy in a run besides the one that is measured, at most all cores.

    None where a part has several threads: it goes by the wall clock, in which others would count twice, for the plan shares out cores itself.
    """
    generators, rewarders, learner = config.generators, config.rewarders, config.learner
    if generators.threads > 1 or learner.threads > 1:
        return 0
    busy = generators.count * generators.threads + rewarders.count * rewarders.concurrency + learner.ranks * learner.threads
    return min(busy - 1, _cores())


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass(slots=True)
class _Found:
    """What the rounds found: steps and completions of all of them, one entry for each round of the rest."""

    steps: list[tuple[float, int, int]] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    trained_share: list[float] = field(default_factory=list)
    update_s: list[float] = field(default_factory=list)
    rewards: list[RewardRates] = field(default_factory=list)
    training: list[TrainingRates] = field(default_factory=list)


def _rounds(config: RunConfig, neighbours: frozenset[int], say: Callable[[str], None], *, on_cpu: bool) -> _Found:
    """Every part in turn, on other problems each time, while there is time."""
    found, begun, problems = _Found(), time.monotonic(), _problems(config)
    for number in range(ROUNDS):
        if number and (time.monotonic() - begun) * (number + 1) / number > ROUNDS_S:
            break
        steps, drawn, update_s = _measure_sampling(config, problems, number)
        tokens = sum(len(d.sampled.token_ids) for d in drawn)
        say(f"sampled {len(drawn)} completions of {tokens / len(drawn):.0f} tokens on average")
        scores, reward = _measure_rewards(config, drawn, neighbours, on_cpu=on_cpu)
        say(f"scored {len(scores)} of them in {1e3 * reward.seconds:.1f} ms each")
        rates = _measure_training(config, drawn)
        share = _trained_share(config, drawn, scores)
        say(f"trained at {1 / rates.token_s:,.0f} tokens/s; {share:.0%} of the tokens have an advantage")
        found.steps += steps
        found.drawn += drawn
        found.update_s.append(update_s)
        found.trained_share.append(share)
        found.rewards.append(reward)
        found.training.append(rates)
    return found


def _problems(config: RunConfig) -> list[Prepared]:
    """Those whose prompt leaves room for a completion, as the dispatcher takes them."""
    sampling = config.sampling
    longest = (config.model.max_context or context_length(config.model.path)) - sampling.max_tokens
    longest = min(longest, sampling.max_prompt_tokens or longest)
    fits, _ = prepare(read_problems(config.data.train), Text(config.model.path), config.data, longest)
    if not fits:
        raise DataError(f"{config.data.train}: every prompt is longer than {longest} tokens, so nothing can be sampled")
    return fits


def _figures(config: RunConfig, found: _Found, *, on_cpu: bool) -> Figures:
    """Means over the rounds."""
    rates = fit_steps(found.steps)
    return Figures.model_validate(
        {
            "name": config.name,
            "devices": config.generators.count + config.learner.ranks,
            "groups_per_iteration": config.sampling.groups_per_iteration,
            "group_size": config.sampling.group_size,
            "prompt_tokens": float(np.mean([len(d.prompt_ids) for d in found.drawn])),
            "lengths": {"values": sorted(len(d.sampled.token_ids) for d in found.drawn)},
            "sampling": {
                "tokens_per_s_sample": 1 / (rates.fixed_s + rates.each_s),
                "tokens_per_s": 1 / rates.each_s,
                "additive": True,
                "slots": config.generators.slots,
                "prefill_tokens_per_s": 1 / rates.prompt_s if rates.prompt_s > 0 else None,
                "update_s": statistics.mean(found.update_s),
                "cores": config.generators.threads,
            },
            "training": {
                "tokens_per_s": 1 / statistics.mean(r.token_s for r in found.training),
                "fixed_s": statistics.mean(r.fixed_s for r in found.training),
                "publish_s": statistics.mean(r.publish_s for r in found.training),
                "trained_share": statistics.mean(found.trained_share),
                "cores": config.learner.threads,
            },
            "reward": {
                "seconds": statistics.mean(reward.seconds for reward in found.rewards),
                "sandboxes": config.rewarders.count * config.rewarders.concurrency,
                "cores": statistics.mean(reward.cores for reward in found.rewards),
            },
            "cores": _cores() if on_cpu else None,
        }
    )


def _measure_sampling(
    config: RunConfig, problems: Sequence[Prepared], number: int
) -> tuple[list[tuple[float, int, int]], list[Drawn], float]:
    """Steps as `fit_steps` takes them, completions, and the seconds of a weight update; of the problems that round `number` has."""
    settings, sampling = config.generators, config.sampling
    clock = _clock(settings.device == "cpu", settings.threads)
    context = config.model.max_context or 1 << 20
    engine: Engine = resolve(settings.engine, ENGINES, "engine")(
        EngineOptions(
            model_path=config.model.path,
            max_context=context,
            slots=settings.slots,
            threads=settings.threads,
            dtype=settings.dtype,
            device=settings.device,
            extra=dict(settings.options),
        )
    )
    try:
        try:
            engine.load_weights(config.model.path, Version(0))
        except WeightsError as error:
            raise ConfigError(f"--measure: {error}") from None
        stops = stop_token_ids(config.model.path) if sampling.stop_token_ids is None else sampling.stop_token_ids
        draw = Sampling(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_token_ids=tuple(stops),
        )
        groups = max(3, -(-3 * settings.slots // sampling.group_size))
        chosen = [problems[(number * groups + i) % len(problems)] for i in range(groups)]
        prompts = [p.prompt_ids for p in chosen]
        payloads = [msgpack.unpackb(p.problem.payload) for p in chosen]
        steps: list[tuple[float, int, int]] = []
        drawn: list[Drawn] = []
        waiting = list(range(len(chosen)))
        until = time.monotonic() + SAMPLING_S
        while waiting or engine.load.running or engine.load.waiting:
            load = engine.load
            while waiting and load.running + load.waiting < load.capacity:
                i = waiting.pop(0)
                seeds = tuple(sample_seed(config.seed, number * groups + i, k) for k in range(sampling.group_size))
                engine.submit(SampleRequest(request_id=str(i), prompt_ids=prompts[i], seeds=seeds, sampling=draw))
                load = engine.load
            begun = clock()
            ended = engine.step(0.1)
            seconds = clock() - begun
            after = engine.load
            steps.append((seconds, after.tokens_sampled - load.tokens_sampled, after.tokens_prefilled - load.tokens_prefilled))
            for sampled in ended:
                if sampled.finish_reason != "abort":
                    i = int(sampled.request_id)
                    drawn.append(Drawn(group=i, problem=payloads[i], prompt_ids=prompts[i], sampled=sampled))
            if time.monotonic() > until:
                waiting.clear()
                for i in range(len(chosen)):
                    engine.abort(str(i))
        begun = clock()
        engine.load_weights(config.model.path, Version(1))
        update_s = clock() - begun
    finally:
        engine.close()
    if not drawn:
        raise ConfigError(f"--measure: no completion ended within {SAMPLING_S:g} s; give figures with --figures")
    return [step for step in steps if step[1]], drawn, update_s


def _measure_rewards(
    config: RunConfig, drawn: list[Drawn], neighbours: frozenset[int], *, on_cpu: bool
) -> tuple[list[float | None], RewardRates]:
    """Scores of as many completions as there is time for, None where the machinery failed. Raises ConfigError when it failed for all."""
    reward: Reward = resolve(config.rewarders.reward, REWARDS, "reward")(config.rewarders.options)
    text = Text(config.model.path)
    scores: list[float | None] = []
    skip = min(DISCARD, len(drawn) - 1)
    begun = wall = 0.0
    fault = ""
    try:
        until = time.monotonic() + REWARDS_S
        for place, one in enumerate(drawn):
            if place == skip:
                begun, wall = _descendants_cpu_s(neighbours), time.perf_counter()
            sample = Sample(
                problem=one.problem, completion=text.decode(one.sampled.token_ids), truncated=one.sampled.finish_reason != "stop"
            )
            value, why = _score(reward, config.rewarders.reward, sample)
            scores.append(value)
            fault = why or fault
            if time.monotonic() > until and place > skip:
                break
        cpu, wall = _descendants_cpu_s(neighbours) - begun, time.perf_counter() - wall
    finally:
        reward.close()
    if all(score is None for score in scores):
        raise ConfigError(
            f"--measure: reward {config.rewarders.reward!r} scored none of {len(scores)} samples ({fault or 'it gave no reason'})"
        )
    return scores, reward_rates(cpu, wall, len(scores) - skip, on_cpu=on_cpu)


def _score(reward: Reward, name: str, sample: Sample) -> tuple[float | None, str]:
    """The value, or None and why there is none. Raises ConfigError for a reward with a bug."""
    try:
        score = sound(reward.score(sample), name)
    except (InfrastructureFault, DataError) as error:
        return None, str(error)
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(
            f"--measure: reward {name!r} raised {type(error).__name__} ({error}) on problem {sample.problem.get('id')}"
        ) from error
    return score.value, "" if score.value is not None else score.detail or score.status


def reward_rates(cpu_s: float, wall_s: float, count: int, *, on_cpu: bool) -> RewardRates:
    """Of `count` samples one after the other. A reward is timed by its CPU time, which other programs do not change.

    One whose CPU time is hardly any of the time that it took waits for something else than a core (a judge elsewhere): the wall clock times it.
    """
    waits = cpu_s < WAITS * wall_s and wall_s > count * WAITS_S
    seconds = cpu_s if on_cpu and not waits else wall_s
    return RewardRates(seconds=seconds / count, cores=min(1.0, cpu_s / seconds) if seconds > 0 else 1.0)


def _trained_share(config: RunConfig, drawn: list[Drawn], scores: list[float | None]) -> float:
    """The share of tokens of groups whose scores differ, without what is cut off."""
    groups: dict[int, set[float]] = {}
    for one, score in zip(drawn, scores, strict=False):
        if score is not None:
            groups.setdefault(one.group, set()).add(score)
    kept = total = 0
    for one in drawn[: len(scores)]:
        tokens = len(one.sampled.token_ids)
        total += tokens
        cut = config.learner.overlong == "mask" and one.sampled.finish_reason != "stop"
        flat = config.learner.zero_variance != "keep" and len(groups.get(one.group, ())) < 2
        kept += 0 if cut or flat else tokens
    return min(1.0, max(0.01, kept / max(1, total)))


def _measure_training(config: RunConfig, drawn: list[Drawn]) -> TrainingRates:
    """A step on all of a batch and on half of it; publishing once."""
    from learner.packing import TrainSample
    from learner.parallel import SingleProcess
    from learner.publisher import Publisher
    from learner.steps import build_step

    clock = _clock(_learner_on_cpu(config), config.learner.threads)
    step = build_step(config.learner.model_copy(update={"ranks": 1}), config.model.path, SingleProcess())
    whole = [d for d in drawn if len(d.sampled.token_ids)][: config.sampling.groups_per_iteration * config.sampling.group_size]
    samples = [
        TrainSample(
            group_id=d.group,
            index=i,
            prompt_ids=d.prompt_ids,
            token_ids=d.sampled.token_ids,
            behaviour_logprobs=d.sampled.logprobs,
            loss_mask=np.ones(len(d.sampled.token_ids), np.bool_),
            advantage=1.0 if i % 2 else -1.0,
            temperature=config.sampling.temperature,
            positive=bool(i % 2),
        )
        for i, d in enumerate(sorted(whole, key=lambda d: d.group))
    ]
    half = samples[: max(1, len(samples) // 2)]
    step.train(half, 0, 4)
    points = []
    for batch in (half, samples):
        seconds, until = [], time.monotonic() + TRAINING_S
        for _ in range(3):
            begun = clock()
            step.train(batch, 0, 4)
            seconds.append(clock() - begun)
            if time.monotonic() > until:
                break
        points.append((sum(len(s.prompt_ids) + len(s.token_ids) for s in batch), statistics.median(seconds)))
    (few, short), (many, long) = points
    per_token = (long - short) / (many - few) if many > few and long > short else long / many
    per_token = min(per_token, long / many)
    with Hold.of_new("rlsys-plan-") as directory:
        lora = config.learner.lora
        alone = lora if lora is not None and lora.publish == "adapter" else None
        publisher = Publisher(directory, config.model.path, config.weights.dtype, adapters=alone)
        begun = time.perf_counter()
        publisher.publish(Version(0), step.version_tensors(publisher.dtype))
        publish_s = time.perf_counter() - begun
    return TrainingRates(token_s=per_token, fixed_s=max(0.0, long - per_token * many), publish_s=publish_s)
