"""The networks of a lab zoo: made from a member's settings, written as timm folders and read back."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from hf_wsl.options import ConfigError

from .members import STACKED, Member
from .zoo_config import DEFAULT, ZooConfig


# timm's ResNet-18 at a quarter of its width, on a stem of three small convolutions: 0.7 million parameters.
RESNET18_SLIM = {"stem_type": "deep", "stem_width": 8, "channels": [16, 32, 64, 128]}
# What timm knows of an architecture's pretrained weights, and is not so of a member's; `save_for_hf` would write it.
NOT_PRETRAINED = dict.fromkeys(("tag", "license", "origin_url", "paper_ids", "paper_name"))
INITIALIZERS = {
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "kaiming_normal": nn.init.kaiming_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "uniform": lambda weight: nn.init.uniform_(weight, -0.1, 0.1),
    "normal": lambda weight: nn.init.normal_(weight, std=0.1),
}


def network_args(config: ZooConfig, member: Member) -> tuple[str, dict[str, Any]]:
    """timm's name and arguments of a member's network, but for the numbers of classes and channels."""
    args = dict(config.architecture_args)
    name = config.architecture
    if name == STACKED:
        args["img_size"] = config.data_config.image_size
    elif name == "resnet18_slim":
        name, args = "resnet18", {**RESNET18_SLIM, **args}
    if member.activation != DEFAULT:
        args["act_layer"] = member.activation
    return name, args


def new_network(config: ZooConfig, member: Member, num_classes: int) -> nn.Module:
    """A member as it is before the first step: with random weights that follow from its seed, or with its parent's.

    Raises:
        ConfigError: timm does not have the architecture, or not with these arguments; the parent does not fit.
    """
    name, args = network_args(config, member)
    if not timm.is_model(name):
        raise ConfigError(f"option 'architecture' is '{name}', which is neither small_cnn, resnet18_slim nor of timm")
    dropout = {"drop_rate": member.dropout} if member.dropout else {}
    channels = config.data_config.channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(member.seed)
        try:
            network = timm.create_model(
                name,
                pretrained_cfg_overlay=NOT_PRETRAINED,
                num_classes=num_classes,
                in_chans=channels,
                **args,
                **dropout,
            )
        except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
            raise ConfigError(f"{name} cannot be built with {args | dropout}: {error!r}. Correct them") from error
        if member.initialization != DEFAULT:
            initialize(network, member.initialization)
    if member.parent_folder:
        state = safetensors.torch.load_file(Path(member.parent_folder) / "model.safetensors")
        shapes = {key: value.shape for key, value in network.state_dict().items()}
        if {key: value.shape for key, value in state.items()} != shapes:
            raise ConfigError(
                f"{member.parent} of 'parents' has tensors of other shapes than {name} on these images; give images "
                "of the same size, channels and number of classes"
            )
        network.load_state_dict(state)
    return network


def initialize(network: nn.Module, initialization: str) -> None:
    """Draws the kernels and matrices of convolutions and linear layers anew, and sets their biases to zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            INITIALIZERS[initialization](module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def save_network(network: nn.Module, folder: Path, args: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes model.safetensors and config.json as timm reads them.

    Args:
        network: in the state to keep.
        args: of `network_args`.
        facts: its `pretrained_cfg`: input size, mean, deviation, number of classes, license.
    """
    args = {"in_chans": facts["input_size"][0], **args}
    save_for_hf(network, folder, {"pretrained_cfg": facts}, args, safe_serialization=True)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    # Once more, with the order, which safetensors does not keep: readers that do not know small_cnn go by it.
    # One entry alone: safetensors writes several in an order that changes from run to run.
    order = {"tensor_order": json.dumps(list(state))}
    safetensors.torch.save_file(state, folder / "model.safetensors", order)


def load_member(folder: str | PathLike) -> nn.Module:
    """The network of a checkpoint folder of a lab zoo, in eval mode.

    Raises:
        OSError, ValueError: no such folder, or one that timm cannot read.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint of a zoo: it has no config.json. Name .../epoch_NNN.")
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
