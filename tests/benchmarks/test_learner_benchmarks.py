"""The learner's benchmarks compare the same work: every layout trains on the same tokens, every head gives the same log-probs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import logprob
from benchmarks.learner import UnsortedStep, make_samples
from learner.parallel import SingleProcess
from learner.settings import LearnerSettings
from learner.step import Step
from tests.learner.conftest import save_model


def test_layouts_train_on_the_same_tokens(tmp_path: Path) -> None:
    directory = save_model(tmp_path, vocab_size=762, scale=1.0)
    samples = make_samples("quickstart", 0)[:16]
    found = []
    for layout, kind in (("sorted", UnsortedStep), ("sorted", Step), ("packed", Step), ("shared", Step)):
        settings = LearnerSettings.model_validate({"device": "cpu", "dtype": "float32", "layout": layout})
        found.append(kind(settings, directory, SingleProcess()).train(samples, 0, 1).values)
    for values in found[1:]:
        assert values["tokens_trained"] == found[0]["tokens_trained"] == sum(len(s.token_ids) for s in samples)
        assert values["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=1e-4)


def test_the_naive_head_needs_several_times_the_memory() -> None:
    """Measured in processes of their own; 128 MiB of logits in float32 stand out from what importing leaves."""
    naive, kept = (logprob.in_child(way, 512, 8, 65536, "float32", 1) for way in ("naive", "kept"))
    assert kept["seconds"] > 0 and naive["bytes"] > 1.4 * kept["bytes"] > 128 * 2**20
