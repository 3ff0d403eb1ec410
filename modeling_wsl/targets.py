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
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .architectures import (
    TIMM_LOADING_ARGUMENTS,
    build_timm,
    build_transformers,
    import_timm,
    is_timm_name,
    on_meta,
    suspicious_entry,
    timm_settings,
    transformers_settings,
)
from .checkpoint_errors import CheckpointError
from .checkpoint_folders import read_config
from .checkpoint_hub import download_config, hub_source, is_hub_id
from .checkpoints import Checkpoint, open_checkpoint
from .manifest import TensorSpec, WeightManifest


WEIGHTS_FILE = "model.safetensors"
# Far more layers than any published model has: a config.json that asks for more would not end being built.
MAX_LAYERS = 10_000


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

    def build(self, seed: int | None = None) -> nn.Module:
        """The module with its library's own initialisation, on the CPU; torch's global generators stay as they were.

        Args:
            seed: of the initialisation; None: whatever the state of the global generator gives.

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
    """A module, whose own values are its initialisation. Saved as timm does where timm can build it again."""

    module: nn.Module | None = None
    rebuilt: TimmTarget | None = None

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
            checkpoint), a file, a Hub id (also `org/name@revision`), a transformers config, a module, a manifest, a
            checkpoint or a state dict.
        num_classes: classes of the classifier, for timm and transformers targets.
        target_kwargs: for `timm.create_model` (`img_size`, `in_chans`, ...) or, with a transformers target, entries of
            its config.
        hub_options: `revision` (that of `org/name@revision` counts first), `token`, where the target is a Hub id.

    Raises:
        ValueError: nothing of that name, or an option that the target cannot have.
        CheckpointError: a Hub model without config.json, or a config.json that must not be built.
    """
    options = dict(target_kwargs or {})
    revision = hub_options.get("revision")
    if isinstance(target, str) and not Path(target).exists() and (found := hub_source(target, revision)):
        target, hub_options["revision"] = found
    timm_name = isinstance(target, str) and not Path(target).is_file() and is_timm_name(target)
    if hub_options.get("revision") is not None and (timm_name or not _on_hub(target)):
        raise ValueError(
            f"target_revision={hub_options['revision']!r} is for targets on the Hub (org/name), which this one is not."
        )
    if isinstance(target, Target):
        return _without_options(target, num_classes, options)
    if isinstance(target, PreTrainedConfig):
        if (settings := transformers_settings(target)) is None:
            raise ValueError(
                f"{type(target).__name__} belongs to no model of transformers; give the module as target."
            )
        return _transformers_target(target.name_or_path, *settings, num_classes, options)
    if isinstance(target, PreTrainedModel):
        return _transformers_target(target.name_or_path, target.config, type(target), num_classes, options)
    if isinstance(target, nn.Module):
        tensors, tied, order = module_tensors(target)
        name, rebuilt = type(target).__name__, _rebuilt(target, order)
        module_target = ModuleTarget(name, tensors, tied, order, module=target, rebuilt=rebuilt)
        return _without_options(module_target, num_classes, options)
    if isinstance(target, WeightManifest):
        specs = {spec.name: spec for layer in target.layers for spec in layer.tensors}
        specs |= {spec.name: spec for spec in target.carried}
        order = target.tensor_order
        tensors = {name: specs[name] for name in order if name in specs}
        return _without_options(Target("a manifest", tensors, dict(target.tied), order), num_classes, options)
    if timm_name:
        name = target.removeprefix("timm/")
        return _timm_target(name, name, num_classes, _timm_options(options))
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


def _on_hub(target: TargetSource) -> bool:
    return isinstance(target, str) and not Path(target).exists() and is_hub_id(target)


def _timm_options(options: dict[str, Any]) -> dict[str, Any]:
    """`target_kwargs`, without those that would fetch weights."""
    if loading := sorted(options.keys() & set(TIMM_LOADING_ARGUMENTS)):
        raise ValueError(f"target_kwargs: leave {', '.join(loading)} out; the weights are generated, not loaded.")
    return options


def _timm_target(name: str, architecture: str, num_classes: int | None, options: dict[str, Any]) -> TimmTarget:
    def tensors_with(classes: int | None):
        classes_option = {} if classes is None else {"num_classes": classes}
        with on_meta():
            return module_tensors(build_timm(architecture, {**options, **classes_option}))

    tensors, tied, order = tensors_with(num_classes)
    head = _head(name, tensors, num_classes, tensors_with)
    if num_classes is not None:
        options["num_classes"] = num_classes
    return TimmTarget(name, tensors, tied, order, head, architecture=architecture, options=options)


def _rebuilt(module: nn.Module, tensor_order: tuple[str, ...]) -> TimmTarget | None:
    """The timm target that has a module's tensors, where timm (newer ones) noted the arguments of its making."""
    noted = vars(module).get("_model_args")
    if not type(module).__module__.startswith("timm.") or noted is None or noted.get("features_only"):
        return None  # timm exports no feature extractors
    try:
        json.dumps(noted)
    except TypeError:  # a layer's class or function, which no config.json can name
        return None
    described = module.pretrained_cfg
    config = {"architecture": described["architecture"], "model_args": noted, "pretrained_cfg": described}
    settings = timm_settings({**config, "num_classes": getattr(module, "num_classes", None)})
    if settings is None:
        return None
    rebuilt = _timm_target(type(module).__name__, settings[0], None, settings[1])
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    same = rebuilt.tensor_order == tensor_order
    return rebuilt if same and all(spec.shape == shapes[name] for name, spec in rebuilt.tensors.items()) else None


def _transformers_target(
    name: str,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    num_classes: int | None,
    options: dict[str, Any],
) -> TransformersTarget:
    config = copy.deepcopy(config)
    if unknown := options.keys() - config.to_dict().keys():
        raise ValueError(f"target_kwargs: {type(config).__name__} has no {', '.join(sorted(unknown))}.")
    config.update(options)

    def tensors_with(classes: int | None):
        resized = copy.deepcopy(config)
        if classes is not None:
            resized.num_labels = classes
        with on_meta():
            return module_tensors(build_transformers(resized, model_class))

    tensors, tied, order = tensors_with(num_classes)
    name = name or model_class.__name__
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
    if _on_hub(name):
        path = download_config(name, **hub_options)
    elif not path.exists():
        close = difflib.get_close_matches(name, import_timm(name).list_models(), n=3)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise ValueError(
            f"The target {name!r} is no timm architecture, folder, file or Hub id.{hint} "
            "timm.list_models() lists the architectures."
        )
    library, entries = read_config(path) if path.is_dir() else (None, {})
    if library in ("timm", "transformers") and (problem := suspicious_entry(entries, MAX_LAYERS)):
        raise CheckpointError(name, problem, "Give the module as target, or a config that you trust")
    if library == "timm" and (settings := timm_settings(entries)):
        architecture, arguments = settings
        return _timm_target(name, architecture, num_classes, arguments | _timm_options(options))
    if library == "transformers" and (settings := transformers_settings(entries)):
        return _transformers_target(name, *settings, num_classes, options)
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
