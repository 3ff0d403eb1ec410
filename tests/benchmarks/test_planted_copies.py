"""Copies that a benchmark plants: of the kinds and sizes that are stated, and of the same function."""

import sys
from pathlib import Path

import pytest
import torch
from search_fixtures import new_net, write_population
from torch import nn

from datasets_scripts.sources import expand_sources


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from planted_copies import copies_of, permute_hidden, plant_copies  # noqa: E402


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CHAINS = {
    "mlp": (nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 2)), (3, 5), 2),
    "cnn": (
        nn.Sequential(
            *[nn.Conv2d(1, 8, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(8, 6, 5), nn.ReLU(), nn.Conv2d(6, 4, 2)],
            *[nn.Flatten(), nn.Linear(4 * 7 * 7, 20), nn.ReLU(), nn.Linear(20, 10)],
        ),
        (2, 1, 28, 28),
        4,
    ),
    "batch norm": (
        nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False)),
        (2, 3, 8, 8),
        1,
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_with_permuted_hidden_neurons_computes_the_same(name):
    net, shape, hidden = CHAINS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in [*net.parameters(), *net.buffers()]:
            if parameter.is_floating_point():
                parameter.data.uniform_(0.1, 1)
    inputs = torch.randn(shape, generator=draw())
    expected = net.eval()(inputs)
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    permuted = permute_hidden(state, draw())
    changed = [key for key in state if state[key].dim() > 1 and not torch.equal(state[key], permuted[key])]
    assert len(changed) == hidden + 1
    net.load_state_dict(permuted)
    torch.testing.assert_close(net(inputs), expected, rtol=1e-4, atol=1e-4)
    net.load_state_dict(state)


@pytest.mark.parametrize(
    "net",
    [
        nn.ModuleDict({"fc1": nn.Linear(5, 9), "fc2": nn.Linear(9, 2)}),  # names do not tell what follows what
        nn.Sequential(nn.Linear(5, 9, bias=False), nn.Linear(9, 2)),  # nor which dimension is the output
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(2, 6, 3), nn.Conv2d(6, 1, 1)),  # grouped, perhaps
        nn.Sequential(nn.ConvTranspose2d(6, 6, 3), nn.ConvTranspose2d(6, 6, 3)),
        nn.Sequential(nn.ConvTranspose2d(6, 3, 3), nn.ConvTranspose2d(3, 6, 3)),
        nn.Sequential(nn.Linear(5, 9), nn.GroupNorm(3, 9), nn.Linear(9, 2)),
        nn.Sequential(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), nn.Linear(5, 5)),
    ],
)
def test_what_may_be_something_else_than_a_chain_is_left_alone(net):
    state = net.state_dict()
    if "0.0.weight" in state:  # the inner chain is one; the outer one holds nested modules
        permuted = permute_hidden(state, draw())
        assert permuted["1.weight"] is state["1.weight"] and permuted["0.0.weight"] is not state["0.0.weight"]
    else:
        assert permute_hidden(state, draw()) is None


def test_copies_are_of_the_kinds_and_sizes_that_are_stated():
    state = {**new_net(0).state_dict(), "n.running_var": torch.ones(4), "n.running_mean": torch.ones(4)}
    copies = dict(copies_of(state, "net", [0.01, 0.5], seed=3))
    assert list(copies) == ["exact", "float16", "noise 0.01", "noise 0.5", "permuted"]
    weight = state["2.weight"]
    for size in (0.01, 0.5):
        noise = copies[f"noise {size}"]["2.weight"] - weight
        assert noise.std() / weight.std() == pytest.approx(size, rel=0.1)
        assert torch.equal(copies[f"noise {size}"]["n.running_var"], torch.ones(4))
    assert torch.equal(copies["float16"]["2.weight"], weight.half().float())
    assert torch.equal(copies["exact"]["2.weight"], weight)
    again = dict(copies_of(state, "net", [0.5], seed=3))
    assert torch.equal(again["noise 0.5"]["2.weight"], copies["noise 0.5"]["2.weight"])
    assert torch.equal(again["permuted"]["2.weight"], copies["permuted"]["2.weight"])
    other = dict(copies_of(state, "net", [0.5], seed=4))
    assert not torch.equal(other["noise 0.5"]["2.weight"], copies["noise 0.5"]["2.weight"])
    kinds = [kind for kind, _ in copies_of({"w": torch.full((70, 70), 1e6)}, "large", [], seed=0)]
    assert kinds == ["exact"]  # overflows float16, and there is no chain


def test_planted_copies_are_models_that_can_be_read(tmp_path):
    models = write_population(tmp_path / "models")
    sources = [m for m in expand_sources([models]) if m.model_id == "owner02--net"]
    (tmp_path / "copies").mkdir()
    planted = plant_copies(sources, tmp_path / "copies", [0.1], seed=0)
    assert [copy.kind for copy in planted] == ["exact", "float16", "noise 0.1", "permuted"]
    assert [m.model_id for m in expand_sources([tmp_path / "copies"])] == [copy.model_id for copy in planted]
