"""The order of a checkpoint's tensors: safetensors files do not keep the state dict's, and tokens follow it."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from .architectures import build_named, on_meta, suspicious_entry
from .errors import CheckpointError, parse_json, read_json, shorten
from .identity.spelling import plain_names


logger = logging.get_logger(__name__)

Order = Literal["auto", "file", "natural", "architecture"]
ORDERS = ("auto", "file", "natural", "architecture")
SIDECAR = "model.json"


def natural_key(name: str) -> list[tuple[int, str] | str]:
    """Sorts numbers in names as numbers: `blocks.2` before `blocks.10`."""
    parts = re.split(r"([0-9]+)", name)
    # compared by length, then digits: int() refuses more than 4,300 digits
    return [(len(p.lstrip("0")), p.lstrip("0")) if at % 2 else p for at, p in enumerate(parts)]


def arrange(names: Collection[str], wanted: Iterable[str]) -> list[str]:
    """`names` in the order of `wanted`; those it does not mention follow in natural order."""
    there = set(names)
    known = dict.fromkeys(name for name in wanted if name in there)
    return [*known, *sorted(there - known.keys(), key=natural_key)]


def order_names(
    source: object,
    names: Sequence[str],
    order: Order,
    *,
    sidecar: Path | None = None,
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    in_state_dict_order: bool = False,
) -> list[str]:
    """Puts tensor names into state-dict order.

    Args:
        source: what the names are from, for messages.
        names: all names, tied ones too, in the order of the file.
        order: "auto" takes the first that there is of: a `tensor_order` list in `sidecar` or `metadata`, the
            architecture that `config` names, the file's own order if `in_state_dict_order`, natural order.
        sidecar: a `model.json` beside the file; it need not exist.
        metadata: the `__metadata__` of a safetensors file.
        config: a parsed config.json of timm or transformers.
        in_state_dict_order: the file keeps the order of the state dict (torch.save does, safetensors does not).

    Raises:
        CheckpointError: `tensor_order` is not a list of strings, or "architecture" was asked for and cannot be built.
        ValueError: unknown `order`.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown. Choose one of {', '.join(ORDERS)}.")
    if order == "file":
        return list(names)
    if order == "natural":
        return sorted(names, key=natural_key)
    if order == "auto" and (listed := listed_order(source, sidecar, metadata or {})) and set(listed) & set(names):
        return arrange(names, listed)
    wanted, problem = architecture_order(names, config or {})
    if wanted:
        return arrange(names, wanted)
    if order == "architecture":
        raise CheckpointError(source, f"its architecture gives no order: {problem}", 'Use order="auto"')
    if config:
        logger.info(f"{source}: {problem}; its tensors are ordered without the architecture")
    return list(names) if in_state_dict_order else sorted(names, key=natural_key)


def listed_order(source: object, sidecar: Path | None, metadata: Mapping[str, str]) -> list[str]:
    """The `tensor_order` written beside the weights or into their metadata; empty if there is none."""
    listed: Any = None
    if sidecar is not None and sidecar.is_file():
        content = read_json(sidecar, f"the file {SIDECAR}", unique_keys=False)
        listed = content.get("tensor_order") if isinstance(content, dict) else None
    if listed is None and "tensor_order" in metadata:
        listed = parse_json(source, metadata["tensor_order"].encode(), "the metadata entry tensor_order")
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise CheckpointError(
            source, "its tensor_order is not a list of tensor names", 'Correct it, or pass order="natural"'
        )
    return listed


def architecture_order(names: Sequence[str], config: Mapping[str, Any]) -> tuple[list[str], str]:
    """State-dict order of the architecture that a config names, built without weights, network or foreign code.

    Returns:
        names in order (empty if there is no usable architecture), and why there is none.
    """
    if not config:
        return [], "there is no config.json"
    try:
        if problem := suspicious_entry(config, limit=1000 + 10 * len(names)):
            return [], problem
        with on_meta():
            model = build_named(config)
            places = {} if model is None else name_places(model)
    except Exception as error:  # any model class of two libraries, fed with a config of unknown origin
        return [], f"its architecture cannot be built ({type(error).__name__}: {shorten(error)})"
    if model is None:
        return [], "config.json names no architecture of timm or transformers"
    if not any(name in places for name in names):  # all under a wrapper's prefix
        plain = {plain: places[name] for name, plain in plain_names(places).items()}
        places = {name: plain[short] for name, short in plain_names(names).items() if short in plain}
    known = [name for name in sorted(names, key=natural_key) if name in places]
    if 2 * len(known) < len(names):
        return [], f"only {len(known)} of its {len(names)} tensors are known to {type(model).__name__}"
    return sorted(known, key=places.__getitem__), ""


def name_places(model: torch.nn.Module) -> dict[str, int]:
    """Where each tensor stands in a model's state dict, under every name that files give it.

    Files of transformers carry the names of older releases, may be of the bare model or of one with a head, and the
    oldest call the entries of a LayerNorm gamma and beta.
    """
    state = model.state_dict()
    places = {name: at for at, name in enumerate(state)}
    if isinstance(model, PreTrainedModel):
        places = saved_places(model, state) | places
        prefix = f"{model.base_model_prefix}."
        for name, at in list(places.items()):
            for other in (name.removeprefix(prefix), prefix + name):
                places.setdefault(other, at)
        for name, at in list(places.items()):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            places.setdefault(old, at)
    return places


def saved_places(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The same under the names that `save_pretrained` writes: not all are the module's, some are split."""
    index = {id(tensor): at for at, tensor in enumerate(state.values())}
    saved = revert_weight_conversion(model, dict(state))
    places = {name: index[id(tensor)] for name, tensor in saved.items() if id(tensor) in index}
    renamed = set(places.values())
    for at, (name, tensor) in enumerate(state.items()):
        if at in renamed:
            continue
        try:  # split on saving, as the fused experts of a mixture are
            places |= dict.fromkeys(revert_weight_conversion(model, {name: tensor}), at)
        except ValueError:  # merged with others on saving: the merged tensor has no place of its own in the module
            logger.debug(f"{name} of {type(model).__name__} is saved merged with other tensors")
    return places
