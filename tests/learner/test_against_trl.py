"""Objectives and advantages against TRL's own trainers: the same model, tokens, log-probs and rewards give the same numbers and gradients.

Differences by name, which docs/objectives.md lists: see DIFFERENCES there. Skipped where TRL is not installed (it is part of the dev extra).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.advantages import advantages
from learner.loss import Inputs, Loss
from learner.model import CausalModel
from learner.packing import TrainSample, weigh
from learner.settings import LearnerSettings
from learner.sharing import build_shared, plan_shared
from tests.learner.conftest import save_model
from tests.learner.samples import VOCABULARY, random_samples

pytest.importorskip("accelerate", reason="TRL is not installed: pip install -e '.[dev]'")

LONGEST = 24
TEMPERATURE = 0.8
GROUPS, GROUP_SIZE = 3, 4
REWARDS = [1.0, 0.0, 0.5, 0.25, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]


pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and what it imports warn about themselves


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """Also while fixtures are made; and one thread, because models this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reference_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("reference"), seed=1)


def trainer(kind: str, model_dir: Path, scratch: Path, **settings: Any) -> Any:
    """TRL's trainer on the model in float64; its reward function gives REWARDS in turn."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    prompts = [f"w{5 + i} w7" for i in range(GROUPS)]
    return getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: REWARDS[: len(completions)],
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        args=getattr(trl, f"{kind}Config")(
            output_dir=str(scratch), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", temperature=TEMPERATURE,
            per_device_train_batch_size=GROUPS * GROUP_SIZE, num_generations=GROUP_SIZE, max_completion_length=LONGEST, max_steps=1,
            disable_tqdm=True, dataloader_pin_memory=False, logging_steps=10**6, **settings,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def grpo(quiet: None, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = trainer("GRPO", model_dir, tmp_path_factory.mktemp("trl"), beta=0.0)
    made.model.eval()  # no dropout, and no division by accumulation steps
    return made


def padded(rows: list[Any], *, left: bool = False, dtype: torch.dtype = torch.long) -> torch.Tensor:
    width = max(map(len, rows))
    made = torch.zeros(len(rows), width, dtype=dtype)
    for row, values in zip(made, rows, strict=True):
        row[width - len(values) : width] = torch.as_tensor(values) if left else 0
        if not left:
            row[: len(values)] = torch.as_tensor(np.asarray(values))
    return made


def batch_for_trl(samples: list[TrainSample], reference_dir: Path | None) -> dict[str, torch.Tensor]:
    prompts, tokens = [s.prompt_ids.astype(np.int64) for s in samples], [s.token_ids.astype(np.int64) for s in samples]
    ones = [np.ones(len(t), np.int64) for t in tokens]
    inputs = {
        "prompt_ids": padded(prompts, left=True),
        "prompt_mask": padded([np.ones(len(p), np.int64) for p in prompts], left=True),
        "completion_ids": padded(tokens),
        "completion_mask": padded(ones),
        "tool_mask": padded([s.loss_mask.astype(np.int64) for s in samples]),
        "advantages": torch.tensor([s.advantage for s in samples], dtype=torch.float64),
        "old_per_token_logps": padded([s.behaviour_logprobs for s in samples], dtype=torch.float64),
        "num_items_in_batch": torch.tensor(float(sum(s.num_trainable for s in samples)), dtype=torch.float64),
    }
    if reference_dir is not None:
        found = reference_logprobs(samples, reference_dir)
        inputs["ref_per_token_logps"] = padded([found[i] for i in range(len(samples))], dtype=torch.float64)
    return inputs


def reference_logprobs(samples: list[TrainSample], directory: Path) -> dict[int, torch.Tensor]:
    """Log-probs [T] of all tokens of each sample."""
    from tests.learner.reference import Reference

    reference = Reference(directory, lr=0.0, eps=1e-8)
    with torch.no_grad():
        return {i: reference.logprobs(sample) for i, sample in enumerate(samples)}


def ours(
    settings: dict[str, Any], model_dir: Path, samples: list[TrainSample], reference_dir: Path | None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients over all micro-batches of the shared layout."""
    checked = LearnerSettings.model_validate({"dtype": "float64", "device": "cpu", "correction": {"mode": "off"}, **settings})
    model = CausalModel(model_dir, device=torch.device("cpu"), dtype="float64")
    loss, weighted = Loss(checked), weigh(samples, checked.aggregation, checked.aggregation_length)
    reference = reference_logprobs(samples, reference_dir) if reference_dir is not None else {}
    total = 0.0
    for units in plan_shared(samples, range(len(samples)), 100, 1, 0):
        batch = build_shared(weighted, units)
        policy_T, entropy_T = model.token_logprobs(batch, entropy_gradient=loss.entropy_gradient)
        reference_T = torch.cat([reference[i][torch.from_numpy(samples[i].loss_mask)] for i in batch.samples]) if reference else None
        inputs = Inputs(policy_T=policy_T, entropy_T=entropy_T, proximal_T=policy_T.detach(), reference_T=reference_T)
        micro = loss(batch, inputs, corrected=False, entropy_coefficient=checked.entropy.coefficient).total
        micro.backward()
        total += micro.item()
    return total, {name: p.grad for name, p in model.network.named_parameters()}


@pytest.fixture(scope="module")
def samples(model_dir: Path) -> list[TrainSample]:
    """Behaviour log-probs near those of the model, so that ratios fall on both sides of every bound; masked tokens in the middle."""
    import dataclasses

    found = [s for s in random_samples(14, temperature=TEMPERATURE) if s.num_trainable]
    near = reference_logprobs(found, model_dir)
    rng = np.random.default_rng(0)
    return [
        dataclasses.replace(s, behaviour_logprobs=(near[i].numpy() + rng.normal(0, 0.5, len(s.token_ids))).astype(np.float32))
        for i, s in enumerate(found)
    ]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "GRPO": (
        {"objective_options": {"clip_low": 0.2, "clip_high": 0.2}, "aggregation": "sequence_mean"},
        {"loss_type": "grpo", "epsilon_high": 0.2},
    ),
    "DAPO": ({"objective_options": {"clip_low": 0.2, "clip_high": 0.28}}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "BNPO": ({"objective_options": {"clip_low": 0.2, "clip_high": 0.28}}, {"loss_type": "bnpo", "epsilon_high": 0.28}),
    "Dr. GRPO": (
        {"objective_options": {"clip_high": 0.2}, "aggregation": "constant_length", "aggregation_length": LONGEST},
        {"loss_type": "dr_grpo", "epsilon_high": 0.2},
    ),
    "dual clip": (
        {"objective": "dual_clip", "objective_options": {"clip_low": 0.2, "clip_high": 0.28, "floor": 1.5}},
        {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.5},
    ),
    "CISPO": (  # TRL bounds the weight itself, from above alone
        {"objective": "cispo", "objective_options": {"clip_low": 1.0, "clip_high": 0.4}},
        {"loss_type": "cispo", "epsilon_high": 1.4},
    ),
    "GSPO": (
        {"objective": "gspo", "objective_options": {"clip_low": 0.1, "clip_high": 0.15}, "aggregation": "sequence_mean"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15},
    ),
    "KL": (  # TRL's default weighs the estimate by the ratio (DeepSeek-V3.2); ours is the plain one
        {"kl": {"coefficient": 0.3, "estimator": "k3"}},
        {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.3, "use_bias_correction_kl": False},
    ),
    "entropy bonus": (
        {"entropy": {"coefficient": 0.05}},
        {"loss_type": "dapo", "epsilon_high": 0.28, "_entropy_bonus_enabled": True, "entropy_coef": 0.05},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_those_of_trl(
    name: str, grpo: Any, model_dir: Path, reference_dir: Path, samples: list[TrainSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, theirs = CASES[name]
    with_reference = reference_dir if "beta" in theirs else None
    for key, value in {"epsilon_low": 0.2, "importance_sampling_level": "token", **theirs}.items():
        monkeypatch.setattr(grpo.args if key in ("delta", "use_bias_correction_kl") else grpo, key, value)
    grpo.model.zero_grad()
    loss = grpo._compute_loss(grpo.model, batch_for_trl(samples, with_reference))
    loss.backward()
    found, gradients = ours(settings, model_dir, samples, with_reference)
    assert found == pytest.approx(loss.item(), rel=1e-5)
    for parameter, p in grpo.model.named_parameters():
        torch.testing.assert_close(
            gradients[parameter], p.grad, rtol=1e-5, atol=1e-5 * float(p.grad.abs().max()), msg=lambda m, n=parameter: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("kind", "name", "settings"),
    [
        ("GRPO", "grpo", {"scale_rewards": "group"}),
        ("GRPO", "dr_grpo", {"scale_rewards": "none"}),
        ("RLOO", "rloo", {}),
    ],
)
def test_advantages_equal_those_of_trl(
    quiet: None, model_dir: Path, tmp_path: Path, kind: str, name: str, settings: dict[str, Any]
) -> None:
    """TRL samples completions of its own; rewards, the only thing that counts, are the same."""
    made = trainer(kind, model_dir, tmp_path, beta=0.0, **settings)
    made.args.max_completion_length = made.max_completion_length = 2
    made.current_gradient_accumulation_steps = 1
    rows = [{"prompt": f"w{5 + i // GROUP_SIZE} w7"} for i in range(GROUPS * GROUP_SIZE)]
    with torch.no_grad():
        theirs = made._generate_and_score_completions(rows)["advantages"]
    found = advantages(name, {}, REWARDS, [i // GROUP_SIZE for i in range(len(rows))])
    assert theirs.tolist() == pytest.approx(found.tolist(), rel=1e-5, abs=1e-6)
