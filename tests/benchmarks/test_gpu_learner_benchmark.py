"""The GPU benchmark of the learner on a tiny model: it runs, and counts FLOPs as its docstring says."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from benchmarks.gpu import learner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    learner.make_model(directory, learner.TINY)
    return directory


@pytest.mark.parametrize("variant", ["plain", "lora"])
def test_a_variant_is_measured(model: Path, variant: str) -> None:
    options = argparse.Namespace(variant=variant, model=model, tokens=32, samples=2, iterations=1, peak_tflops=1.0)
    found = learner.measure(options)
    assert found["tokens_per_s"] == pytest.approx(64 / found["iteration_s"])
    assert 0 < found["mfu"] == pytest.approx(found["tflops"]) and found["peak_gb"] > 0
    assert variant in learner.table([found])


def test_flops_are_six_for_each_trained_number_and_the_causal_attention(model: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(model)
    embedding = 2048 * 64
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    assert learner.flops_per_token(network, 100) == 6 * (embedding + 2 * layer) + 6 * 2 * 64 * 100
    network.requires_grad_(False)
    assert learner.flops_per_token(network, 0) == 4 * (embedding + 2 * layer)
