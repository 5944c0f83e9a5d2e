"""Processes on the nodes of a Ray cluster. The only file that imports ray.

    supervisor --placement groups, one actor a process--> Ray --> actor = an agent of the run (rlsys/launchers/agent.py) --> the process, its child

Ray places and watches; weights, tasks and samples go over the run's own channels. An actor gets a join token of its own and so becomes a host of
the run, which reports exit codes and logs. Learner ranks are packed, the first on the supervisor's node, where journal and ledger are written;
generators are spread over nodes; reward actors take processors alone. Dispatcher and dashboard stay beside the supervisor.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol.errors import ConfigError, UserError
from protocol.node import ProcessSpec
from rlsys import __version__
from rlsys.config import RunConfig
from rlsys.hosts import KILLED, Door, Host, RemoteChild
from rlsys.launchers import Handle
from rlsys.launchers.agent import Agent
from rlsys.launchers.local import Child
from rlsys.token import parse

if TYPE_CHECKING:
    from ray.actor import ActorHandle

log = logging.getLogger(__name__)

RESERVE_S = 20.0
"""How long Ray may take to reserve places: seconds where they are free, and a cluster that grows by itself has begun to by then."""
LIVE_S = 5.0
"""The same while the run goes on: its supervisor waits for nothing longer."""
CONNECT_S = 5.0
"""How long a head node may take to accept a connection."""
END_S = 4.0
"""How long actors may take to end once their processes have."""
AGAIN = 3
"""How often one start may get another actor because Ray gave it to a node that was dead: it finds that out seconds later, by its health check."""
BESIDE = ("dispatcher", "dashboard")
"""Roles that run beside the supervisor: they read and write the run directory all the time, and take next to nothing."""
STRATEGY = {"learner": "PACK", "generator": "SPREAD", "rewarder": "SPREAD"}
HERE = 0.001
"""Of a node's own resource (`node:<ip>`): asks for that node without taking anything of it."""

Resources = dict[str, float]


class Place:
    """What runs inside a Ray actor: the agent of one process, in the actor's main thread until the process has ended for good."""

    def run(self, token: str, in_run_dir: bool) -> tuple[int, str]:
        """Exit code and sentence of the agent; 2 for what the user can mend, another version of rlsys here among it."""
        import ray

        node = ray.util.get_node_ip_address()
        try:
            return Agent(parse(token, __version__), name=node, in_run_dir=in_run_dir, say=print).run()
        except UserError as error:
            return 2, f"node {node}: {error}"


@dataclass(slots=True)
class _Placed:
    """One actor and the process that it is for."""

    host: Host
    child: RemoteChild
    actor: ActorHandle
    done: Any
    """Resolves when the actor's agent has ended."""
    again: int = AGAIN
    """How many more actors it may get for this start."""


class RayLauncher:
    """Placement and life of a run's processes on a Ray cluster."""

    def __init__(self, address: str = "") -> None:
        try:
            import ray
        except ImportError:
            raise ConfigError("the ray launcher needs Ray: pip install 'rlsys[ray]'") from None
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self._ray = ray
        _check_reachable(address)
        try:
            ray.init(
                address=address or "auto", namespace="rlsys", log_to_driver=False, logging_level=logging.ERROR, configure_logging=False
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(
                f"no Ray cluster at {address or 'auto'} ({reason}): start one with `ray start --head`, or name it with --address"
            ) from None
        self._places: dict[tuple[str, int], tuple[Any, int]] = {}
        self._groups: list[Any] = []
        self._placed: list[_Placed] = []
        self._door: Door | None = None
        self._needs: dict[str, Resources] = {}

    # ------------------------------------------------------------------------------------------------ before a start

    def adapt(self, config: RunConfig) -> RunConfig:
        """Over tcp, on the address that Ray knows this node by, unless the configuration names one."""
        transport = config.transport
        host = transport.host if transport.host != "127.0.0.1" else self._ray.util.get_node_ip_address()
        return config.model_copy(update={"transport": transport.model_copy(update={"kind": "tcp", "host": host})})

    def reserve(self, config: RunConfig, fleet: Sequence[tuple[str, int]], door: Door | None, *, live: bool = False) -> None:
        """A placement group for each role's new places. Raises ConfigError when Ray finds no room: what is needed, what is free."""
        self._door = door or self._door
        self._needs = needs(config)
        free, made = dict(self._ray.available_resources()), []  # before anything of it is reserved
        for role in STRATEGY:
            new = [index for r, index in fleet if r == role and (r, index) not in self._places]
            if new:
                bundles = [dict(self._needs[role]) for _ in new]
                if role == "learner" and 0 in new:
                    bundles[new.index(0)][f"node:{self._ray.util.get_node_ip_address()}"] = HERE
                made.append((role, new, bundles, self._ray.util.placement_group(bundles, strategy=STRATEGY[role])))
        deadline = time.monotonic() + (LIVE_S if live else RESERVE_S)
        if not all(group.wait(max(0.1, deadline - time.monotonic())) for *_, group in made):
            for *_, group in made:
                self._ray.util.remove_placement_group(group)
            living = sum(bool(node["Alive"]) for node in self._ray.nodes())
            raise ConfigError(lacking([(role, bundles) for role, _, bundles, _ in made], free, self._ray.cluster_resources(), living))
        for role, new, _, group in made:
            self._groups.append(group)
            self._places |= {(role, index): (group, place) for place, index in enumerate(new)}

    def release(self, role: str, index: int) -> None:
        """A process has left for good. Ray gives a placement group back as a whole, so its places are free once all of them are left."""
        found = self._places.pop((role, index), None)
        if found is not None and not any(group is found[0] for group, _ in self._places.values()):
            self._ray.util.remove_placement_group(found[0])
            self._groups.remove(found[0])

    # ------------------------------------------------------------------------------------------------ processes

    def start(self, spec: ProcessSpec, log_path: Path, environment: Mapping[str, str]) -> Handle:
        """An actor in the place that was reserved, which starts the process; should its node be gone, Ray finds another first."""
        if spec.role in BESIDE:
            return Child(spec, log_path, environment)
        assert self._door is not None, "the run has no door for hosts: a bug of `adapt`"
        host, token = self._door.expect(spec.name)
        child = host.start(spec, log_path, environment)
        self._placed.append(_Placed(host, child, *self._bring(spec, token)))
        return child

    def _bring(self, spec: ProcessSpec, token: str) -> tuple[ActorHandle, Any]:
        """An actor in the place of `spec`, and what resolves when its agent has ended."""
        group, place = self._places[spec.role, spec.index]
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place)
        wanted = self._needs[spec.role]
        actor = self._ray.remote(Place).options(
            num_cpus=wanted.get("CPU", 0), num_gpus=wanted.get("GPU", 0), max_restarts=0, scheduling_strategy=strategy
        )
        actor = actor.remote()
        return actor, actor.run.remote(token, spec.role == "learner")

    def turn(self) -> None:
        """Actors that have ended, with their nodes or by themselves; what ran in them is told dead by the door.

        One that is gone before its agent came in has most likely been given to a dead node. Nothing ran in it, so nothing died: the same
        start gets another actor.
        """
        if not self._placed:
            return
        ready, _ = self._ray.wait([placed.done for placed in self._placed], num_returns=len(self._placed), timeout=0, fetch_local=False)
        for placed in [placed for placed in self._placed if placed.done in ready]:
            self._placed.remove(placed)
            code, why = self._outcome(placed)
            self._ray.kill(placed.actor)
            assert self._door is not None
            if why is None and placed.again and not placed.host.identity and placed.child.code is None:
                actor, done = self._bring(placed.child.spec, self._door.expect_again(placed.host))
                self._placed.append(replace(placed, actor=actor, done=done, again=placed.again - 1))
                log.info("%s had not begun when its Ray actor was gone: it gets another", placed.child.spec.identity)
            else:
                self._door.lose(placed.host, why or gone(placed.host.place), code=2 if code == 2 else KILLED)

    def _outcome(self, placed: _Placed) -> tuple[int, str | None]:
        """Exit code and reason; no reason when the actor is gone and nobody can say more."""
        try:
            code, why = self._ray.get(placed.done, timeout=5.0)
            return int(code), f"its place on Ray was given back ({why})" if code != 2 else str(why)
        except self._ray.exceptions.RayActorError as error:
            lines = " ".join(str(error).split())
            if "ModuleNotFoundError" in lines or "ImportError" in lines:
                return (
                    2,
                    f"a node of the Ray cluster cannot load rlsys {__version__}: install the same version on every node ({lines[-200:]})",
                )
            log.info("Ray: %s", lines)
            return KILLED, None
        except self._ray.exceptions.RayError as error:
            lines = " ".join(str(error).split())
            if "ModuleNotFoundError" in lines or "ImportError" in lines:
                return (
                    2,
                    f"a node of the Ray cluster cannot load rlsys {__version__}: install the same version on every node ({lines[-200:]})",
                )
            return KILLED, f"Ray: {lines[:200]}"

    def close(self) -> None:
        """Everything of the run on Ray ends: actors once their processes have, then the places."""
        if self._placed:
            self._ray.wait([placed.done for placed in self._placed], num_returns=len(self._placed), timeout=END_S)
        for placed in self._placed:
            self._ray.kill(placed.actor)
        for group in self._groups:
            self._ray.util.remove_placement_group(group)
        self._ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise ConfigError when nobody listens at HOST:PORT; Ray itself would try for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster at {address} ({error}): start one with `ray start --head`, or name it with --address") from None


# ---------------------------------------------------------------------------------------------------- pure


def needs(config: RunConfig) -> dict[str, Resources]:
    """What one process of each role takes, from the configuration, with what `ray` in it says instead."""
    generators, learner, given = config.generators, config.learner, config.ray
    gpu = {"GPU": 1.0}
    tp = generators.options.get("tp", 1)  # devices of one engine's server
    found: dict[str, Resources] = {
        "learner": {"CPU": float(learner.threads), **(gpu if learner.device.startswith("cuda") else {})},
        "generator": {"CPU": float(generators.threads), **({"GPU": float(tp)} if generators.device.startswith("cuda") else {})},
        "rewarder": {"CPU": float(config.rewarders.concurrency)},
    }
    own = {"learner": given.learner, "generator": given.generator, "rewarder": given.rewarder}
    return {role: {**resources, **own[role]} for role, resources in found.items()}


def in_words(resources: Mapping[str, float]) -> str:
    """ "2 GPU, 8 CPU"."""
    named = [(name, amount) for name, amount in sorted(resources.items(), reverse=True) if not name.startswith("node:") and amount]
    return ", ".join(f"{amount:g} {name}" for name, amount in named) or "nothing"


def gone(place: str) -> str:
    """One sentence for what Ray says, which is many and opens with identifiers of its own; all of it is in the log."""
    return f"its Ray actor is gone{f' from {place}' if place else ''}, with its node or alone"


def lacking(wanted: Sequence[tuple[str, Sequence[Resources]]], free: Resources, total: Resources, nodes: int) -> str:
    """Why there is no room: what which role needs, what of it is not there, what is free."""
    needed: Resources = {}
    for name, amount in ((name, amount) for _, bundles in wanted for bundle in bundles for name, amount in bundle.items()):
        if not name.startswith("node:"):
            needed[name] = needed.get(name, 0.0) + amount
    lacks = {name: amount - free.get(name, 0.0) for name, amount in needed.items() if amount > free.get(name, 0.0)}
    each = "; ".join(f"{len(bundles)} {role}{'s' * (len(bundles) != 1)} of {in_words(bundles[0])}" for role, bundles in wanted)
    left = in_words({name: free.get(name, 0.0) for name in needed})
    of = in_words({name: total.get(name, 0.0) for name in needed})
    what = (
        f"{in_words(lacks)} is missing"
        if lacks
        else "no single node has enough of it free, or not the supervisor's node, where rank 0 must be"
    )
    return f"the Ray cluster has no room for {each}: {what}; free are {left}, of {of} on {nodes} node{'s' * (nodes != 1)}"
