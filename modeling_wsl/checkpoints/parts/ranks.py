"""One file a rank: joined where the file says how its tensors were cut, or their names do (Llama, Megatron)."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from ...tokens.manifest import TensorSpec
from ..containers.container import Contents
from ..containers.safetensors_files import SafetensorsFile
from ..errors import CheckpointError, PartOfModelError, shorten
from ..file_names import part_of
from ..formats import identify
from ..state_dicts import find_state_dict, split_aliases
from .layouts import MEGATRON_FOLDER


# How the parts of a tensor become one: behind each other along a dimension, the two halves of each rank apart
# ("gated": Megatron keeps gate and up projection of a rank in one tensor), or the same in every rank (None).
Rule = int | Literal["gated", "embedding"] | None
MEGATRON_RULES: tuple[tuple[str, Rule], ...] = (
    (r"norm[^.]*\.(weight|bias)|layer_norm_(weight|bias)", None),
    (r"position_embeddings\.weight|rotary\w*\.inv_freq|tokentype_embeddings\.weight", None),
    (r"word_embeddings\.weight|(output_layer|lm_head)\.weight", 0),
    (r"(query_key_value|linear_qkv|\.query|\.key_value)\.(weight|bias)", 0),
    (r"(dense_h_to_4h|linear_fc1)\.(weight|bias)", "gated"),
    (r"(attention\.dense|self_attention\.dense|linear_proj|dense_4h_to_h|linear_fc2)\.weight", 1),
    (r"(attention\.dense|self_attention\.dense|linear_proj|dense_4h_to_h|linear_fc2)\.bias", None),
)
LLAMA_RULES: tuple[tuple[str, Rule], ...] = (
    (r"norm\.weight|rope\.freqs", None),
    (r"tok_embeddings\.weight", "embedding"),
    (r"(attention\.w[qkv]|feed_forward\.w[13]|^output)\.weight", 0),
    (r"(attention\.wo|feed_forward\.w2)\.weight", 1),
)
MERGE = {
    "FSDP": "Merge them with the tool that wrote them (verl: `python -m verl.model_merger merge`; accelerate: "
    "`accelerate merge-weights`)",
    "model parallelism": "Convert the folder with the model's own script (Llama: convert_llama_weights_to_hf.py)",
    "Megatron": "Convert the folder with Megatron's tools/checkpoint/convert.py",
}
MERGE_ELSE = "Merge them with the tool that wrote them, and pass what it writes"


@dataclass(frozen=True)
class Box:
    """Where a rank's part lies in a tensor of the shape `shape`."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]


State = dict[str, torch.Tensor]
Boxes = dict[str, Box | int | None]  # name -> where; an int: behind each other along it; None: the same everywhere


def ranks_contents(folder: Path, names: list[str], key: str | None, load: Callable[[Path], Any]) -> Contents:
    """Contents of files that are named by ranks.

    Args:
        folder: with the files `names`.
        key: of the state dict in each of them.
        load: gives what a torch file holds, mapped where it can be.

    Raises:
        CheckpointError: a rank is missing, or nothing says how the tensors were cut.
    """
    parts = {part.rank: (part, name) for name in names if (part := part_of(name, names))}
    world = next(iter(parts.values()))[0].world
    maker = next(iter(parts.values()))[0].maker
    if missing := sorted(set(range(world)) - set(parts)):
        reason = f"lacks part {missing[0]} of {world} of a model, from {maker} ({parts[min(parts)][1]} is there)"
        raise PartOfModelError(folder, reason, "Fetch or copy all parts into the folder")
    files = [folder / parts[rank][1] for rank in range(world)]
    opened = [open_rank(path, key, load) for path in files]
    rules = LLAMA_RULES if maker == "model parallelism" else MEGATRON_RULES
    return join(folder, files, opened, rules, MERGE.get(maker, MERGE_ELSE))


def megatron_contents(folder: Path, files: list[Path], load: Callable[[Path], Any]) -> Contents:
    """Contents of Megatron's folders of ranks, `mp_rank_00/model_optim_rng.pt` and so on.

    Raises:
        CheckpointError: a rank is missing, the layers are cut into a pipeline, or a name that no rule knows.
    """
    ranks = [MEGATRON_FOLDER.fullmatch(path.parent.name) for path in files]
    if any(match["pipeline"] for match in ranks):
        reason = f"holds {len(files)} parts of a model, cut into a pipeline or over experts by Megatron"
        raise PartOfModelError(folder, reason, MERGE["Megatron"])
    numbers = [int(match["tensor"]) for match in ranks]
    if missing := sorted(set(range(max(numbers) + 1)) - set(numbers)):
        reason = f"lacks part {missing[0]} of {max(numbers) + 1} of a model, from Megatron"
        raise PartOfModelError(folder, reason, "Fetch or copy all folders mp_rank_*")
    opened = []
    for path in files:
        content = load(path)
        model = content.get("model") if isinstance(content, Mapping) else None
        if not isinstance(model, Mapping):
            listed = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
            reason = f"has no single `model` ({shorten(listed)})"
            raise CheckpointError(path, reason, MERGE["Megatron"])
        arguments = getattr(content.get("args"), "state", None)
        world = arguments.get("tensor_model_parallel_size", len(files)) if isinstance(arguments, dict) else len(files)
        if world != len(files):
            reason = f"lacks parts of a model: {len(files)} of {world} are there, from Megatron"
            raise PartOfModelError(folder, reason, "Fetch or copy all folders mp_rank_*")
        version = content.get("checkpoint_version")
        flat = flatten(model)
        old = any(name.endswith("query_key_value.weight") for name in flat)
        if len(files) > 1 and old and not (isinstance(version, (int, float)) and version >= 2):
            reason = (
                f"is of Megatron's checkpoint version {version or 0}, whose attention matrices lie in another order"
            )
            raise CheckpointError(path, reason, MERGE["Megatron"])
        opened.append((find_state_dict(path, flat, None)[1], {}))
    return join(folder, files, opened, MEGATRON_RULES, MERGE["Megatron"])


def flatten(content: Mapping[str, Any], prefix: str = "", depth: int = 0) -> State:
    """The tensors of nested mappings under names joined by dots."""
    flat: State = {}
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            flat[prefix + str(name)] = value
        elif isinstance(value, Mapping) and depth < 16:
            flat |= flatten(value, f"{prefix}{name}.", depth + 1)
    return flat


def open_rank(path: Path, key: str | None, load: Callable[[Path], Any]) -> tuple[State, Boxes]:
    """The tensors of one rank, and where those lie that say so."""
    if identify(path) == "safetensors":
        file = SafetensorsFile(path)
        return {name: file.read(name) for name in file.header.tensors}, {}
    boxes: Boxes = {}
    try:
        content = localize(load(path), boxes)
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(path, f"holds tensors that are {error}", MERGE["FSDP"]) from error
    found_at, tensors = find_state_dict(path, content, key)
    prefix = f"{found_at}." if found_at else ""
    return tensors, {name: boxes[prefix + name] for name in tensors if prefix + name in boxes}


def localize(content: Any, boxes: Boxes, name: str = "", depth: int = 0) -> Any:
    """A rank's content with the plain tensors that its DTensors and ShardedTensors hold; `boxes` gets their places."""
    if isinstance(content, Mapping) and depth < 8:
        prefix = f"{name}." if name else ""
        return {inner: localize(value, boxes, f"{prefix}{inner}", depth + 1) for inner, value in content.items()}
    if isinstance(content, torch.Tensor) or (held := local_part(content)) is None:
        return content
    tensor, box = held
    boxes[name] = box
    return tensor


def local_part(value: Any) -> tuple[torch.Tensor, Box | int | None] | None:
    """The tensor that an inert DTensor or ShardedTensor holds, and its place; None for anything else."""
    arguments = getattr(value, "args", None)
    state = getattr(value, "state", None)
    for candidate in (state, arguments[-1] if isinstance(arguments, tuple) and arguments else None):
        if isinstance(candidate, tuple) and candidate and isinstance(candidate[0], list):  # ShardedTensor
            shards = [attributes(shard) for shard in candidate[0]]
            if len(shards) != 1 or not isinstance(shards[0].get("tensor"), torch.Tensor):
                return None
            size = attributes(candidate[1]).get("size")
            offsets = attributes(shards[0].get("metadata")).get("shard_offsets")
            return shards[0]["tensor"], Box(tuple(offsets), tuple(size))
        held = dict(attributes(candidate))
        if isinstance(held.get("_local_tensor"), torch.Tensor):
            placements = attributes(held.get("_spec")).get("placements")
            return held["_local_tensor"], _dimension(placements)
    return None


def _dimension(placements: Any) -> int | None:
    """The dimension along which a DTensor was cut over one dimension of ranks; None: not cut.

    Raises:
        ValueError: it was cut along several, or is a sum to be made.
    """
    dims = []
    for placement in placements if isinstance(placements, (list, tuple)) else ():
        kind = type(placement).__name__ if not hasattr(placement, "name") else str(placement.name)
        if kind.endswith("Replicate"):
            continue
        dim = attributes(placement).get("dim")
        if not isinstance(dim, int) or not kind.endswith(".Shard") and kind != "Shard":
            raise ValueError(f"placed by {kind}")
        dims.append(dim)
    if len(dims) > 1:
        raise ValueError("cut along several dimensions of ranks")
    return dims[0] if dims else None


def attributes(value: Any) -> dict[str, Any]:
    """The attributes of an inert object, or of a mapping; {} where it has none."""
    state = getattr(value, "state", value)
    if isinstance(state, tuple):  # plain attributes, slots
        return {k: v for part in state if isinstance(part, dict) for k, v in part.items()}
    return state if isinstance(state, dict) else {}


def join(
    folder: Path,
    files: Sequence[Path],
    opened: Sequence[tuple[State, Boxes]],
    rules: tuple[tuple[str, Rule], ...],
    advice: str,
) -> Contents:
    """Contents of all ranks together.

    Raises:
        CheckpointError: they hold different names, or nothing says how a tensor was cut.
    """
    states = [state for state, _ in opened]
    for path, state in zip(files, states, strict=True):
        if different := sorted(set(state) ^ set(states[0])):
            reason = f"{files[0].name} and {path.name} do not hold the same tensors ({shorten(different[0])})"
            raise PartOfModelError(folder, reason, advice)
    plan: dict[str, Rule | list[Box]] = {}
    unknown: list[str] = []
    for name in states[0]:
        placed = [boxes[name] for _, boxes in opened if name in boxes]
        if len(placed) == len(states):
            stated = placed if all(isinstance(box, Box) for box in placed) else placed[0]
            plan[name] = stated
        elif (rule := rule_of(name, rules)) is not ...:
            plan[name] = rule
        else:
            unknown.append(name)
    if unknown and not all(same(states, name) for name in states[0]):  # of one part all is the same
        reason = (
            f"holds {len(states)} parts of a model, and nothing says how {shorten(unknown[0])} was cut "
            f"({len(unknown)} tensors)"
        )
        raise PartOfModelError(folder, reason, advice)
    if unknown:  # every rank holds all of the same model
        plan = dict.fromkeys(states[0])
    else:
        plan = {name: settled(folder, name, rule, states, advice) for name, rule in plan.items()}
    specs = {
        name: TensorSpec(name, joined_shape(folder, name, plan[name], states), TensorSpec.of(name, part).dtype)
        for name, part in states[0].items()
    }
    return Contents(
        specs, lambda name: joined(plan[name], [state[name] for state in states]), split_aliases(states[0])[1]
    )


def rule_of(name: str, rules: tuple[tuple[str, Rule], ...]) -> Any:
    """The first rule whose pattern ends the name; `...` where there is none."""
    return next((rule for pattern, rule in rules if re.search(rf"(?:{pattern})$", name)), ...)


def same(states: Iterable[State], name: str) -> bool:
    """True if all ranks hold the same bits under this name."""
    first, *others = (state[name] for state in states)
    return all(
        part.shape == first.shape and part.dtype == first.dtype and torch.equal(_bits(part), _bits(first))
        for part in others
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def settled(folder: Path, name: str, rule: Any, states: list[State], advice: str) -> Any:
    """A rule made definite by what the shapes say.

    Raises:
        CheckpointError: the shapes contradict it, or ranks that should hold the same do not.
    """
    part = states[0][name]
    if rule == "embedding":  # Llama 1 and 2 cut its columns, Llama 3 its rows: the norms have the full width
        width = next((len(t) for n, t in states[0].items() if n.endswith("norm.weight") and t.dim() == 1), None)
        rule = {width: 0, width and width / len(states): 1}.get(part.shape[-1], ...)
    elif rule == "gated":
        down = states[0].get(
            re.sub(r"dense_h_to_4h|linear_fc1", lambda m: DOWN[m[0]], name.rsplit(".", 1)[0]) + ".weight"
        )
        rule = ... if down is None else "gated" if part.shape[0] == 2 * down.shape[1] else 0
    if rule is ... or (isinstance(rule, int) and rule >= part.dim()):
        raise PartOfModelError(folder, f"its parts of {shorten(name)} do not fit each other", advice)
    if rule is None and not same(states, name):
        raise PartOfModelError(folder, f"its parts differ in {shorten(name)}, which all ranks share", advice)
    return rule


DOWN = {"dense_h_to_4h": "dense_4h_to_h", "linear_fc1": "linear_fc2"}


def joined_shape(folder: Path, name: str, rule: Any, states: list[State]) -> tuple[int, ...]:
    """The shape of a joined tensor, checked to be filled by its parts."""
    parts = [state[name] for state in states]
    first = tuple(parts[0].shape)
    if rule is None:
        return first
    if isinstance(rule, list):
        shape = rule[0].shape
        if sum(part.numel() for part in parts) != prod(shape) or len({box.offsets for box in rule}) < len(rule):
            raise CheckpointError(folder, f"the parts of {shorten(name)} do not fill it", MERGE_ELSE)
        return shape
    dim = 0 if rule == "gated" else rule
    if any((*p.shape[:dim], *p.shape[dim + 1 :]) != (*first[:dim], *first[dim + 1 :]) for p in parts):
        raise CheckpointError(folder, f"the parts of {shorten(name)} do not fit each other", MERGE_ELSE)
    return (*first[:dim], sum(part.shape[dim] for part in parts), *first[dim + 1 :])


def joined(rule: Any, parts: list[torch.Tensor]) -> torch.Tensor:
    """The parts of the ranks as one tensor."""
    if rule is None or len(parts) == 1:
        return parts[0]
    if rule == "gated":
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    if isinstance(rule, int):
        return torch.cat(parts, rule)
    tensor = torch.empty(rule[0].shape, dtype=parts[0].dtype)
    for box, part in zip(rule, parts, strict=True):
        tensor[tuple(slice(o, o + n) for o, n in zip(box.offsets, part.shape, strict=True))] = part
    return tensor
