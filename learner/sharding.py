"""Parameters, gradients and optimizer state cut over the ranks (FSDP2), for models that one rank's memory does not hold.

Each rank keeps 1/K of the rows of every tensor. A decoder layer is gathered whole just before it is used, forward and backward, and let go
after; gradients are summed while they are scattered. Everything that is gathered together is one decoder layer; what is outside the layers
(embedding, last norm, head) is one more.

All ranks must run the same passes in the same order, so a rank with fewer micro-batches runs blank ones; see `learner/step.py`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from learner.parallel import Group, SingleProcess
from learner.settings import Sharding

REPLICA_SHARE = 0.4
"""`sharding: auto` shards when a whole replica's state is more than this share of the memory that a rank has; the rest is for activations."""
TRAINED_BYTES = 16
"""Of a trained parameter: the master weight, its gradient and two moments, in float32."""


def is_sharded(sharding: Sharding, group: Group, network: nn.Module, device: torch.device) -> bool:
    """Whether this group shards. The answer is the same on all ranks; a collective call."""
    if isinstance(group, SingleProcess) or sharding == "none":
        return False
    if sharding == "full":
        return True
    needed = sum(p.numel() * (TRAINED_BYTES if p.requires_grad else p.element_size()) for p in network.parameters())
    answer = torch.tensor([float(needed > REPLICA_SHARE * _memory_of_a_rank(group, device))], device=device)
    group.maximum(answer)
    return bool(answer.item())


def _memory_of_a_rank(group: Group, device: torch.device) -> float:
    """Bytes: the GPU's, or this machine's divided by the ranks, as if all of them stood here."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / group.size


def shard(root: nn.Module, layers: list[nn.Module], group: Group, device: torch.device, *, half: bool, offload: bool) -> None:
    """Shard `layers` one by one and the rest of `root` as one. Afterwards parameters are DTensors; gradients are sums over ranks.

    With `half` layers are gathered in bfloat16, which is what autocast would compute their products in anyway; masters, gradients and their
    sums stay float32, and so do embedding and head. With `offload` shards, gradients and optimizer state stay in host memory.
    """
    mesh = init_device_mesh(device.type, (group.size,))
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    rough = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    place = CPUOffloadPolicy() if offload else OffloadPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=rough if half else exact, offload_policy=place)
    fully_shard(root, mesh=mesh, mp_policy=exact, offload_policy=place)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums, not means: losses are divided by counts of the whole iteration
            module.set_force_sum_reduction_for_comms(True)


def forget_forward(root: nn.Module) -> None:
    """After a forward pass whose backward pass is not run: the root gives its gathered parameters back, else the next pass would reuse them."""
    if isinstance(root, FSDPModule):
        root.reshard()


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole tensor, on its device, cast before it travels. A collective call for a sharded one."""
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into a target that may be sharded. A collective call for a sharded one."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device, target.dtype), target.device_mesh, target.placements)
    target.copy_(source)


def as_number(value: Any) -> float:
    """A norm that may be a sum over shards."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)
