"""From a configuration to the body of each role. The only place besides `registry.resolve` that imports heavy libraries late."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from protocol.errors import Fenced, RunEnded, StalenessViolation, UserError
from protocol.node import Node, ProcessSpec, die_with_parent, on_terminate
from rlsys.config import RunConfig, load_config
from rlsys.logs import set_up
from rlsys.rundir import WEIGHTS_DIR, sees_weights
from rlsys.schedules import batch_rule, pacing_rule
from rlsys.stages import stage_plans, stage_rules

log = logging.getLogger("rlsys")

FAULT, USER_ERROR, BUG = 1, 2, 3
"""Exit codes of a process: a fault that a restart may mend, one that the user can mend, and one that would only come again."""


def load_run(run_dir: Path) -> RunConfig:
    """The resolved configuration of a run. Raises ConfigError."""
    return load_config(run_dir / "config.yaml")


def run_role(spec_json: str) -> int:
    """Be one process of a run; returns the exit code, 0 when the run stopped it."""
    die_with_parent()
    spec = ProcessSpec(**json.loads(spec_json))
    config = load_run(Path(spec.run_dir))
    set_up(spec, config.observe.log_mb)
    node = Node(spec)
    node.recorder.keep = config.observe.intervals
    on_terminate(node)
    try:
        ROLES[spec.role](node, config)
    except RunEnded as end:
        log.info("%s ends: %s", spec.identity, end)
        return 0
    except UserError as error:
        log.error("%s", error)
        node.finished(f"user: {error}")
        return USER_ERROR
    except Fenced as error:
        log.error("%s", error)
        return FAULT
    except BaseException as error:
        log.critical("%s broke", spec.identity, exc_info=True)
        node.finished(f"{type(error).__name__}: {error}")
        return BUG if isinstance(error, StalenessViolation | AssertionError) else FAULT
    finally:
        if not node.closed:
            node.close()
    return 0


def max_context(config: RunConfig) -> int:
    """Most tokens of prompt and completion: the model's limit or the configuration's, whichever is smaller."""
    from actors.text import context_length

    limit = context_length(config.model.path)
    return limit if config.model.max_context is None else min(limit, config.model.max_context)


def _dispatcher(node: Node, config: RunConfig) -> None:
    from actors.dispatcher import DispatcherJob, run_dispatcher

    run_dispatcher(
        node,
        DispatcherJob(
            seed=config.seed,
            iterations=config.iterations,
            pacing=pacing_rule(config),
            max_requeues=1 if config.schedule.max_requeues is None else config.schedule.max_requeues,
            stages=stage_plans(config),
            model_dir=config.model.path,
            max_context=max_context(config),
            data=config.data,
            sampling=config.sampling,
            evaluation=config.evaluation,
            ledger=Path(node.spec.run_dir) / "ledger.sqlite",
        ),
    )


def _generator(node: Node, config: RunConfig) -> None:
    from actors.engines import ENGINES, EngineOptions
    from actors.generator import Generator
    from actors.host_cache import choose_cache_dir
    from actors.network_weights import NetworkWeights
    from protocol.registry import resolve
    from rlsys.topology import engine_options

    settings = config.generators
    longest = max_context(config)
    options = EngineOptions(
        model_path=config.model.path,
        max_context=longest,
        slots=settings.slots,
        threads=settings.threads,
        dtype=settings.dtype,
        device=settings.device,
        index=node.spec.index if node.spec.place < 0 else node.spec.place,
        joined=node.spec.place >= 0,
        extra=engine_options(config),
        name=node.spec.name,
        log_dir=Path(node.spec.run_dir) / "logs",
    )
    # servers of an engine share nothing; engines in this process use the device that is named, maybe together with the learner
    device = f"{settings.device} of {node.spec.name}" if (settings.engine, settings.device) == ("sglang", "cuda") else settings.device
    engine = resolve(settings.engine, ENGINES, "engine")(options)
    network = None
    try:
        weights = Path(node.spec.weights_dir) if node.spec.weights_dir else None
        if over_network(config, node.spec):
            run_dir, needed = Path(node.spec.run_dir), 3 * 2 * sum(path.stat().st_size for path in config.model.path.glob("*.safetensors"))
            network = NetworkWeights(node, choose_cache_dir(node.spec.run_id, needed, run_dir / "weights-cache", config.weights.cache))
        Generator(node, engine, config.sampling.group_size, settings.dtype, device, weights, network).run()
    finally:
        if network is not None:
            network.close()
        engine.close()


def over_network(config: RunConfig, spec: ProcessSpec) -> bool:
    """Whether a generator has versions brought over the network: as configured, or because it does not see the directory of the run."""
    if config.weights.transfer != "auto" or config.transport.kind == "ipc":
        return config.weights.transfer == "network"
    named = Path(spec.run_dir) / WEIGHTS_DIR
    weights = spec.weights_dir or (named.read_text() if named.exists() else "")
    return not weights or not sees_weights(Path(weights), spec.run_id)


def _rewarder(node: Node, config: RunConfig) -> None:
    from actors.rewarder import Rewarder
    from actors.rewards import REWARDS
    from actors.text import Text
    from protocol.registry import resolve

    settings = config.rewarders
    reward = resolve(settings.reward, REWARDS, "reward")(settings.options)
    try:
        Rewarder(
            node,
            reward,
            Text(config.model.path),
            reward_name=settings.reward,
            concurrency=settings.concurrency,
            retries=settings.retries,
            max_not_finite=settings.max_not_finite,
        ).run()
    finally:
        reward.close()


def _learner(node: Node, config: RunConfig) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(config.learner.threads))
    from learner.trainer import LearnerJob, run_learner

    run_dir = Path(node.spec.run_dir)
    run_learner(
        node,
        LearnerJob(
            iterations=config.iterations,
            batches=batch_rule(config),
            stages=stage_rules(config),
            group_size=config.sampling.group_size,
            eval_samples=config.evaluation.samples,
            model_dir=config.model.path,
            run_dir=run_dir,
            weights_dir=Path((run_dir / WEIGHTS_DIR).read_text()),
            publish_dtype=config.weights.dtype,
            serve_weights=config.weights.transfer == "network" or (config.weights.transfer == "auto" and config.transport.kind == "tcp"),
            host=node.spec.host,
            journal_keep_bytes=None if config.journal.keep == "all" else round(config.journal.keep * 1e9),
            settings=config.learner,
            histograms=config.observe.histograms,
            samples_every=config.observe.samples_every,
            samples=config.observe.samples,
        ),
    )


def _dashboard(node: Node, config: RunConfig) -> None:
    from rlsys.dashboard import Dashboard

    Dashboard(node, config).run()


ROLES: dict[str, Callable[[Node, RunConfig], None]] = {
    "dispatcher": _dispatcher,
    "generator": _generator,
    "rewarder": _rewarder,
    "learner": _learner,
    "dashboard": _dashboard,
}
