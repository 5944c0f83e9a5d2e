"""The chunked head against the naive one: values, every gradient, and memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learner import logprobs
from learner.logprobs import chunked_logprobs, head_logprobs, naive_logprobs


def inputs(tokens: int = 37, hidden: int = 16, vocabulary: int = 211, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(tokens, hidden, generator=generator, dtype=dtype).requires_grad_()
    weight_VD = torch.randn(vocabulary, hidden, generator=generator, dtype=dtype).requires_grad_()
    targets_T = torch.randint(vocabulary, (tokens,), generator=generator)
    temperature_T = torch.rand(tokens, generator=generator, dtype=dtype) + 0.5
    return [hidden_TD, weight_VD, targets_T, temperature_T]


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("kept", [0, 2**28])
@pytest.mark.parametrize("chunk", [211, 211 * 5, 211 * 100])
def test_chunked_equals_naive(monkeypatch: pytest.MonkeyPatch, chunk: int, kept: int, entropy_gradient: bool) -> None:
    for name, value in (("CHUNK_LOGITS", chunk), ("CACHED_LOGITS", chunk), ("KEPT_BYTES", kept)):
        monkeypatch.setattr(logprobs, name, value)
    hidden_TD, weight_VD, targets_T, temperature_T = inputs()
    slopes = torch.randn(2, 37, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for way in (
        lambda: naive_logprobs(hidden_TD, weight_VD, None, targets_T, temperature_T, entropy_gradient=entropy_gradient),
        lambda: chunked_logprobs(hidden_TD, weight_VD, targets_T, temperature_T, entropy_gradient=entropy_gradient),
    ):
        logprobs_T, entropy_T = way()
        assert entropy_T.requires_grad == entropy_gradient
        total = (logprobs_T * slopes[0]).sum() + (entropy_T * slopes[1]).sum()
        found.append((logprobs_T, entropy_T, *torch.autograd.grad(total, (hidden_TD, weight_VD))))
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)


def test_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CACHED_LOGITS", 3 * 11)
    hidden_TD, weight_VD, targets_T, temperature_T = inputs(7, 3, 11)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_logprobs(h, w, targets_T, temperature_T, entropy_gradient=True), (hidden_TD, weight_VD)
    )


def test_autocast_rounds_the_products_alone() -> None:
    hidden_TD, weight_VD, targets_T, temperature_T = inputs(64, 32, 5000, torch.float32)
    exact, _ = chunked_logprobs(hidden_TD, weight_VD, targets_T, temperature_T)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = chunked_logprobs(hidden_TD, weight_VD, targets_T, temperature_T)
        naive, _ = naive_logprobs(hidden_TD, weight_VD, None, targets_T, temperature_T)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert (rough - exact).abs().mean() < 1.2 * (naive - exact).abs().mean()
    (gradient,) = torch.autograd.grad(rough.sum(), weight_VD)
    assert gradient.dtype == torch.float32


def test_the_way_depends_on_the_vocabulary_and_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(logprobs, "naive_logprobs", lambda *_, **__: taken.append("naive"))
    monkeypatch.setattr(logprobs, "chunked_logprobs", lambda *_, **__: taken.append("chunked"))
    none = torch.zeros(0)
    for vocabulary, bias in ((logprobs.NAIVE_VOCABULARY, None), (logprobs.NAIVE_VOCABULARY + 1, None), (10**5, none)):
        head_logprobs(none, torch.zeros(vocabulary, 1), bias, none, none)
    assert taken == ["naive", "chunked", "naive"]


def test_no_tensor_of_tokens_by_vocabulary_is_kept_when_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd saves between forward and backward."""
    monkeypatch.setattr(logprobs, "KEPT_BYTES", 2**20)
    hidden_TD, weight_VD, targets_T, temperature_T = inputs(200, 8, 5000, torch.float32)
    sizes: dict[str, list[int]] = {"naive": [], "chunked": []}
    for name, way in (
        ("naive", lambda: naive_logprobs(hidden_TD, weight_VD, None, targets_T, temperature_T)),
        ("chunked", lambda: chunked_logprobs(hidden_TD, weight_VD, targets_T, temperature_T)),
    ):

        def pack(tensor: Tensor, name: str = name) -> Tensor:
            sizes[name].append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            way()
    assert max(sizes["naive"]) == 200 * 5000 and max(sizes["chunked"]) == 5000 * 8
