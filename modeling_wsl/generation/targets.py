"""Targets: the tensors of a model to generate, known before any weight is, and how its library builds and saves it."""

import copy
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.architectures import (
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
from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints.errors import CheckpointError
from ..checkpoints.folders import read_config
from ..checkpoints.hub import download_config, is_hub_id
from ..checkpoints.reference import exists, parse_reference
from ..tokens.manifest import TensorSpec, WeightManifest


# Far more layers than any published model has: a config.json that asks for more would not end being built.
MAX_LAYERS = 10_000
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
    tensors: Mapping[str, TensorSpec] = field(repr=False)
    tied: Mapping[str, str] = field(default_factory=dict, repr=False)
    tensor_order: tuple[str, ...] = field(default=(), repr=False)
    head: frozenset[str] = field(default=frozenset(), repr=False)
    stem: frozenset[str] = field(default=frozenset(), repr=False)
    in_channels: int | None = None

    library = "plain"
    initialization = "initialized"  # the origin, in provenance, of what `build` gives

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that the library is told to build it with, JSON-serializable."""
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

    config: PreTrainedConfig | None = field(default=None, repr=False)
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

    module: nn.Module | None = field(default=None, repr=False)
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


TargetSource = (
    Target | str | PathLike | PreTrainedConfig | nn.Module | WeightManifest | Checkpoint | Mapping[str, Tensor]
)


@dataclass(frozen=True)
class Sizes:
    """Sizes that a target is asked to have, beside its architecture.

    Attributes:
        num_classes: of the classifier; None: the architecture's own.
        in_channels: of the images; None: the architecture's own.

    Raises:
        ValueError: a number that no model can have.
    """

    num_classes: int | None = None
    in_channels: int | None = None

    def __post_init__(self):
        if self.num_classes is not None and self.num_classes < 0:
            raise ValueError(
                f"num_classes is {self.num_classes}; give the number of classes, or 0 for no classifier (timm)."
            )
        if self.in_channels is not None and self.in_channels < 1:
            raise ValueError(f"in_channels is {self.in_channels}; give the number of channels of the images.")

    def given(self, **names: str) -> dict[str, int]:
        """The sizes that are asked for, under the names that a library has for them."""
        return {names[option]: value for option, value in vars(self).items() if value is not None}

    def parts(
        self,
        name: str,
        tensors: Mapping[str, TensorSpec],
        tensors_with: Callable[["Sizes"], Mapping[str, TensorSpec]],
        optional: bool = False,
    ) -> dict[str, Any]:
        """`head`, `stem` and `in_channels` of a target: what another number would change, in any architecture.

        Args:
            name: of the target, for messages.
            tensors: of the target with these sizes.
            tensors_with: builds it with others.
            optional: it may lack either part.

        Raises:
            ValueError: another number would change nothing.
        """
        changed = {}
        for option, what in (("num_classes", "classifier"), ("in_channels", "input channels to choose")):
            if (value := getattr(self, option)) is None:
                changed[option] = frozenset()
                continue
            other = tensors_with(replace(self, **{option: value + 1}))
            changed[option] = frozenset(
                key for key in tensors.keys() | other.keys() if tensors.get(key) != other.get(key)
            )
            if not changed[option] and not optional:
                raise ValueError(
                    f"{option}={value} changes nothing in {name}: the target has no {what}. Leave it out, or give a "
                    "target with one (a transformers config names its class in `architectures`)."
                )
        return {"head": changed["num_classes"], "stem": changed["in_channels"], "in_channels": self.in_channels}


def resolve_target(
    target: TargetSource,
    num_classes: int | None = None,
    target_kwargs: Mapping[str, Any] | None = None,
    *,
    in_channels: int | None = None,
    **hub_options: Any,
) -> Target:
    """Finds out what to generate; builds it on the meta device only, so nothing is allocated or initialized.

    Args:
        target: a timm name ("resnet18"; it wins over a folder of that name), a folder (timm's, transformers', or any
            checkpoint), a file, a Hub id (also `org/name@revision`), a transformers config, a module, a manifest, a
            checkpoint or a state dict.
        num_classes: classes of the classifier, for timm and transformers targets. A module has its own; with the
            option its classifier is its last linear layer, where the module is none of timm's, which say it.
        target_kwargs: for `timm.create_model` (`img_size`, ...), or entries of a transformers target's config.
        in_channels: channels of the images (timm: `in_chans`, transformers: `num_channels`). A module has its own;
            with the option its stem is its first convolution, where the module is none of timm's.
        hub_options: `revision`, `token`, where the target is a Hub id.

    Raises:
        ValueError: nothing of that name, or an option that the target cannot have.
        CheckpointError: a Hub model without config.json, or a config.json that must not be built.
    """
    options, sizes = dict(target_kwargs or {}), Sizes(num_classes, in_channels)
    if isinstance(target, str):
        reference = parse_reference(target).with_options(revision=hub_options.pop("revision", None))
        hub_options["revision"] = reference.revision
        target = str(replace(reference, revision=None))
    timm_name = isinstance(target, str) and not Path(target).is_file() and is_timm_name(target)
    if hub_options.get("revision") is not None and (timm_name or not _on_hub(target)):
        raise ValueError(
            f"target_revision={hub_options['revision']!r} is for targets on the Hub (org/name), which this one is not."
        )
    if isinstance(target, Target):
        return _without_options(target, sizes, options)
    if isinstance(target, PreTrainedConfig):
        if (settings := transformers_settings(target)) is None:
            raise ValueError(
                f"{type(target).__name__} belongs to no model of transformers; give the module as target."
            )
        return _transformers_target(target.name_or_path, *settings, sizes, options)
    if isinstance(target, PreTrainedModel):
        return _transformers_target(target.name_or_path, target.config, type(target), sizes, options, own_sizes=True)
    if isinstance(target, nn.Module):
        return _module_target(target, sizes, options)
    if isinstance(target, WeightManifest):
        specs = {spec.name: spec for layer in target.layers for spec in layer.tensors}
        specs |= {spec.name: spec for spec in target.carried}
        order = target.tensor_order
        tensors = {name: specs[name] for name in order if name in specs}
        return _without_options(Target("a manifest", tensors, dict(target.tied), order), sizes, options)
    if timm_name:
        name = target.removeprefix("timm/")
        return _timm_target(name, name, sizes, _timm_options(options))
    if isinstance(target, str | PathLike):
        return _named_target(str(target), sizes, options, hub_options)
    return _checkpoint_target(target, sizes, options)


def _on_hub(target: TargetSource) -> bool:
    return isinstance(target, str) and not exists(target) and is_hub_id(parse_reference(target).location)


def _timm_options(options: dict[str, Any]) -> dict[str, Any]:
    """`target_kwargs`, without those that would fetch weights."""
    if loading := sorted(options.keys() & set(TIMM_LOADING_ARGUMENTS)):
        raise ValueError(f"target_kwargs: leave {', '.join(loading)} out; the weights are generated, not loaded.")
    return options


def _timm_target(name: str, architecture: str, sizes: Sizes, options: dict[str, Any]) -> TimmTarget:
    def sized(sizes: Sizes) -> dict[str, Any]:
        return options | sizes.given(num_classes="num_classes", in_channels="in_chans")

    def described(sizes: Sizes):
        with on_meta():
            return module_tensors(build_timm(architecture, sized(sizes)))

    tensors, tied, order = described(sizes)
    parts = sizes.parts(name, tensors, lambda other: described(other)[0])
    parts["in_channels"] = sized(sizes).get("in_chans")
    return TimmTarget(name, tensors, tied, order, **parts, architecture=architecture, options=sized(sizes))


def _module_target(module: nn.Module, sizes: Sizes, options: dict[str, Any]) -> ModuleTarget:
    """A module, whose classifier and stem are those that timm names, or else, where `sizes` asks, by their place."""
    tensors, tied, order = module_tensors(module)
    name, rebuilt = type(module).__name__, _rebuilt(module, order)
    noted = vars(module).get("pretrained_cfg") if type(module).__module__.startswith("timm.") else None
    noted = noted or {}
    children = dict(module.named_modules())
    linear = [prefix for prefix, child in children.items() if isinstance(child, nn.Linear)]
    convolutions = [
        prefix for prefix, child in children.items() if isinstance(child, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    head = _tensors_of(tensors, noted.get("classifier") or (linear[-1:] if sizes.num_classes is not None else ()))
    stem = _tensors_of(tensors, noted.get("first_conv") or (convolutions[:1] if sizes.in_channels is not None else ()))
    # tresnet's stem sees the pixels of a block as channels.
    shuffled = [child.bs for child in children.values() if type(child).__name__ == "SpaceToDepth"]
    blocks = shuffled[0] ** 2 if shuffled else 1
    for option, part, at, place in (
        ("num_classes", head, 0, "last linear layer"),
        ("in_channels", stem, 1, "first convolution"),
    ):
        wanted = getattr(sizes, option)
        weights = [tensors[key] for key in part if len(tensors[key].shape) > at]
        if wanted is not None and not any(spec.shape[at] == wanted * (blocks if at else 1) for spec in weights):
            shapes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in weights) or f"no {place}"
            raise ValueError(
                f"{option}={wanted} cannot be applied to the target {name}: a module's shapes are given ({shapes}). "
                "Give the module as you want it, and leave the option out or say what it has."
            )
    inputs = {tensors[key].shape[1] // blocks for key in stem if len(tensors[key].shape) > 1}
    in_channels = sizes.in_channels or (inputs.pop() if len(inputs) == 1 else None)
    target = ModuleTarget(name, tensors, tied, order, head, stem, in_channels, module=module, rebuilt=rebuilt)
    return _without_options(target, Sizes(), options)


def _tensors_of(tensors: Mapping[str, TensorSpec], modules: str | Sequence[str]) -> frozenset[str]:
    """The stored weight and bias of one module or several."""
    names = (modules,) if isinstance(modules, str) else modules
    return frozenset(f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")) & tensors.keys()


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
    rebuilt = _timm_target(type(module).__name__, settings[0], Sizes(), settings[1])
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    same = rebuilt.tensor_order == tensor_order
    return rebuilt if same and all(spec.shape == shapes[name] for name, spec in rebuilt.tensors.items()) else None


def _transformers_target(
    name: str,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    sizes: Sizes,
    options: dict[str, Any],
    own_sizes: bool = False,
) -> TransformersTarget:
    """A model class and its config; with `own_sizes`, classifier and stem are looked for whether asked for or not."""
    config = copy.deepcopy(config)
    known = config.to_dict()
    if unknown := options.keys() - known.keys():
        raise ValueError(f"target_kwargs: {type(config).__name__} has no {', '.join(sorted(unknown))}.")
    if sizes.in_channels is not None and "num_channels" not in known:
        raise ValueError(
            f"in_channels={sizes.in_channels}: {type(config).__name__} has no num_channels. Set the entry that it has "
            "by target_kwargs, or give the module as target."
        )

    def sized(sizes: Sizes) -> PreTrainedConfig:
        resized = copy.deepcopy(config)
        resized.update(options | sizes.given(num_classes="num_labels", in_channels="num_channels"))
        return resized

    def described(sizes: Sizes):
        with on_meta():
            return module_tensors(build_transformers(sized(sizes), model_class))

    name, final = name or model_class.__name__, sized(sizes)
    tensors, tied, order = described(sizes)
    parts = sizes.parts(name, tensors, lambda other: described(other)[0])
    channels = final.to_dict().get("num_channels")
    channels = channels if isinstance(channels, int) else None  # a few configs have one a level
    if own_sizes:
        own = Sizes(final.num_labels, channels)
        parts = own.parts(name, tensors, lambda other: described(other)[0], optional=True)
    parts["in_channels"] = channels
    return TransformersTarget(name, tensors, tied, order, **parts, config=final, model_class=model_class)


def _named_target(name: str, sizes: Sizes, options: dict[str, Any], hub_options: dict[str, Any]) -> Target:
    """A folder, a file or a Hub id."""
    reference = parse_reference(name)
    path = Path(reference.location, reference.subfolder).expanduser()
    if _on_hub(name) and not reference.subfolder and reference.key is None:
        path = download_config(name, **hub_options)
    elif not _on_hub(name) and not exists(str(path)):
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
        return _timm_target(name, architecture, sizes, arguments | _timm_options(options))
    if library == "transformers" and (settings := transformers_settings(entries)):
        return _transformers_target(name, *settings, sizes, options)
    return _checkpoint_target(name, sizes, options, **hub_options)


def _checkpoint_target(source: Any, sizes: Sizes, options: dict[str, Any], **open_options: Any) -> Target:
    """Anything that `open_checkpoint` reads: its tensors, and no way to build a module."""
    with open_checkpoint(source, **open_options) as checkpoint:
        order = checkpoint.tensor_order
        target = Target(checkpoint.source, dict(checkpoint.tensors), dict(checkpoint.tied), order)
    return _without_options(target, sizes, options)


def _without_options(target: Target, sizes: Sizes, options: dict[str, Any]) -> Target:
    for option, value in {**vars(sizes), "target_kwargs": options or None}.items():
        if value is not None:
            raise ValueError(
                f"{option}={value!r} cannot be applied to the target {target.name}: its tensors are given. Give a "
                "timm name or a transformers config, or the module as you want it and `initialize=[...]` for its head."
            )
    return target
