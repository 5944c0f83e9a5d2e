"""One iteration's update: a batch of samples goes in, the parameters move, numbers come out.

    samples -> admit -> (share of this rank) -> micro-batches -> forward, objective, backward -> sum over ranks -> clip -> AdamW
               `--------------------------- updates_per_batch times from here on ---------------------------------------'

Every rank is given the whole batch, so all decisions that need all of it (what is skipped, what losses are divided by) are made alike on
every rank and without a message. Each loss is divided by a count over the whole iteration before it is summed, so any split into
micro-batches and ranks gives the same gradient up to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from learner.model import CausalModel
from learner.objectives import OBJECTIVES, TokenLoss, Tokens
from learner.optim import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors, set_learning_rate
from learner.options import bind
from learner.packing import MicroBatch, Skipped, TrainSample, admit, assign, build, plan, token_weights
from learner.parallel import Group
from learner.settings import LearnerSettings
from learner.tally import Tally

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """What an update did. `values` are of the whole batch over all ranks and the same on every rank; see `learner/tally.py`."""

    values: dict[str, float]
    skipped: tuple[Skipped, ...]
    """Samples not trained on because something was not finite; a rank names those of its own share. `values["skipped"]` counts all."""


class Step:
    """The model, its optimizer, and how a batch moves them. One per rank."""

    def __init__(self, settings: LearnerSettings, model_dir: Path, group: Group) -> None:
        """Load the model of `model_dir` on this rank's device. Raises DataError when there is none."""
        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.group = group
        self.model = CausalModel(
            model_dir,
            device=pick_device(settings.device, group.rank),
            dtype=settings.dtype,
            gradient_checkpointing=settings.gradient_checkpointing,
        )
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.network.named_parameters()}
        self._parameters = [parameter for parameter in self.model.network.parameters() if parameter.requires_grad]
        self._optimizer = build_optimizer(self._parameters, settings.optimizer)
        self._objective = bind(settings.objective, OBJECTIVES, settings.objective_options, "objective")

    def train(self, samples: Sequence[TrainSample], iteration: int, total_iterations: int) -> StepMetrics:
        """Update the parameters on one batch, the same `samples` on every rank.

        A batch without a token to train on, or whose gradient is not finite, takes no optimizer step.
        """
        rate = learning_rate(self.settings.optimizer.lr, self.settings.schedule, iteration, total_iterations)
        set_learning_rate(self._optimizer, rate)
        sound, skipped = admit(samples)
        weights = token_weights(sound, self.settings.aggregation, self.settings.aggregation_length)
        useful = [i for i, sample in enumerate(sound) if sample.num_trainable and sample.advantage != 0]
        tally = Tally(self.model.device)
        names = list(skipped)
        if useful:
            batches = self._micro_batches(sound, weights, useful)
            for update in range(self.settings.updates_per_batch):
                names += self._update(sound, weights, batches, tally, first=update == 0)
        for one in names:
            log.warning("sample %d/%d is not trained on at iteration %d: %s", one.group_id, one.index, iteration, one.reason)
        tally.add_skipped(len(names) if self.group.rank == 0 else len(names) - len(skipped))
        values = tally.values(self.group)
        values |= {"lr": rate, "num_tokens": float(sum(s.num_trainable for s in sound)), "num_samples": float(len(sound))}
        return StepMetrics(values=values, skipped=tuple(names))

    def state_dict_for_publishing(self) -> dict[str, Tensor]:
        """Copies on the CPU of all parameters and persistent buffers, under their transformers names, tied weights once."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.model.named_tensors().items()}

    def training_state(self) -> dict[str, Tensor]:
        """Everything that the next update depends on, as copies on the CPU: "model.<name>" and "optimizer.<what>.<name>"."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.named_tensors().items()}
        tensors |= optimizer_tensors(self._optimizer, self._names)
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_training_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `training_state`. Raises ValueError when the tensors are not those of this model."""
        live = {f"model.{name}": tensor for name, tensor in self.model.named_tensors().items()}
        given = {name for name in tensors if name.startswith("model.")}
        if given != live.keys():
            raise ValueError(f"training state: tensors {sorted(given ^ live.keys())[:5]} are in one of state and model only")
        for name, tensor in live.items():
            tensor.copy_(tensors[name])
        load_optimizer_tensors(self._optimizer, self._names, {k: v for k, v in tensors.items() if k.startswith("optimizer.")})

    # ------------------------------------------------------------------------------------------------ one update

    def _micro_batches(self, samples: Sequence[TrainSample], weights: npt.NDArray[np.float64], useful: list[int]) -> list[MicroBatch]:
        lengths = [samples[i].length for i in useful]
        mine = [useful[place] for place in assign(lengths, self.group.size)[self.group.rank]]
        layout, budget = self.settings.layout, self.settings.tokens_per_microbatch
        plans = plan([samples[i].length for i in mine], budget, layout)
        return [build(samples, weights, [[mine[place] for place in row] for row in rows]) for rows in plans]

    def _update(
        self, samples: Sequence[TrainSample], weights: npt.NDArray[np.float64], batches: list[MicroBatch], tally: Tally, *, first: bool
    ) -> list[Skipped]:
        """One gradient over `batches` and one optimizer step. Drops samples that are not finite from `batches` and returns them."""
        skipped: list[Skipped] = []
        self._optimizer.zero_grad(set_to_none=True)
        kept: list[MicroBatch] = []
        for planned in batches:
            for batch, policy_T, entropy_T in self._forward(samples, weights, planned, skipped):
                kept.append(batch)
                self._backward(batch, policy_T, entropy_T, tally, first=first)
        batches[:] = kept
        self._sum_gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self.settings.gradient_clip))
        if np.isfinite(norm):
            self._optimizer.step()
        else:
            skipped += self._blame(samples, weights, batches)
        self._optimizer.zero_grad(set_to_none=True)
        tally.add_update(norm)
        return skipped

    def _forward(
        self, samples: Sequence[TrainSample], weights: npt.NDArray[np.float64], batch: MicroBatch, skipped: list[Skipped]
    ) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
        """The micro-batch with its log-probs and entropies; if they are not finite, its sound samples one by one (slow, and rare)."""
        policy_T, entropy_T = self.model.token_logprobs(batch)
        if bool(policy_T.isfinite().all()):
            yield batch, policy_T, entropy_T
            return
        for place in batch.samples:
            alone = build(samples, weights, [[place]])
            policy_T, entropy_T = self.model.token_logprobs(alone)
            if bool(policy_T.isfinite().all()):
                yield alone, policy_T, entropy_T
            else:
                skipped.append(_skip(samples[place], "a log-prob of the policy is not finite"))

    def _backward(self, batch: MicroBatch, policy_T: Tensor, entropy_T: Tensor, tally: Tally | None, *, first: bool) -> None:
        def place(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(self.model.device, non_blocking=True)

        behaviour_T = place(batch.behaviour_T).to(policy_T.dtype)
        tokens = Tokens(
            policy_T=policy_T,
            anchor_T=behaviour_T,
            advantages_T=place(batch.advantages_T).to(policy_T.dtype),
            sample_T=place(batch.sample_T),
            num_samples=len(batch.samples),
        )
        loss: TokenLoss = self._objective(tokens)
        total = (loss.loss_T * place(batch.weights_T).to(policy_T.dtype)).sum()
        total.backward()  # type: ignore[no-untyped-call]
        if tally is not None:
            tally.add_tokens(total, loss, policy_T, behaviour_T, entropy_T, first=first)

    @torch.no_grad()
    def _sum_gradients(self) -> None:
        """The gradient over all ranks, as one flat tensor; a rank without a sample adds zeros."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.group.size == 1:
            return
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self.group.sum(flat)
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _blame(self, samples: Sequence[TrainSample], weights: npt.NDArray[np.float64], batches: list[MicroBatch]) -> list[Skipped]:
        """The samples of this rank whose own gradient is not finite, found one at a time. Slow, and rare."""
        found = []
        for place in [place for batch in batches for place in batch.samples]:
            self._optimizer.zero_grad(set_to_none=True)
            batch = build(samples, weights, [[place]])
            self._backward(batch, *self.model.token_logprobs(batch), None, first=False)
            if not all(bool(p.grad.isfinite().all()) for p in self._parameters if p.grad is not None):
                found.append(_skip(samples[place], "its gradient is not finite, so the batch took no optimizer step"))
        return found


def pick_device(name: str, rank: int) -> torch.device:
    """The device of a rank: with CUDA, one GPU each, in turn."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


def _skip(sample: TrainSample, reason: str) -> Skipped:
    return Skipped(group_id=sample.group_id, index=sample.index, reason=reason)
