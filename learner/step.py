"""One iteration's update: a batch of samples goes in, the parameters move, numbers come out.

    samples -> admit -> (share of this rank) -> micro-batches -> forward, loss, backward -> sum over ranks -> clip -> AdamW
                                                                `-------- updates_per_batch times from here on --------'

Every rank is given the whole batch, so all decisions that need all of it (what is skipped, what losses are divided by) are made alike on
every rank and without a message. Each loss is divided by a count over the whole iteration before it is summed, so any split into
micro-batches and ranks gives the same gradient up to rounding.
"""

# ruff: noqa: N815 (shapes stand in names)
from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from learner.checkpoint import difference
from learner.lora import describe
from learner.loss import Inputs, Loss
from learner.model import CausalModel
from learner.optim import Updater, learning_rate
from learner.packing import MicroBatch, Skipped, TrainSample, Weighted, admit, assign, build, emptiest, plan, weigh
from learner.parallel import Group
from learner.regularisers import next_entropy_coefficient
from learner.settings import LearnerSettings
from learner.sharding import as_number, fill, forget_forward, whole
from learner.sharing import SHARED_LONGEST, build_shared, plan_shared
from learner.tally import Tally
from protocol.canary import PROMPT_TOKENS, Canary, canary_ids
from protocol.errors import DataError, Diverged
from protocol.intervals import phase

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """What an update did. `values` are of the whole batch over all ranks and the same on every rank; see `learner/tally.py`."""

    values: dict[str, float]
    skipped: tuple[Skipped, ...]
    """Samples not trained on because something was not finite; a rank names those of its own share. `values["skipped"]` counts all."""
    ratio_counts: tuple[int, ...] = ()
    """See `Tally.ratio_counts`; empty for a step without ratios."""


@dataclass(slots=True)
class _Work:
    """A micro-batch with the log-probs that stay the same through all updates on it; found during the first."""

    batch: MicroBatch
    proximal_T: Tensor | None = None
    reference_T: Tensor | None = None
    blank: bool = False
    """Weighs nothing: run so that sharded ranks make the same passes."""


class Step:
    """The model, its optimizer, and how a batch moves them. One per rank."""

    def __init__(self, settings: LearnerSettings, model_dir: Path, group: Group) -> None:
        """Load the model of `model_dir` on this rank's device. Raises DataError when there is none."""
        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.peak_lr = settings.optimizer.lr
        self.group = group
        device = pick_device(settings.device, group.rank)
        shared: dict[str, Any] = {"device": device, "dtype": settings.dtype, "group": group}
        self.model = CausalModel(
            model_dir,
            gradient_checkpointing=settings.gradient_checkpointing,
            sharding=settings.sharding,
            offload=settings.optimizer.offload,
            lora=settings.lora,
            **shared,
        )
        log.info("attention on %s: sdpa for rows of one sample, %s for packed rows", device.type, self.model.packed_attention)
        self.sharded = self.model.sharded
        self._loss = Loss(settings)
        self._reference: CausalModel | None = None
        self._reference_is_base = self._loss.has_reference and settings.lora is not None and settings.kl.reference is None
        if self._loss.has_reference and not self._reference_is_base:
            directory = Path(settings.kl.reference) if settings.kl.reference else model_dir
            self._reference = CausalModel(directory, sharding="full" if self.sharded else "none", **shared)
            self._reference.network.requires_grad_(False)
        trained = self.model.trained()
        self._parameters = [one.parameter for one in trained]
        offload = settings.optimizer.offload and not self.sharded  # sharded parameters are offloaded by FSDP
        if offload and device.type == "cpu":
            log.info("optimizer.offload changes nothing: the learner runs on a CPU, the optimizer's state is in host memory anyway")
        self._updater = Updater(trained, settings.optimizer, on_host=offload and device.type != "cpu")
        self._entropy_coefficient = settings.entropy.coefficient
        self._corrected = settings.correction.mode in ("truncate", "mask")
        self._bad_steps = 0

    def train(self, samples: Sequence[TrainSample], iteration: int, total_iterations: int) -> StepMetrics:
        """Update the parameters on one batch, the same `samples` on every rank.

        A batch without a token to train on, or whose gradient is not finite, takes no optimizer step. Raises Diverged after
        `max_bad_steps` in a row of which nothing was finite; the counts are the same on every rank.
        """
        rate = learning_rate(self.peak_lr, self.settings.schedule, iteration, total_iterations)
        self._updater.set_rate(rate)
        sound, refused = admit(samples)
        weighted = weigh(sound, self.settings.aggregation, self.settings.aggregation_length)
        useful = [i for i, sample in enumerate(sound) if self._loss.uses(sample)]
        tally = Tally(self.model.device)
        broken: list[Skipped] = []
        if useful:
            with phase("pack"):
                work = self._share(weighted, useful)
            if self.sharded:
                self._blank = _blank(weighted, min(useful, key=lambda i: sound[i].length))
                work = self._in_step(work)
            for update in range(self.settings.updates_per_batch):
                with self.group.named("a pass over sharded parameters") if self.sharded else nullcontext():
                    work, found = self._update(weighted, work, tally, first=update == 0)
                broken += found
        for one in (*refused, *broken):
            log.warning("sample %d/%d is not trained on at iteration %d: %s", one.group_id, one.index, iteration, one.reason)
        tally.add_skipped(len(broken) + (len(refused) if self.group.rank == 0 else 0))
        values = tally.values(self.group)
        values |= {
            "lr": rate,
            "num_tokens": float(sum(s.num_trainable for s in sound)),
            "num_samples": float(len(sound)),
            "entropy_coefficient": self._entropy_coefficient,
            "corrected": float(self._corrected),
        }
        self._adapt(values)
        self._count_bad(values, (*refused, *broken), iteration)
        return StepMetrics(values=values, skipped=(*refused, *broken), ratio_counts=tally.ratio_counts)

    @torch.no_grad()
    def negative_log_likelihood(self, samples: Sequence[TrainSample]) -> float:
        """Mean of -log-prob over all trainable tokens of `samples`, the same on every rank; nothing moves. NaN without a token."""
        weighted = weigh(samples, "token_mean")
        useful = [i for i, sample in enumerate(samples) if sample.num_trainable]
        if not useful:
            return float("nan")
        work = self._share(weighted, useful)
        if self.sharded:
            self._blank = _blank(weighted, min(useful, key=lambda i: samples[i].length))
            work = self._in_step(work)
        total = torch.zeros(1, dtype=torch.float64, device=self.model.device)
        for one in work:
            policy_T, _ = self.model.token_logprobs(one.batch)
            total -= (policy_T.double() * torch.from_numpy(one.batch.weights_T).to(policy_T.device)).sum()
        forget_forward(self.model.policy)
        self.group.sum(total)
        return float(total.item())

    def canary(self) -> Canary:
        """Log-probs of a fixed sequence under the present parameters, for generators to compare theirs with.

        In float32 whatever the training type, unless layers are gathered, or frozen ones held, in bfloat16.
        With sharding all ranks must ask side by side.
        """
        ids = canary_ids(self.model.vocabulary)
        half = self.model.autocast and (self.sharded or self.model.lora is not None)
        with self.group.named("canary"):
            logprobs = self.model.sequence_logprobs(ids, PROMPT_TOKENS, half=half)
            forget_forward(self.model.policy)
        return Canary(ids, logprobs, "bfloat16" if half else "float32")

    def published_tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """All parameters and persistent buffers, whole, one after the other, under their transformers names, tied weights once.

        Floating-point ones in `dtype` if given. They may be the live tensors. With sharding all ranks must go through them side by side.
        """
        with self.group.named("gathering parameters"):
            yield from self.model.published_tensors(dtype)

    def version_tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """What generators load: the same, or with `lora.publish: adapter` the adapters alone. With sharding a collective call too."""
        with self.group.named("gathering parameters"):
            yield from self.model.version_tensors(dtype)

    def help_publishing(self, dtype: torch.dtype | None = None, *, version: bool = False) -> None:
        """What the other ranks do while rank 0 goes through `published_tensors`, or `version_tensors` for a version."""
        if self.sharded:
            for _ in self.version_tensors(dtype) if version else self.published_tensors(dtype):
                pass

    def state_dict_for_publishing(self) -> dict[str, Tensor]:
        """`published_tensors` as copies on the CPU."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.published_tensors()}

    def live_state(self) -> dict[str, Tensor]:
        """Everything that the next update depends on, without copies: "model.<name>", "optimizer.<what>.<name>", "control.<what>"."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_tensors().items()}
        tensors |= self._updater.state()
        return tensors | {
            "control.entropy_coefficient": torch.tensor(self._entropy_coefficient, dtype=torch.float64),
            "control.corrected": torch.tensor(self._corrected),
        }

    def state_to_fill(self, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Tensor]:
        """Tensors to load a state of these whole shapes and dtypes into: the model's own, new ones for the rest. The inverse of `live_state`.

        Raises DataError with named differences when the state is of another model.
        """
        live = {name: tensor for name, tensor in self.live_state().items() if not name.startswith("optimizer.")}
        given = {name: shape for name, (shape, _) in tensors.items() if not name.startswith("optimizer.")}
        found = difference(given, {name: tuple(tensor.shape) for name, tensor in live.items()})
        if found:
            raise DataError(found)
        return live | self._updater.state_to_fill({name: held for name, held in tensors.items() if name.startswith("optimizer.")})

    def adopt_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state_to_fill` gave, once it was filled."""
        self._updater.adopt({name: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")})
        self._entropy_coefficient = float(tensors["control.entropy_coefficient"])
        self._corrected = bool(tensors["control.corrected"])

    def about(self) -> dict[str, str]:
        """What must agree between a state and the step that goes on from it."""
        return {
            "model": str(self.model.network.config.model_type),
            "optimizer": self.settings.optimizer.name,
            "adapters": describe(self.settings.lora),
        }

    def training_state(self) -> dict[str, Tensor]:
        """`live_state` as copies on the CPU, whole. With sharding a collective call."""
        return {name: whole(tensor.detach()).to("cpu", copy=True) for name, tensor in self.live_state().items()}

    @torch.no_grad()
    def load_training_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `training_state`. Raises DataError when the tensors are not those of this model."""
        targets = self.state_to_fill({name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()})
        for name, target in targets.items():
            fill(target, tensors[name])
        self.adopt_state(targets)

    # ------------------------------------------------------------------------------------------------ one update

    def _share(self, weighted: Weighted, useful: list[int]) -> list[_Work]:
        """This rank's micro-batches."""
        samples, budget = weighted.samples, self.settings.tokens_per_microbatch
        lengths = [samples[i].length for i in useful]
        layout = self.settings.layout
        blocks = self.model.device.type == "cpu" and self.model.shares_prompts and max(lengths) <= SHARED_LONGEST
        row = budget if self.model.packed_attention == "flex" else None  # blocks without a border of samples cost nothing: one long row
        if layout == "auto":
            layout = "shared" if blocks else emptiest(lengths, budget, row)
        if layout == "shared" or (layout == "packed" and blocks):
            parts = plan_shared(samples, useful, budget, self.group.size, self.group.rank, share=layout == "shared")
            return [_Work(build_shared(weighted, units)) for units in parts]
        mine = [useful[place] for place in assign(lengths, self.group.size)[self.group.rank]]
        plans = plan([samples[i].length for i in mine], budget, layout, row)
        return [_Work(build(weighted, [[mine[place] for place in row] for row in rows])) for rows in plans]

    def _update(self, weighted: Weighted, work: list[_Work], tally: Tally, *, first: bool) -> tuple[list[_Work], list[Skipped]]:
        """One gradient and one optimizer step. Returns the work without samples that turned out not to be finite, and these."""
        broken: list[Skipped] = []
        kept: list[_Work] = []
        self._updater.zero_grad()
        with phase("forward backward"):
            for planned in work:
                for one, inputs in self._forward(weighted, planned, broken):
                    kept.append(one)
                    loss = self._loss(one.batch, inputs, corrected=self._corrected, entropy_coefficient=self._entropy_coefficient)
                    loss.total.backward()  # type: ignore[no-untyped-call]
                    if not one.blank:
                        tally.add_tokens(inputs, loss, first=first)
        self._sum_gradients()
        with phase("optimizer"):
            norm = as_number(torch.nn.utils.clip_grad_norm_(self._parameters, self.settings.gradient_clip))
            if np.isfinite(norm):
                self._updater.step()
        if not np.isfinite(norm):
            broken += self._blame(weighted, kept)
        self._updater.zero_grad()
        tally.add_update(norm)
        return kept, broken

    def _forward(self, weighted: Weighted, work: _Work, broken: list[Skipped]) -> Iterator[tuple[_Work, Inputs]]:
        """The micro-batch with its log-probs; if they are not finite, its sound samples one by one (slow, and rare)."""
        inputs = self._inputs(work)
        sound = bool(inputs.policy_T.isfinite().all())
        if self._all(sound):
            yield work, inputs
            return
        forget_forward(self.model.policy)
        kept = []
        for part in self._in_step([work] if sound else self._one_by_one(weighted, work)):
            with torch.no_grad():
                finite = bool(self._inputs(part).policy_T.isfinite().all())
            forget_forward(self.model.policy)
            if finite:
                kept.append(part)
            else:
                broken.append(_skip(weighted.samples[part.batch.samples[0]], "a log-prob of the policy is not finite"))
        for part in self._in_step(kept):
            yield part, self._inputs(part)

    def _one_by_one(self, weighted: Weighted, work: _Work) -> list[_Work]:
        parts = []
        for i, place in enumerate(work.batch.samples):
            own_T = torch.from_numpy(work.batch.sample_T == i).to(self.model.device)
            proximal_T, reference_T = (None if known_T is None else known_T[own_T] for known_T in (work.proximal_T, work.reference_T))
            parts.append(_Work(build(weighted, [[place]]), proximal_T, reference_T))
        return parts

    def _in_step(self, work: list[_Work]) -> list[_Work]:
        """As many passes on every sharded rank, because gathering and scattering parameters takes all of them; blank ones at the end."""
        if not self.sharded:
            return work
        count = torch.tensor([float(len(work))], device=self.model.device)
        self.group.maximum(count)
        return work + [dataclasses.replace(self._blank) for _ in range(int(count.item()) - len(work))]

    def _all(self, flag: bool) -> bool:
        """Whether it holds on every sharded rank; a rank with its own replica asks nobody."""
        if not self.sharded:
            return flag
        failed = torch.tensor([float(not flag)], device=self.model.device)
        self.group.maximum(failed)
        return not bool(failed.item())

    def _inputs(self, work: _Work) -> Inputs:
        if work.reference_T is None and self._loss.has_reference:
            with torch.no_grad():
                if self._reference is not None:
                    work.reference_T, _ = self._reference.token_logprobs(work.batch)
                else:
                    with self.model.frozen():
                        work.reference_T, _ = self.model.token_logprobs(work.batch)
        policy_T, entropy_T = self.model.token_logprobs(work.batch, entropy_gradient=self._loss.entropy_gradient)
        if work.proximal_T is None:
            work.proximal_T = policy_T.detach()
        return Inputs(policy_T=policy_T, entropy_T=entropy_T, proximal_T=work.proximal_T, reference_T=work.reference_T)

    @torch.no_grad()
    def _sum_gradients(self) -> None:
        """The gradient over all ranks, as one flat tensor; a rank without a sample adds zeros. Sharded gradients are sums already."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.group.size == 1 or self.sharded:
            return
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        with phase("waiting:ranks", "learner", "the sum of gradients"):
            self.group.sum(flat)
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _blame(self, weighted: Weighted, work: list[_Work]) -> list[Skipped]:
        """The samples of this rank whose own gradient is not finite, found one at a time. Slow, and rare."""
        found = []
        mine = [_Work(build(weighted, [[place]])) for one in work if not one.blank for place in one.batch.samples]
        for rank in range(self.group.size) if self.sharded else [self.group.rank]:  # sharded gradients are sums: one rank at a time
            for alone in self._in_step(mine if rank == self.group.rank else []):
                self._updater.zero_grad()
                loss = self._loss(
                    alone.batch, self._inputs(alone), corrected=self._corrected, entropy_coefficient=self._entropy_coefficient
                )
                loss.total.backward()  # type: ignore[no-untyped-call]
                finite = all(bool(_local(p.grad).isfinite().all()) for p in self._parameters if p.grad is not None)
                if not self._all(finite) and not alone.blank:
                    sample = weighted.samples[alone.batch.samples[0]]
                    found.append(_skip(sample, "its gradient is not finite, so the batch took no optimizer step"))
        return found

    def _count_bad(self, values: Mapping[str, float], skipped: Sequence[Skipped], iteration: int) -> None:
        """Batches in a row that took no step because something was not finite. A batch with nothing to learn is not one of them."""
        if values["updates"]:
            self._bad_steps = 0
        elif values["skipped"] or values["updates_skipped"]:
            self._bad_steps += 1
        if self._bad_steps >= self.settings.max_bad_steps:
            named = (
                "; ".join(f"sample {one.group_id}/{one.index}: {one.reason}" for one in skipped[:3])
                or "samples of other ranks, see their logs"
            )
            raise Diverged(
                f"{self._bad_steps} batches in a row, to iteration {iteration}, had nothing finite to train on ({named}): the training has "
                f"diverged (lower learner.optimizer.lr) or the rewards are not numbers; learner.max_bad_steps is {self.settings.max_bad_steps}"
            )

    def _adapt(self, values: Mapping[str, float]) -> None:
        """What the next iteration does differently, from numbers that are the same on all ranks."""
        if "entropy" in values:
            self._entropy_coefficient = next_entropy_coefficient(self._entropy_coefficient, values["entropy"], self.settings.entropy)
        correction = self.settings.correction
        if correction.mode == "auto" and self.settings.objective != "decoupled" and not self._corrected:
            self._corrected = values.get("logprob_drift", 0.0) > correction.auto_drift
            if self._corrected:
                log.warning(
                    "log-probs of sampler and trainer differ by %.3g nats on average: the correction is on", values["logprob_drift"]
                )


def _blank(weighted: Weighted, place: int) -> _Work:
    batch = build(weighted, [[place]])
    nothing_T = np.zeros_like(batch.weights_T)
    return _Work(dataclasses.replace(batch, weights_T=nothing_T, likelihood_weights_T=nothing_T), blank=True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def pick_device(name: str, rank: int) -> torch.device:
    """The device of a rank: with CUDA, one GPU each, in turn."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


def _skip(sample: TrainSample, reason: str) -> Skipped:
    return Skipped(group_id=sample.group_id, index=sample.index, reason=reason)
