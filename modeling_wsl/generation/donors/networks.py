"""Donors opened as modules, and the inputs that a network takes."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ...checkpoints.checkpoint import open_checkpoint
from ...checkpoints.reference import exists
from ..anchors import AnchorSource, match_anchors
from ..generated_model import GeneratedModel
from ..targets import Target, resolve_target
from .trace import Trace, trace_network


BUILDER = re.compile(r"(.+\.py):([A-Za-z_]\w*)")
TOKENS = 16  # of a language model's example
IMAGE_SIDE = 32  # of a network that does not say its own


@dataclass(frozen=True)
class OpenedDonor:
    """A trained network to take weights from.

    Attributes:
        module: in eval mode, on the CPU.
        target: its tensors.
        facts: where it comes from, for provenance.
        name: of it, for messages.
    """

    module: nn.Module
    target: Target
    facts: dict[str, Any]
    name: str


def open_donor(
    source: AnchorSource, build: str | Callable[[], nn.Module] | None = None, **options: Any
) -> OpenedDonor:
    """A donor as a module with its weights.

    Args:
        source: a module (its own values are taken), a `GeneratedModel`, or what `open_checkpoint` reads and whose
            architecture its config names: a timm name ("timm/..."), a folder, a Hub id.
        build: makes the module of a source that names no architecture.
        options: for `open_checkpoint`.

    Raises:
        ValueError: no architecture is known for the source.
        CheckpointError: it cannot be read safely.
    """
    if isinstance(source, GeneratedModel):
        return OpenedDonor(source.instantiate(), source.target, {"source": source.target.name}, source.target.name)
    if isinstance(source, nn.Module):
        target = resolve_target(source)
        with open_checkpoint(source, **options) as checkpoint:
            facts = {"source": f"<{type(source).__name__}>", "sha256": checkpoint.sha256()}
        return OpenedDonor(target.build().eval(), target, facts, type(source).__name__)
    target = resolve_target(built(build)) if build is not None else _architecture(source, options)
    checkpoint = open_checkpoint(source, **options)
    weights = frozenset(name for name, spec in target.tensors.items() if spec.torch_dtype.is_floating_point)
    matched = match_anchors(target, [checkpoint], weights)
    [anchor], module = matched.anchors, target.build()
    # A counter that the file lacks stays as it is built.
    state = {
        **module.state_dict(),
        **anchor.state_dict(name for name in target.tensors if name not in matched.initialized),
    }
    module.load_state_dict({name: state[target.tied.get(name, name)] for name in target.tensor_order})
    return OpenedDonor(module.float().eval(), target, anchor.facts(), str(checkpoint.source))


def _architecture(source: AnchorSource, options: Mapping[str, Any]) -> Target:
    known = {name: options[name] for name in ("revision", "token") if options.get(name) is not None}
    # A folder that is there is meant, also where timm has an architecture of its name: its weights are read.
    named = Path(source) if isinstance(source, str) and exists(source) else source
    target = resolve_target(named, **known) if isinstance(source, str | PathLike) else None
    if target is None or target.library == "plain":
        name = source if isinstance(source, str | PathLike) else f"<{type(source).__name__}>"
        raise ValueError(
            f"Donor {name} is known by its tensors only: to see which of them belong together, it must be run. Give a "
            "module with its weights loaded, a folder with a config.json, or what builds it: "
            "anchor_modules=['models.py:resnet20']."
        )
    return target


def is_builder(source: Any) -> bool:
    """Whether a text is FILE.py:FUNCTION."""
    return isinstance(source, str) and BUILDER.fullmatch(source) is not None


def network_builder(source: str | Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The function of FILE.py:FUNCTION; the file is run, as the caller asks. A function is taken as it is.

    Raises:
        ValueError: no such file or function.
    """
    if callable(source):
        return source
    match = BUILDER.fullmatch(source)
    if match is None or not Path(match[1]).is_file():
        raise ValueError(f"{source!r} names no function that builds a module; write FILE.py:FUNCTION of a file.")
    spec = importlib.util.spec_from_file_location(Path(match[1]).stem, match[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, match[2], None)):
        raise ValueError(f"{match[1]} has no function {match[2]}; write FILE.py:FUNCTION.")
    return getattr(module, match[2])


def built(source: str | Callable[[], nn.Module]) -> nn.Module:
    """The module of a builder.

    Raises:
        ValueError: it gives something else.
    """
    module = network_builder(source)()
    if not isinstance(module, nn.Module):
        raise ValueError(f"{source!r} gives a {type(module).__name__}; it must give a torch module.")
    return module


def example_inputs(module: nn.Module, images: Any = None) -> Any:
    """One or two examples that a network takes: of what is given, or of what the network says of itself.

    Returns:
        Images `[1 or 2, C, H, W]`, or keyword arguments.
    """
    if images is not None:
        few = images[:2] if isinstance(images, Tensor) else {name: value[:2] for name, value in images.items()}
        return inputs_for(module, few)
    if isinstance(module, PreTrainedModel) and module.main_input_name == "input_ids":
        vocabulary = getattr(module.config, "vocab_size", None) or 2
        length = min(TOKENS, getattr(module.config, "max_position_embeddings", TOKENS) or TOKENS)
        return {"input_ids": torch.arange(length)[None] * 7 % vocabulary}
    channels, height, width = image_shape(module)
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def image_shape(module: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a network takes, as it says itself; else a guess."""
    stem = next((child for child in module.modules() if isinstance(child, nn.Conv2d)), None)
    channels = 3 if stem is None else stem.in_channels * (stem.groups if stem.groups == 1 else 1)
    embedding = getattr(module, "patch_embed", None)
    config = getattr(module, "config", None)
    size = getattr(embedding, "img_size", None) or getattr(config, "image_size", None)
    described = getattr(module, "pretrained_cfg", None) or {}
    if size is None and described.get("input_size"):
        size = described["input_size"][1:]
    size = size or IMAGE_SIDE
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return channels, height, width


def inputs_for(module: nn.Module, inputs: Any) -> Any:
    """Images as this network takes them: brought to its channels, and to its size where it takes no other."""
    if not isinstance(inputs, Tensor):
        return inputs
    channels, height, width = image_shape(module)
    if inputs.shape[1] != channels:
        inputs = inputs.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    fixed = hasattr(getattr(module, "patch_embed", None), "img_size") or hasattr(
        getattr(module, "config", None), "image_size"
    )
    if fixed and inputs.shape[2:] != (height, width):
        inputs = functional.interpolate(inputs, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return inputs.contiguous()


def traced(module: nn.Module, inputs: Any, name: str) -> Trace:
    """The trace of a network.

    Raises:
        ValueError: it cannot be run; the message names it.
    """
    try:
        return trace_network(module, inputs)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
