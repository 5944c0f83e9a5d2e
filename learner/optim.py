"""The learning rate over a run, and the optimizers behind one face: their state as plain named tensors, and on the host if asked for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from learner.optimizers import OPTIMIZERS, Build, Trained
from learner.options import guarded, num_positional
from learner.settings import OptimizerSettings, ScheduleSettings
from protocol.errors import ConfigError, DataError
from protocol.registry import resolve

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.int64)}
CONSTANT = ("qmap1", "qmap2")
"""bitsandbytes' tables of codes: the same for every parameter and never changed, so not part of a state."""


def learning_rate(peak: float, schedule: ScheduleSettings, iteration: int, total_iterations: int) -> float:
    """The rate of `iteration` (from 0) of `total_iterations`.

    Rises as (iteration + 1) / warmup_iterations to the peak, then goes to `final_fraction` of it at the last iteration. Iterations beyond
    the last keep the last rate.
    """
    if iteration < schedule.warmup_iterations:
        return peak * (iteration + 1) / schedule.warmup_iterations
    if schedule.name == "constant":
        return peak
    span = total_iterations - 1 - schedule.warmup_iterations
    progress = min((iteration - schedule.warmup_iterations) / span, 1.0) if span > 0 else 1.0
    left = (1 + math.cos(math.pi * progress)) / 2 if schedule.name == "cosine" else 1 - progress
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * left)


class Updater:
    """The optimizers that the settings name, over all trained parameters, each of which stands in exactly one.

    With `on_host`, for parameters on a GPU: optimizer state and a master copy live in host memory, gradients go down, the optimizer
    computes there, parameters come back. Saves 8 bytes of GPU memory for each trained number; costs two copies over the bus and the
    host's arithmetic in each update.
    """

    def __init__(self, trained: Sequence[Trained], settings: OptimizerSettings, *, on_host: bool = False) -> None:
        """Raises ConfigError when the optimizer cannot work on these parameters."""
        build: Build = resolve(settings.name, OPTIMIZERS, "optimizer")
        self._names = {one.name: one.parameter for one in trained}
        self._twins: dict[nn.Parameter, nn.Parameter] = {}
        if on_host:
            self._twins = {one.parameter: _host_copy(one.parameter) for one in trained}
            trained = [Trained(one.name, self._twins[one.parameter], one.embedding) for one in trained]
        self._parts = build(trained, settings) if settings.name in OPTIMIZERS else _own(build, trained, settings)
        self._shares = [[group["lr"] / settings.lr for group in part.param_groups] for part in self._parts]
        self._owner = {parameter: part for part in self._parts for group in part.param_groups for parameter in group["params"]}

    def set_rate(self, rate: float) -> None:
        """Use `rate` from the next step on; parameters that were built with another rate than `lr` keep their proportion to it."""
        for part, shares in zip(self._parts, self._shares, strict=True):
            for group, share in zip(part.param_groups, shares, strict=True):
                group["lr"] = rate * share

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self._names.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients."""
        for parameter, twin in self._twins.items():
            twin.grad = None if parameter.grad is None else parameter.grad.to("cpu")
        for part in self._parts:
            part.step()
        for parameter, twin in self._twins.items():
            parameter.copy_(twin, non_blocking=True)
            twin.grad = None

    def state(self) -> dict[str, Tensor]:
        """ "optimizer.<what>.<parameter>" -> tensor (live, no copies). Empty before the first step."""
        found = {}
        for name, parameter in self._names.items():
            held = self._twins.get(parameter, parameter)
            for what, value in self._owner[held].state.get(held, {}).items():
                if what not in CONSTANT:
                    found[f"optimizer.{what}.{name}"] = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
        return found

    def state_to_fill(self, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Tensor]:
        """Tensors to load `state` of these whole shapes and dtypes into; moments are placed (and sharded) as their parameter is.

        Raises DataError for a tensor that belongs to no parameter.
        """
        found = {}
        for key, (shape, dtype) in tensors.items():
            parameter = self._parameter(key)
            held = self._twins.get(parameter, parameter)
            if tuple(shape) == tuple(held.shape):
                found[key] = torch.empty_like(held, dtype=DTYPES[dtype], requires_grad=False)
            else:
                found[key] = torch.empty(shape, dtype=DTYPES[dtype], device=held.device if shape else "cpu")
        return found

    @torch.no_grad()
    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a `state` (its tensors are taken over) and from the parameters as they are now."""
        for part in self._parts:
            part.state.clear()
        for parameter, twin in self._twins.items():
            twin.copy_(parameter)
        for key, value in tensors.items():
            parameter = self._parameter(key)
            held = self._twins.get(parameter, parameter)
            state = _started(self._owner[held], held)
            what = key.split(".", 2)[1]
            if value.dtype == torch.int64:
                state[what] = int(value)
            elif what in state:
                state[what].copy_(value)  # bitsandbytes: the memory is its own, maybe paged
            else:
                state[what] = value.detach()

    def _parameter(self, key: str) -> nn.Parameter:
        name = key.split(".", 2)[2]
        if name not in self._names:
            raise DataError(f"optimizer state {key!r} belongs to no parameter of this model")
        return self._names[name]


def _own(build: Any, trained: Sequence[Trained], settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """The optimizers of a user's own function. Raises ConfigError that names it unless they hold every trained parameter once."""
    name = settings.name
    try:
        num_positional(build, name, "optimizer")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    found = guarded(build, name, "optimizer")(trained, settings)
    if not isinstance(found, list | tuple) or not all(isinstance(part, torch.optim.Optimizer) for part in found):
        raise ConfigError(f"optimizer {name!r} returned a {type(found).__name__}, expected a list of torch.optim.Optimizer")
    held = Counter(id(parameter) for part in found for group in part.param_groups for parameter in group["params"])
    wrong = [one.name for one in trained if held[id(one.parameter)] != 1]
    if wrong or len(held) != len(trained):
        many = (
            f"{wrong[0]} {held[id({one.name: one.parameter for one in trained}[wrong[0]])]} times"
            if wrong
            else "tensors that are not trained"
        )
        raise ConfigError(f"optimizer {name!r} holds {many}, expected every trained parameter once and nothing else")
    return list(found)


def _host_copy(parameter: nn.Parameter) -> nn.Parameter:
    copied = parameter.detach().to("cpu", copy=True)
    return nn.Parameter(copied.pin_memory() if parameter.device.type == "cuda" else copied)


def _started(part: Any, parameter: nn.Parameter) -> dict[str, Any]:
    """The optimizer's state of a parameter, with the buffers that bitsandbytes wants to make itself."""
    if not part.state[parameter] and hasattr(part, "init_state"):
        for g, group in enumerate(part.param_groups):
            for p, one in enumerate(group["params"]):
                if one is parameter:
                    part.init_state(group, parameter, g, p)
    state: dict[str, Any] = part.state[parameter]
    return state
