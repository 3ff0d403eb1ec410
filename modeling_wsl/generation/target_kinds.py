"""The kinds of targets: how the library of each builds it, with its own initialization, and saves it."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.architectures import build_timm, build_transformers, import_timm, on_meta
from ..tokens.manifest import TensorSpec


WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Target:
    """The tensors of a model to generate. The base class knows nothing but them: no module can be built.

    Attributes:
        name: for messages and provenance.
        tensors: every stored tensor once, in state-dict order.
        tied: alias -> stored name.
        tensor_order: every name of the state dict, aliases too.
        head: the tensors whose shape follows from the number of classes, where that is known.
        stem: the tensors whose shape follows from the number of input channels, where that is known.
        in_channels: the number of input channels, where it is known.
    """

    name: str
    tensors: Mapping[str, TensorSpec]
    tied: Mapping[str, str] = field(default_factory=dict)
    tensor_order: tuple[str, ...] = ()
    head: frozenset[str] = frozenset()
    stem: frozenset[str] = frozenset()
    in_channels: int | None = None

    library = "plain"
    initialization = "initialized"  # the origin, in provenance, of what `build` gives

    @property
    def arguments(self) -> dict[str, Any]:
        """What the library was told to build, JSON-serializable."""
        return {}

    def build(self, seed: int | None = None) -> nn.Module:
        """The module with its library's own initialization, on the CPU; torch's global generators stay as they were.

        Args:
            seed: of the initialization; None: whatever the state of the global generator gives.

        Raises:
            ValueError: the target is known by its tensors only.
        """
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
            return self._module()

    def _module(self) -> nn.Module:
        raise ValueError(
            f"The target {self.name} is known by its tensors only, so no module can be built from it. Use "
            "`.state_dict`, or give as target a timm name, a transformers config or folder, or a module."
        )

    def save(self, state_dict: Mapping[str, Tensor], folder: Path) -> None:
        """Writes the weights (tied ones once), and what the library needs to load them, into an existing folder."""
        stored = {name: state_dict[name].contiguous() for name in self.tensors}
        # Aliases are noted as safetensors' own save_model does: alias -> the name that is kept.
        metadata = {"format": "pt", "tensor_order": json.dumps(self.tensor_order), **self.tied}
        save_file(stored, folder / WEIGHTS_FILE, metadata=metadata)


@dataclass(frozen=True)
class TimmTarget(Target):
    """A timm architecture. Saved as a folder that `timm.create_model("local-dir:...")` reads."""

    architecture: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    library = "timm"

    @property
    def arguments(self) -> dict[str, Any]:
        described = {name: value for name, value in self.options.items() if name != "pretrained_cfg"}
        return {"model_name": self.architecture, **described}

    def _module(self) -> nn.Module:
        return build_timm(self.architecture, self.options)

    def save(self, state_dict: Mapping[str, Tensor], folder: Path) -> None:
        with on_meta():
            module = self.build()
        described = ("num_classes", "pretrained_cfg")  # in the file's own places
        arguments = {name: value for name, value in self.options.items() if name not in described}
        save_timm(module, arguments, self.tied, state_dict, folder)


@dataclass(frozen=True)
class TransformersTarget(Target):
    """A transformers model class and its config. Saved by its own `save_pretrained`."""

    config: PreTrainedConfig | None = None
    model_class: type[PreTrainedModel] = PreTrainedModel

    library = "transformers"

    @property
    def arguments(self) -> dict[str, Any]:
        return json.loads(self.config.to_json_string())

    def _module(self) -> nn.Module:
        return build_transformers(self.config, self.model_class)

    def save(self, state_dict: Mapping[str, Tensor], folder: Path) -> None:
        module = self.build()
        module.load_state_dict(state_dict)
        module.save_pretrained(folder)


@dataclass(frozen=True)
class ModuleTarget(Target):
    """A module, whose own values are its initialization. Saved as timm does where timm can build it again."""

    module: nn.Module | None = None
    rebuilt: TimmTarget | None = None

    initialization = "given: module"

    @property
    def library(self) -> str:
        return self.rebuilt.library if self.rebuilt else "torch"

    @property
    def arguments(self) -> dict[str, Any]:
        return self.rebuilt.arguments if self.rebuilt else {}

    def _module(self) -> nn.Module:
        return copy.deepcopy(self.module)

    def save(self, state_dict: Mapping[str, Tensor], folder: Path) -> None:
        if self.rebuilt is None:
            super().save(state_dict, folder)
        else:  # with the given module: timm notes what was changed on it since it was built
            save_timm(self.module, {}, self.tied, state_dict, folder)


def module_tensors(module: nn.Module) -> tuple[dict[str, TensorSpec], dict[str, str], tuple[str, ...]]:
    """(stored tensors, alias -> stored name, all names) of a module's state dict; works on the meta device too."""
    tensors, tied, first_name = {}, {}, {}
    state = module.state_dict(keep_vars=True)  # the parameters themselves: tied ones are the same object
    for name, value in state.items():
        stored = first_name.setdefault(id(value), name)
        if stored == name:
            tensors[name] = TensorSpec.of(name, value)
        else:
            tied[name] = stored
    return tensors, tied, tuple(state)


def save_timm(
    module: nn.Module,
    arguments: Mapping[str, Any],
    tied: Mapping[str, str],
    state_dict: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Writes weights, and the config.json of a module that was built with `arguments`, as timm reads them."""
    # timm loads no file that lacks a name, and safetensors stores no memory twice: an alias gets its own copy.
    stored = {name: (value.clone() if name in tied else value).contiguous() for name, value in state_dict.items()}
    save_file(stored, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    export = import_timm(type(module).__name__).models._hub.save_config_for_hf
    export(module, folder / "config.json", model_args=dict(arguments))
