"""The model that is trained: load it, and find the log-probs of the tokens that a micro-batch trains on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from learner import attention, flex
from learner.logprobs import capped_logits, head_logprobs
from learner.lora import adapter_parts, add_adapters, merged_tensors, without_adapters
from learner.optimizers import Trained
from learner.packing import Block, MicroBatch
from learner.parallel import Group, SingleProcess
from learner.settings import LoraSettings, Sharding
from learner.sharding import is_sharded, shard, whole
from protocol.errors import DataError

PLAIN = frozenset({"llama", "mistral", "gemma", "phi", "phi3"})
"""Families that do not list their layers' kinds: without a sliding window all of them attend to everything before."""


class CausalModel:
    """A transformers causal language model, split into the part below its head and the head.

    Parameters are masters in float32 (float64 if asked for). Dropout is off: the ratio to the behaviour policy would otherwise be noise.
    """

    def __init__(
        self,
        directory: Path,
        *,
        device: torch.device,
        dtype: str,
        gradient_checkpointing: bool = False,
        group: Group | None = None,
        sharding: Sharding = "none",
        offload: bool = False,
        lora: LoraSettings | None = None,
    ) -> None:
        """Raises DataError when `directory` holds no such model, or one whose logits are more than its head times its hidden states."""
        transformers_logging.disable_progress_bar()
        self.device = device
        self.autocast = dtype == "bfloat16"
        try:
            self.network: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float64 if dtype == "float64" else torch.float32, local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"no causal language model can be read from {directory}: {error}") from error
        self.network.eval()
        self._attention: str = self.network.config._attn_implementation  # eager where transformers has nothing else (caps of Gemma 2)
        on_gpu = device.type == "cuda" and dtype != "float64" and self.shares_prompts
        self.packed_attention: Literal["flex", "dense mask"] = "flex" if on_gpu else "dense mask"
        self.head: nn.Linear = self.network.get_output_embeddings()
        self._check_head(directory)
        self.lora = lora
        if lora is not None:
            add_adapters(self.network, lora, half=self.autocast)
        group = group or SingleProcess()
        self.sharded = is_sharded(sharding, group, self.network, device)
        if not self.sharded:
            self.network.to(device)
        self.trunk: nn.Module = self.network.get_decoder()
        if gradient_checkpointing:
            renamed = hasattr(self.network, "activation_checkpointing_enable")  # in transformers 5.2x; the old name warns from then on
            (self.network.activation_checkpointing_enable if renamed else self.network.gradient_checkpointing_enable)()
            self.network.train()
            _turn_dropout_off(self.network)
        self.policy = _Policy(self.network)
        if self.sharded:
            shard(self.policy, _layers(self.network), group, device, half=self.autocast, offload=offload)

    @property
    def shares_prompts(self) -> bool:
        """Whether attention may be our own (shared prompts, packed rows): all layers attend to everything before them, by plain products
        and rotary positions.
        """
        config = self.network.config.get_text_config()
        if self._attention != "sdpa":
            return False
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            return config.model_type in PLAIN and getattr(config, "sliding_window", None) is None
        return set(kinds) == {"full_attention"}

    def named_tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers under their transformers names, tied weights once. Live tensors, no copies."""
        tensors: dict[str, Tensor] = dict(self.network.named_parameters())
        for name, value in self.network.state_dict(keep_vars=True).items():
            if not isinstance(value, nn.Parameter):
                tensors[name] = value
        return tensors

    def state_tensors(self) -> dict[str, Tensor]:
        """The part of `named_tensors` that training changes: all of it, or the adapters."""
        tensors = self.named_tensors()
        return tensors if self.lora is None else {name: tensor for name, tensor in tensors.items() if ".lora_" in name}

    def published_tensors(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """The whole model under its transformers names, adapters merged, one tensor after the other. A collective call when sharded."""
        tensors = self.named_tensors()
        if self.lora is not None:
            yield from merged_tensors(self.network, tensors, dtype)
            return
        for name in sorted(tensors):
            yield name, whole(tensors[name].detach(), dtype)

    def version_tensors(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """What a published version holds: `published_tensors`, or the adapters alone under the names of a peft directory."""
        if self.lora is not None and self.lora.publish == "adapter":
            return adapter_parts(self.named_tensors(), dtype)
        return self.published_tensors(dtype)

    def frozen(self) -> AbstractContextManager[None]:
        """The model that training started from, while adapters are what is trained."""
        return without_adapters(self.network)

    def trained(self) -> list[Trained]:
        """The parameters that are trained, tied weights once."""
        tables = {id(self.network.get_input_embeddings().weight), id(self.head.weight)}
        return [Trained(name, p, id(p) in tables) for name, p in self.network.named_parameters() if p.requires_grad]

    def token_logprobs(self, batch: MicroBatch, *, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probs [T] of the micro-batch's trainable tokens and entropies [T] of their distributions, at the sampling temperature.

        Entropies are in nats and carry a gradient only when asked to.
        """

        def place(array: Any) -> Tensor:
            return torch.from_numpy(array).to(self.device, non_blocking=True)

        arguments: dict[str, Any] = {"input_ids": place(batch.input_ids), "use_cache": False}
        if batch.position_ids is not None:
            arguments["position_ids"] = place(batch.position_ids)
        self.network.config._attn_implementation = self._attention
        if batch.blocks is not None:
            self.network.config._attn_implementation = attention.NAME
            arguments["block_plan"] = self._block_plan(batch.blocks, batch.input_ids.shape[1])
        elif batch.position_ids is not None and self.packed_attention == "flex":
            self.network.config._attn_implementation = flex.NAME
            arguments["document_mask"] = flex.block_mask(batch.position_ids, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            found: tuple[Tensor, Tensor] = self.policy(
                arguments, place(batch.hidden_T), place(batch.targets_T), place(batch.temperature_T), entropy_gradient=entropy_gradient
            )
        return found

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self.network.config.get_text_config().vocab_size)

    @torch.no_grad()
    def sequence_logprobs(self, ids: npt.NDArray[np.int32], first: int, *, half: bool) -> npt.NDArray[np.float32]:
        """Log-probs [len(ids) - first] of one sequence's tokens from `first` on, at temperature 1; in float32 unless `half`."""
        tokens = torch.from_numpy(ids).long().to(self.device)
        places = torch.arange(first - 1, len(ids) - 1, device=self.device)
        self.network.config._attn_implementation = "sdpa"
        arguments: dict[str, Any] = {"input_ids": tokens[None], "use_cache": False}
        temperature = torch.ones(len(places), dtype=torch.float64, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            logprobs: Tensor = self.policy(arguments, places, tokens[first:], temperature, entropy_gradient=False)[0]
        return np.asarray(logprobs.float().cpu().numpy(), np.float32)

    def _block_plan(self, blocks: tuple[Block, ...], num_tokens: int) -> attention.BlockPlan:
        config = self.network.config.get_text_config()
        dtype = torch.bfloat16 if self.autocast else self.head.weight.dtype
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        return attention.BlockPlan(blocks, num_tokens, heads, kv_heads, device=self.device, dtype=dtype)

    @torch.no_grad()
    def _check_head(self, directory: Path) -> None:
        """A soft cap is known by its name. Whatever else a model does after its head shows in a comparison of one token."""
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.head.weight.device)
        found = self.network(input_ids=ids, use_cache=False).logits
        expected = capped_logits(
            self.head(self.network.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state), soft_cap(self.network)
        )
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise DataError(f"{directory}: the model changes its logits after the head (it scales them, say), which is not supported")


class _Policy(nn.Module):
    """From token ids to log-probs as one module: what is gathered at its start stays until the head has been used."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, arguments: dict[str, Any], hidden_T: Tensor, targets_T: Tensor, temperature_T: Tensor, *, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Log-probs [T] of the targets and entropies [T]."""
        hidden_RLD = self.network.get_decoder()(**arguments).last_hidden_state
        hidden_TD = hidden_RLD.flatten(0, 1).index_select(0, hidden_T)
        head = self.network.get_output_embeddings()
        found = head_logprobs(
            hidden_TD, head.weight, head.bias, targets_T, temperature_T, cap=soft_cap(self.network), entropy_gradient=entropy_gradient
        )
        return found[0].clone(), found[1].clone()  # FSDP hangs its hook on these, which a view would lose


def soft_cap(network: Any) -> float | None:
    """The bound that some models (Gemma 2) bend their logits under."""
    cap: float | None = getattr(network.config.get_text_config(), "final_logit_softcapping", None)
    return cap


def _layers(network: Any) -> list[nn.Module]:
    """The decoder layers: what transformers itself never splits over devices."""
    names = set(getattr(network, "_no_split_modules", None) or ())
    return [module for module in network.modules() if type(module).__name__ in names]


def _turn_dropout_off(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
