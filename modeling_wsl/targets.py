"""What is generated: a target model's tensors, known before any weight is, and how its library builds and saves it."""

import copy
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

# Models that read a `torch.linspace` while they are built (older timm's transformers) fail on the meta device without.
from transformers.initialization import meta_device_safe_creation_ops

from .checkpoints import Checkpoint, open_checkpoint
from .manifest import TensorSpec, WeightManifest


WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Target:
    """The tensors of a model to generate. The base class knows nothing but them: no module can be built.

    Attributes:
        name: for messages and provenance.
        tensors: every stored tensor once, in state-dict order.
        tied: alias -> stored name.
        tensor_order: every name of the state dict, aliases too.
        head: the tensors whose shape follows from `num_classes`, where that was given.
    """

    name: str
    tensors: Mapping[str, TensorSpec]
    tied: Mapping[str, str] = field(default_factory=dict)
    tensor_order: tuple[str, ...] = ()
    head: frozenset[str] = frozenset()

    library = "plain"

    @property
    def arguments(self) -> dict[str, Any]:
        """What the library was told to build, JSON-serialisable."""
        return {}

    def build(self) -> nn.Module:
        """The module with its library's own initialisation, which draws from torch's global generator."""
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

    options: Mapping[str, Any] = field(default_factory=dict)

    library = "timm"

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.options)

    def build(self) -> nn.Module:
        return import_timm(self.name).create_model(self.name, **self.options)

    def save(self, state_dict: Mapping[str, Tensor], folder: Path) -> None:
        from timm.models._hub import save_config_for_hf

        stored = {name: value.contiguous() for name, value in state_dict.items()}
        save_file(stored, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        with torch.random.fork_rng(devices=[]):
            module = self.build()
        arguments = {name: value for name, value in self.options.items() if name != "num_classes"}
        save_config_for_hf(module, folder / "config.json", model_args=arguments)


@dataclass(frozen=True)
class TransformersTarget(Target):
    """A transformers model class and its config. Saved by its own `save_pretrained`."""

    config: PreTrainedConfig | None = None
    model_class: type = AutoModel

    library = "transformers"

    @property
    def arguments(self) -> dict[str, Any]:
        return json.loads(self.config.to_json_string())

    def build(self) -> nn.Module:
        return build_transformers(self.config, self.model_class)

    def save(self, state_dict: Mapping[str, Tensor], folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            module = self.build()
        module.load_state_dict(state_dict)
        module.save_pretrained(folder)


@dataclass(frozen=True)
class ModuleTarget(Target):
    """A module of no known library. Its own values are its initialisation."""

    module: nn.Module | None = None

    library = "torch"

    def build(self) -> nn.Module:
        return copy.deepcopy(self.module)


TargetSource = (
    Target | str | PathLike | PreTrainedConfig | nn.Module | WeightManifest | Checkpoint | Mapping[str, Tensor]
)


def resolve_target(
    target: TargetSource,
    num_classes: int | None = None,
    target_kwargs: Mapping[str, Any] | None = None,
    **hub_options: Any,
) -> Target:
    """Finds out what to generate; builds it on the meta device only, so nothing is allocated or initialised.

    Args:
        target: a timm name ("resnet18"; it wins over a folder of that name), a folder (timm's, transformers', or any
            checkpoint), a file, a Hub id, a transformers config, a module, a manifest, a checkpoint or a state dict.
        num_classes: classes of the classifier, for timm and transformers targets.
        target_kwargs: for `timm.create_model` (`img_size`, `in_chans`, ...) or, with a transformers target, entries of
            its config.
        hub_options: `revision`, `token`, where the target is a Hub id.

    Raises:
        ValueError: nothing of that name, or an option that the target cannot have.
    """
    options = dict(target_kwargs or {})
    if isinstance(target, Target):
        return _without_options(target, num_classes, options)
    if isinstance(target, PreTrainedConfig):
        return _transformers_target(target, None, num_classes, options)
    if isinstance(target, PreTrainedModel):
        return _transformers_target(target.config, type(target), num_classes, options)
    if isinstance(target, nn.Module):
        tensors, tied, order = module_tensors(target)
        name = type(target).__name__
        return _without_options(ModuleTarget(name, tensors, tied, order, module=target), num_classes, options)
    if isinstance(target, WeightManifest):
        specs = {spec.name: spec for layer in target.layers for spec in layer.tensors}
        specs |= {spec.name: spec for spec in target.carried}
        order = target.tensor_order
        tensors = {name: specs[name] for name in order if name in specs}
        return _without_options(Target("a manifest", tensors, dict(target.tied), order), num_classes, options)
    if isinstance(target, str) and _is_timm_name(target):
        return _timm_target(target.removeprefix("timm/"), num_classes, options)
    if isinstance(target, str | PathLike):
        return _named_target(str(target), num_classes, options, hub_options)
    return _checkpoint_target(target, num_classes, options)


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


def build_transformers(config: PreTrainedConfig, model_class: type) -> PreTrainedModel:
    """A transformers model with its own initialisation."""
    config = copy.deepcopy(config)
    return model_class.from_config(config) if model_class is AutoModel else model_class._from_config(config)


def import_timm(name: str):
    """The timm package, imported when a target needs it: embedding weights does not.

    Raises:
        ImportError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"The target {name!r} needs timm, which is not installed: pip install timm.") from error
    return timm


def _is_timm_name(name: str) -> bool:
    architecture = name.removeprefix("timm/").split(".")[0]
    return "/" not in architecture and import_timm(name).is_model(architecture)


def _timm_target(name: str, num_classes: int | None, options: dict[str, Any]) -> Target:
    timm = import_timm(name)

    def tensors_with(classes: int | None):
        with torch.device("meta"), meta_device_safe_creation_ops():
            classes_option = {} if classes is None else {"num_classes": classes}
            return module_tensors(timm.create_model(name, **{**options, **classes_option}))

    tensors, tied, order = tensors_with(num_classes)
    head = _head(name, tensors, num_classes, tensors_with)
    if num_classes is not None:
        options["num_classes"] = num_classes
    return TimmTarget(name, tensors, tied, order, head, options=options)


def _transformers_target(
    config: PreTrainedConfig, model_class: type | None, num_classes: int | None, options: dict[str, Any]
) -> Target:
    config = copy.deepcopy(config)
    if unknown := options.keys() - config.to_dict().keys():
        raise ValueError(f"target_kwargs: {type(config).__name__} has no {', '.join(sorted(unknown))}.")
    config.update(options)
    if model_class is None:
        # A config that no model was saved with names no class; it means the bare model then.
        model_class = getattr(transformers, (config.architectures or ["AutoModel"])[0], AutoModel)

    def tensors_with(classes: int | None):
        resized = copy.deepcopy(config)
        if classes is not None:
            resized.num_labels = classes
        with torch.device("meta"), meta_device_safe_creation_ops():
            return module_tensors(build_transformers(resized, model_class))

    tensors, tied, order = tensors_with(num_classes)
    name = config.name_or_path or (config.architectures or [type(config).__name__])[0]
    head = _head(name, tensors, num_classes, tensors_with)
    if num_classes is not None:
        config.num_labels = num_classes
    return TransformersTarget(name, tensors, tied, order, head, config=config, model_class=model_class)


def _head(name: str, tensors: Mapping[str, TensorSpec], num_classes: int | None, tensors_with) -> frozenset[str]:
    """The tensors that another number of classes would change: the classifier, in any architecture."""
    if num_classes is None:
        return frozenset()
    if num_classes < 0:
        raise ValueError(f"num_classes is {num_classes}; give the number of classes, or 0 for no classifier (timm).")
    other = tensors_with(num_classes + 1)[0]
    head = {key for key in tensors.keys() | other.keys() if tensors.get(key) != other.get(key)}
    if not head:
        raise ValueError(
            f"num_classes={num_classes} changes nothing in {name}: the target has no classifier. Leave it out, or "
            "give a target with one (a transformers config names its class in `architectures`)."
        )
    return frozenset(head)


def _named_target(name: str, num_classes: int | None, options: dict[str, Any], hub_options: dict[str, Any]) -> Target:
    """A folder, a file or a Hub id."""
    path = Path(name)
    if path.is_file() or (path.is_dir() and not (path / "config.json").exists()):
        return _checkpoint_target(name, num_classes, options)
    if not path.exists() and "/" not in name:
        close = difflib.get_close_matches(name, import_timm(name).list_models(), n=3)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise ValueError(
            f"The target {name!r} is no timm architecture, folder, file or Hub id.{hint} "
            "timm.list_models() lists the architectures."
        )
    entries, _ = PreTrainedConfig.get_config_dict(name, **hub_options)
    if "architecture" in entries:  # timm's format
        source = "local-dir" if path.exists() else "hf-hub"
        # An older timm does not take these from the folder itself.
        options = {**entries.get("model_args", {}), **options}
        return _timm_target(f"{source}:{name}", num_classes, options)
    if "model_type" in entries:
        return _transformers_target(AutoConfig.from_pretrained(name, **hub_options), None, num_classes, options)
    return _checkpoint_target(name, num_classes, options, **hub_options)


def _checkpoint_target(source: Any, num_classes: int | None, options: dict[str, Any], **open_options: Any) -> Target:
    """Anything that `open_checkpoint` reads: its tensors, and no way to build a module."""
    with open_checkpoint(source, **open_options) as checkpoint:
        order = checkpoint.tensor_order
        target = Target(checkpoint.source, dict(checkpoint.tensors), dict(checkpoint.tied), order)
    return _without_options(target, num_classes, options)


def _without_options(target: Target, num_classes: int | None, options: dict[str, Any]) -> Target:
    for option, value in (("num_classes", num_classes), ("target_kwargs", options or None)):
        if value is not None:
            raise ValueError(
                f"{option}={value!r} cannot be applied to the target {target.name}: its tensors are given. Give a "
                "timm name or a transformers config, or the module as you want it and `initialise=[...]` for its head."
            )
    return target
