"""Models of timm and transformers, built from settings of unknown origin: no weights, no network, no foreign code."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

# Models that read a `torch.linspace` while they are built (older timm's transformers) fail on the meta device without.
from transformers.initialization import meta_device_safe_creation_ops

from .errors import shorten


# Arguments of timm.create_model that fetch or load something; the rest of `model_args` goes to the model's class.
TIMM_LOADING_ARGUMENTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
# Entries of a timm `pretrained_cfg` that say where weights are; the rest describes images and classes.
TIMM_WEIGHT_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")
# Entries of a transformers config that name code, kernels or weights to fetch.
LOADING_ENTRIES = (
    "auto_map",
    "custom_pipelines",
    "attn_implementation",
    "_attn_implementation",
    "quantization_config",
    "checkpoint_path",
)
REMOTE_NAME = re.compile(r"hf[-_]hub:|local-dir:|https?://", re.IGNORECASE)
COUNTS = re.compile(r"^(?!.*(size|dim)).*(layer|depth|block|stage|expert)", re.IGNORECASE)


@contextmanager
def on_meta() -> Iterator[None]:
    """Models built inside allocate and initialize nothing."""
    with torch.device("meta"), meta_device_safe_creation_ops():
        yield


def import_timm(name: str):
    """The timm package, imported when a model needs it: embedding weights does not.

    Raises:
        ImportError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"The model {name!r} needs timm, which is not installed: pip install timm.") from error
    return timm


def is_timm_name(name: str) -> bool:
    """True for "resnet18", "resnet18.a1_in1k" and "timm/resnet18", where timm knows the architecture."""
    architecture = name.removeprefix("timm/").split(".")[0]
    return "/" not in architecture and import_timm(name).is_model(architecture)


def timm_settings(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(architecture, options for `build_timm`) that a timm config.json names; None if timm does not know it."""
    timm = import_timm(config["architecture"])
    if not timm.is_model(config["architecture"]):
        return None
    arguments = config.get("model_args") or {}
    options = {name: value for name, value in arguments.items() if name not in TIMM_LOADING_ARGUMENTS}
    if config.get("num_classes") is not None:
        options["num_classes"] = config["num_classes"]
    described = config.get("pretrained_cfg") or config  # older files have one level
    known = {entry.name for entry in fields(timm.models.PretrainedCfg)}.difference(TIMM_WEIGHT_SOURCES)
    options["pretrained_cfg"] = {name: value for name, value in described.items() if name in known}
    return config["architecture"], options


def build_timm(name: str, options: Mapping[str, Any]) -> nn.Module:
    """A timm model with its own initialization."""
    return import_timm(name).create_model(name, pretrained=False, **options)


def transformers_settings(
    config: Mapping[str, Any] | PreTrainedConfig,
) -> tuple[PreTrainedConfig, type[PreTrainedModel]] | None:
    """(a cleaned copy of the config, the model class) that a transformers config names, from the library's own code.

    A config that no model was saved with names no class, or names one of other code; it means the bare model then.
    None if the library has no such `model_type`.
    """
    if isinstance(config, PreTrainedConfig):
        config_class, entries = type(config), config.to_dict()
    elif isinstance(config.get("model_type"), str) and config["model_type"] in CONFIG_MAPPING:
        config_class, entries = CONFIG_MAPPING[config["model_type"]], config
    else:
        return None
    settings = config_class.from_dict(without_loading(entries))
    named = entries.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    model_class = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        model_class = MODEL_MAPPING.get(type(settings), None)
        model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    return None if model_class is None else (settings, model_class)


def build_transformers(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A transformers model with its own initialization."""
    # building writes into the config
    return model_class._from_config(type(config).from_dict(without_loading(config.to_dict())))


def build_named(config: Mapping[str, Any]) -> nn.Module | None:
    """The model that a config.json of either library names, or None if it names none that the library has."""
    if isinstance(config.get("architecture"), str):
        return build_timm(*settings) if (settings := timm_settings(config)) else None
    return build_transformers(*settings) if (settings := transformers_settings(config)) else None


def without_loading(value: Any) -> Any:
    """A config without the entries that would fetch code, kernels or weights, at any depth."""
    if isinstance(value, Mapping):
        kept = {key: without_loading(item) for key, item in value.items() if key not in LOADING_ENTRIES}
        if "use_pretrained_backbone" in kept:
            kept["use_pretrained_backbone"] = False
        if names_backbone(kept) and isinstance(kept.get("backbone_kwargs"), Mapping) and kept["backbone_kwargs"]:
            # transformers would ask the Hub whether there is a model of that name
            kept["backbone_config"] = {
                **kept.pop("backbone_kwargs"),
                "model_type": "timm_backbone",
                "backbone": kept.pop("backbone"),
                "use_pretrained_backbone": False,
            }
        return kept
    return [without_loading(item) for item in value] if isinstance(value, list) else value


def names_backbone(config: Mapping[str, Any]) -> bool:
    """True where a config of transformers has a backbone by name alone, as older files do."""
    own = config.get("model_type") == "timm_backbone"
    return not own and isinstance(config.get("backbone"), str) and not config.get("backbone_config")


def suspicious_entry(value: Any, limit: int, name: str = "config.json") -> str:
    """Why a config must not be built: it names something to fetch, or more than `limit` layers."""
    if isinstance(value, Mapping):
        if names_backbone(value) and not value.get("use_timm_backbone", True):
            return f"its backbone is {shorten(value['backbone'])}, whose config is to be fetched from elsewhere"
        problems = (suspicious_entry(item, limit, str(key)) for key, item in value.items())
        return next(filter(None, problems), "")
    if isinstance(value, list):
        return next(filter(None, (suspicious_entry(item, limit, name) for item in value)), "")
    if isinstance(value, str) and REMOTE_NAME.search(value) and name in ("architecture", "backbone", "model_name"):
        return f"its {name} is {shorten(value)}, to be fetched from elsewhere"
    if isinstance(value, int) and COUNTS.search(name) and value > limit:
        return f"its {name} is {value:,}, too many to build"
    return ""
