"""Every optimizer of the table: it learns, goes on from its state to the same bits, and says clearly where it cannot work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from learner.optim import Updater
from learner.optimizers import OPTIMIZERS, Trained
from learner.settings import OptimizerSettings
from protocol.errors import ConfigError

BITSANDBYTES = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit")


class Tiny(nn.Module):
    """Every kind of parameter: a table, hidden matrices (one large enough to be quantised), norms and biases."""

    def __init__(self, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(32, 64)
        self.hidden = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.LayerNorm(128))
        self.head = nn.Linear(128, 32)
        self.to(device)

    def loss(self) -> Tensor:
        ids = torch.arange(32, device=self.embedding.weight.device)
        return cross_entropy(self.head(self.hidden(self.embedding(ids))), (ids * 7 + 3) % 32)

    def trained(self) -> list[Trained]:
        return [Trained(name, p, name.startswith(("embedding", "head"))) for name, p in self.named_parameters()]


def device_for(name: str) -> str:
    if name in BITSANDBYTES:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install 'rlsys[low-memory]')")
    if name.startswith("paged_"):
        if not torch.cuda.is_available():
            pytest.skip("paging needs a CUDA device and there is none")
        return "cuda"
    return "cpu"


def settings(name: str) -> OptimizerSettings:
    return OptimizerSettings(name=name, lr=3e-3, weight_decay=0.01)


def steps(model: Tiny, updater: Updater, count: int) -> list[float]:
    losses = []
    for i in range(count):
        updater.set_rate(3e-3 * (1 - i / 100))
        loss = model.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        updater.step()
        updater.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns(name: str) -> None:
    model = Tiny(device_for(name))
    losses = steps(model, Updater(model.trained(), settings(name)), 30)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_goes_on_from_its_state_to_the_same_bits(name: str) -> None:
    device = device_for(name)
    whole, again = Tiny(device), Tiny(device)
    updater = Updater(whole.trained(), settings(name))
    steps(whole, updater, 4)
    state = {key: tensor.clone() for key, tensor in updater.state().items()}
    assert {key.split(".", 2)[2] for key in state} == {one.name for one in whole.trained()}
    again.load_state_dict(whole.state_dict())
    resumed = Updater(again.trained(), settings(name))
    targets = resumed.state_to_fill({key: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in state.items()})
    for key, target in targets.items():
        target.copy_(state[key])
    resumed.adopt(targets)
    assert steps(again, resumed, 4) == steps(whole, updater, 4)
    found = resumed.state()
    assert all(torch.equal(tensor, found[key]) for key, tensor in updater.state().items())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_on_the_host_it_computes_the_same(name: str) -> None:
    """The copies down and up run on a CPU too; what they save needs a GPU to be seen."""
    here, there = Tiny("cpu"), Tiny("cpu")
    plain, offloaded = Updater(here.trained(), settings(name)), Updater(there.trained(), settings(name), on_host=True)
    assert steps(here, plain, 3) == steps(there, offloaded, 3)
    resumed = Updater(there.trained(), settings(name), on_host=True)
    resumed.adopt({key: tensor.clone() for key, tensor in offloaded.state().items()})
    assert steps(here, plain, 2) == steps(there, resumed, 2)


def test_the_8_bit_state_is_a_quarter() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install 'rlsys[low-memory]')")
    sizes = {}
    for name in ("adamw", "adamw_8bit"):
        model = Tiny("cpu")
        updater = Updater(model.trained(), settings(name))
        steps(model, updater, 1)
        sizes[name] = sum(tensor.nbytes for key, tensor in updater.state().items() if key.endswith("hidden.0.weight"))
    assert sizes["adamw_8bit"] < 0.27 * sizes["adamw"]


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paging_without_a_gpu_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer '{name}' pages GPU memory and the learner runs on a CPU: take adamw or adamw_8bit"):
        Updater(Tiny("cpu").trained(), settings(name))


@pytest.mark.parametrize("name", BITSANDBYTES[:1])
def test_8_bits_of_float64_are_refused(name: str) -> None:
    model = Tiny("cpu").double()
    with pytest.raises(ConfigError, match="computes in float32"):
        Updater(model.trained(), settings(name))
