"""Weights in pickles with objects of all kinds beside them; nothing of the file is imported or run."""

import argparse
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from case import Case, Made, State, weights
from torch import nn


KIND = "Objects beside weights"


class Command:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("true",)


def training(folder: Path, beside: Callable[[], dict[str, Any]]) -> Made:
    state = weights()
    torch.save({"model": state, **beside()}, folder / "last.pt")
    return folder / "last.pt", state


def optimizer() -> dict[str, Any]:
    layer = nn.Linear(4, 4)
    adam = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    adam.step()
    return {"optimizer": adam.state_dict(), "epoch": 3}


def whole_module(folder: Path) -> Made:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    torch.save(model, folder / "model.pt")
    return folder / "model.pt", dict(model.state_dict())


def plain_pickle(folder: Path) -> Made:
    state: State = weights()
    (folder / "weights.pkl").write_bytes(pickle.dumps({name: tensor.numpy() for name, tensor in state.items()}))
    return folder / "weights.pkl", state


def beside(name: str, layout: str, objects: Callable[[], dict[str, Any]]) -> Case:
    return Case(name, KIND, layout, "torch", partial(training, beside=objects))


CASES = [
    beside("pickle-optimizer", "an optimizer's state", optimizer),
    beside("pickle-numpy", "a NumPy scalar and array", lambda: {"best": np.float64(0.5), "history": np.arange(3.0)}),
    beside("pickle-namespace", "argparse.Namespace and a Path", lambda: {"args": argparse.Namespace(out=Path("x"))}),
    beside("pickle-loss", "a loss module", lambda: {"loss": nn.CrossEntropyLoss()}),
    beside("pickle-command", "an object that would run a command", lambda: {"x": Command()}),
    Case("pickle-module", KIND, "a whole module by torch.save", "torch", whole_module),
    Case("pickle-plain", KIND, "NumPy arrays by pickle.dump", "numpy", plain_pickle),
]
