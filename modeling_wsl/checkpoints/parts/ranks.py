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
from ..containers.pickle_reader import Inert
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
    """Where a rank's part lies in a tensor of the shape `shape`, as a DTensor or a ShardedTensor says.

    Attributes:
        offsets: of its first entry; None where `dim` tells, or where the rank has nothing.
        dim: the parts of all ranks follow each other along it.
        is_all: every rank holds the tensor.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...] | None = None
    dim: int | None = None
    is_all: bool = False


State = dict[str, torch.Tensor]
Boxes = dict[str, Box]


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
        if (stated := stated_world(content) or len(files)) != len(files):
            reason = f"lacks parts of a model: {len(files)} of {stated} are there, from Megatron"
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


def stated_world(content: Any) -> int | None:
    """The number of parts of the model that what DeepSpeed or Megatron saved says; None where it does not say it."""
    if not isinstance(content, Mapping):
        return None
    arguments = attributes(content.get("args"))
    sizes = [arguments.get(f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline")]
    sizes.append(content.get("mp_world_size") if "module" in content else None)
    known = [size for size in sizes if type(size) is int and size > 0]
    return prod(known) if known else None


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
    content = load(path)
    boxes = localize(path, content)
    found_at, tensors = find_state_dict(path, content, key)
    prefix = ".".join((*found_at, ""))
    return tensors, {name: boxes[prefix + name] for name in tensors if prefix + name in boxes}


def refuse_other_ranks(path: Path, content: Any) -> None:
    """Puts plain tensors in place of DTensors and ShardedTensors that one rank holds completely.

    Raises:
        PartOfModelError: a tensor has entries that other ranks hold.
    """
    if (world := stated_world(content) or 1) > 1:
        reason = f"is one of {world} parts of a model, as it says itself"
        raise PartOfModelError(path, reason, "Pass the folder that has the files of all ranks")
    for name, box in localize(path, content).items():
        if not box.is_all:
            reason = f"holds one rank's part of tensor {shorten(name)}, whose shape is {list(box.shape)}"
            raise PartOfModelError(path, reason, "Pass the folder that has the files of all ranks")


def localize(path: Path, content: Any) -> Boxes:
    """Puts plain tensors in place of the inert DTensors and ShardedTensors of a content; gives their places."""
    boxes: Boxes = {}
    seen: set[int] = set()
    stack = [(content, "")]
    while stack:
        held, prefix = stack.pop()
        if not isinstance(held, dict) or id(held) in seen:
            continue
        seen.add(id(held))
        for key, value in held.items():
            name = f"{prefix}{key}"
            if isinstance(value, Inert) and (part := local_part(path, value)):
                held[key], boxes[name] = part
            else:
                stack.append((value, f"{name}."))
    return boxes


def local_part(path: Path, value: Inert) -> tuple[torch.Tensor, Box] | None:
    """The tensor that an inert DTensor or ShardedTensor holds, and its place; None for anything else.

    Raises:
        PartOfModelError: it was cut along several dimensions, or is a sum that is still to be made.
    """
    kind = value.kind.strip("'")
    if kind.endswith(".ShardedTensor") and isinstance(value.state, tuple) and len(value.state) > 1:
        shards = [attributes(shard) for shard in value.state[0]]
        shape = tuple(attributes(value.state[1]).get("size") or ())
        if not shards:
            return torch.empty(0), Box(shape)
        tensor, offsets = shards[0].get("tensor"), attributes(shards[0].get("metadata")).get("shard_offsets")
        if len(shards) > 1 or not isinstance(tensor, torch.Tensor) or not isinstance(offsets, list):
            return None
        return tensor, Box(shape, tuple(offsets), is_all=tuple(tensor.shape) == shape)
    state = attributes(value)
    if not kind.endswith(".DTensor") or not isinstance(state.get("_local_tensor"), torch.Tensor):
        return None
    tensor = state["_local_tensor"]
    shape = value.args[1] if len(value.args) > 1 and isinstance(value.args[1], tuple) else ()
    placements = attributes(state.get("_spec")).get("placements") or ()
    cuts = [placement for placement in placements if not placement.kind.endswith(".Replicate")]
    dims = [attributes(cut).get("dim") for cut in cuts if cut.kind.endswith(".Shard")]
    if len(dims) < len(cuts) or len(dims) > 1 or not all(isinstance(dim, int) for dim in dims):
        kinds = ", ".join(placement.kind.rpartition(".")[2] for placement in placements)
        raise PartOfModelError(path, f"holds tensors cut in a way that is not joined here ({kinds})", MERGE["FSDP"])
    return tensor, Box(shape, dim=dims[0] if dims else None, is_all=tuple(tensor.shape) == shape)


def attributes(value: Any) -> dict[str, Any]:
    """The attributes of an inert object; {} where it has none."""
    state = getattr(value, "state", None)
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
            plan[name] = placed
        elif (rule := rule_of(name, rules)) is not ...:
            plan[name] = rule
        else:
            unknown.append(name)
    # Beside tensors that say how they were cut, others are whole in every rank; else all of the model must be.
    alike = unknown if any(isinstance(rule, list) for rule in plan.values()) else states[0]
    if unknown and not all(same(states, name) for name in alike):
        reason = (
            f"holds {len(states)} parts of a model, and nothing says how {shorten(unknown[0])} was cut "
            f"({len(unknown)} tensors)"
        )
        raise PartOfModelError(folder, reason, advice)
    plan |= dict.fromkeys(alike if unknown else ())
    plan = {name: settled(folder, name, rule, states, advice) for name, rule in plan.items()}
    specs = {}
    for name in states[0]:
        held = max((state[name] for state in states), key=torch.Tensor.numel)  # a rank may have nothing of it
        specs[name] = TensorSpec(name, joined_shape(folder, name, plan[name], states), TensorSpec.of(name, held).dtype)
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
        shape, held = rule[0].shape, [(box, part) for box, part in zip(rule, parts, strict=True) if part.numel()]
        starts = {box.offsets for box, _ in held if box.offsets is not None}
        there = sum(part.numel() for _, part in held)
        is_placed = all(box.dim is not None for box in rule) or len(starts) == len(held)
        if not all(box.is_all for box in rule) and (there != prod(shape) or not is_placed):
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
    if all(box.is_all for box in rule):
        return parts[0]
    if rule[0].dim is not None:
        return torch.cat(parts, rule[0].dim)
    tensor = torch.zeros(rule[0].shape, dtype=max(parts, key=torch.Tensor.numel).dtype)
    for box, part in zip(rule, parts, strict=True):
        if part.numel():
            tensor[tuple(slice(o, o + n) for o, n in zip(box.offsets, part.shape, strict=True))] = part
    return tensor
