"""Small networks of several owners, as folders; and a family of fine-tunes whose tree is known."""

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn


def write_model(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def new_net(seed: int, hidden: int = 24, scale: float = 1.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        )
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(scale)
    return net


def train(net: nn.Module, seed: int, steps: int = 120, learning_rate: float = 1e-3, classes: int = 10) -> nn.Module:
    """A copy of the net, trained to tell digits apart; with fewer classes, on a task of its own with a new head."""
    net = copy.deepcopy(net)
    digits, draw = load_digits(), torch.Generator().manual_seed(seed)
    images, labels = torch.from_numpy(digits.data).float() / 8 - 1, torch.from_numpy(digits.target)
    if classes < 10:
        labels = torch.randperm(10, generator=draw)[labels] % classes
        net[-1] = new_net(seed, net[-1].in_features)[-1]
        net[-1].weight, net[-1].bias = (nn.Parameter(p[:classes].clone()) for p in (net[-1].weight, net[-1].bias))
    optimizer = torch.optim.AdamW(net.parameters(), learning_rate)
    for _ in range(steps):
        batch = torch.randint(len(images), (32,), generator=draw)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()
    return net


def write_population(folder: Path) -> Path:
    """Sixteen unrelated networks, each of an owner of its own."""
    for i in range(16):
        net = new_net(i, hidden=16 + 2 * (i % 5), scale=0.6 + 0.07 * i)
        write_model(folder / f"owner{i:02d}--net", net.state_dict())
    return folder


# child -> parent
TREE = {"a": "root", "b": "root", "c": "root", "a1": "a", "a2": "a", "b1": "b", "b11": "b1"}


def write_family(folder: Path) -> Path:
    """The models of TREE, and two strangers."""
    nets = {"root": train(new_net(100), 100, 300, 2e-3)}
    for seed, (child, parent) in enumerate(TREE.items()):
        nets[child] = train(nets[parent], seed, classes=5 + seed % 4)
    for name in ("stranger-1", "stranger-2"):
        nets[name] = train(new_net(200 + len(nets)), 100, 300, 2e-3)
    for name, net in nets.items():
        write_model(folder / name, net.state_dict())
    return folder
