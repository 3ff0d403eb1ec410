"""Small models in folders, to be embedded."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


def network(*widths: int, seed: int) -> nn.Sequential:
    """Linear layers of these widths on 12 inputs."""
    torch.manual_seed(seed)
    sizes = [12, *widths]
    return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)))


def write_model(folder: Path, model: nn.Module) -> None:
    folder.mkdir(parents=True)
    state = model.state_dict()
    save_file(state, folder / "model.safetensors", metadata={"tensor_order": json.dumps(list(state))})
