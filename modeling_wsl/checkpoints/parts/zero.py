"""Checkpoints of DeepSpeed's ZeRO: the float32 weights lie cut over the states of the ranks' optimizers."""

import re
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...tokens.manifest import TensorSpec
from ..containers.container import Contents
from ..errors import CheckpointError, PartOfModelError, shorten
from ..state_dicts import named_tensors, split_aliases
from .layouts import universal_files


MODEL_FILE = re.compile(r"(?:\w*zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<tensor>\d+)_model_states\.pt")
OPTIMIZER_FILE = re.compile(r"\w*zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<tensor>\d+)_optim_states\.pt")
CONVERT = "Run zero_to_fp32.py, which DeepSpeed lays beside the checkpoint, and pass what it writes"
AGAIN = "Fetch or copy the whole folder"
MERGE = "Join them with the framework that wrote them (DeepSpeed's ds_to_universal, Megatron's convert.py)"
Shapes = dict[str, tuple[int, ...]]


def zero_contents(folder: Path, names: list[str], load: Callable[[Path], Any]) -> Contents:
    """Contents of a folder `global_stepN`: float32 weights as `zero_to_fp32` joins them, buffers as they are.

    Args:
        folder: with the files `names`.
        load: gives what a torch file holds, mapped where it can be.

    Raises:
        CheckpointError: a rank is missing, the sizes do not fit, or the parts are cut in another way too (tensor
            parallel, pipeline), which no rule here joins.
    """
    if pipeline := [name for name in names if name.startswith("layer_") and "-model_" in name]:
        raise PartOfModelError(folder, f"holds {len(pipeline)} parts of a pipeline of DeepSpeed", MERGE)
    models, optimizers = (_by_rank(folder, names, pattern) for pattern in (MODEL_FILE, OPTIMIZER_FILE))
    if 0 not in models:
        raise PartOfModelError(folder, "lacks the model states of rank 0", AGAIN)
    states = {rank: mapping(path, load(path)) for rank, path in models.items()}
    first = states[0]
    if (tensor_ranks := number(first.get("mp_world_size"), 1)) > 1:
        raise PartOfModelError(folder, f"holds 1 of {tensor_ranks} tensor parallel parts", MERGE)
    module = named_tensors(models[0], mapping(models[0], first.get("module")))
    if not optimizers:
        return _module_alone(folder, module)
    cut = {
        rank: mapping(path, mapping(path, load(path)).get("optimizer_state_dict")) for rank, path in optimizers.items()
    }
    stage = number(cut[0].get("zero_stage") if 0 in cut else None, 0)
    count = cut.get(0, {}).get("partition_count")
    world = max(map(number, count)) if isinstance(count, (list, tuple)) and count else number(count, len(cut))
    if missing := sorted(set(range(world)) - set(cut)):
        reason = f"lacks the optimizer state of rank {missing[0]} of {world}, which holds a part of every weight"
        raise PartOfModelError(folder, reason, AGAIN)
    if stage not in (1, 2, 3) or "param_shapes" not in first:
        raise PartOfModelError(folder, f"is of a ZeRO (stage {stage}) whose layout is not known", CONVERT)
    groups = first["param_shapes"] if isinstance(first["param_shapes"], (list, tuple)) else [first["param_shapes"]]
    shapes = [{str(n): tuple(int(d) for d in shape) for n, shape in mapping(folder, g).items()} for g in groups]
    key = "single_partition_of_fp32_groups" if stage < 3 else "fp32_flat_groups"
    flat = [[_vector(folder, part) for part in _sequence(folder, cut[rank].get(key), key)] for rank in range(world)]
    joined = Joined(folder, _places_2(folder, shapes, flat) if stage < 3 else _places_3(folder, shapes, flat))
    joined.add_frozen(states, stage)
    return _contents(joined, first, module)


def universal_contents(folder: Path, names: list[str], load: Callable[[Path], Any]) -> Contents:
    """Contents of a universal checkpoint: a file a parameter, complete; the rest is in the model states of rank 0.

    Raises:
        CheckpointError: a file holds no parameter.
    """
    pieces = {}
    for name, path in universal_files(folder).items():
        content = load(path)
        tensor = content.get("param") if isinstance(content, Mapping) else content
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(path, f"holds no parameter but a {type(content).__name__}", AGAIN)
        pieces[name] = (tuple(tensor.shape), [_vector(folder, tensor)])
    first = next(
        (folder / name for name in names if (m := MODEL_FILE.fullmatch(name)) and int(m["tensor"]) == 0), None
    )
    states = mapping(first, load(first)) if first else {}
    module = named_tensors(first, states["module"]) if isinstance(states.get("module"), Mapping) else {}
    return _contents(Joined(folder, pieces), states, module)


def _by_rank(folder: Path, names: list[str], pattern: re.Pattern) -> dict[int, Path]:
    """Files by rank of data parallelism, refused where there are ranks of tensor parallelism too."""
    matches = {name: match for name in names if (match := pattern.fullmatch(name))}
    tensor_ranks = {int(match["tensor"]) for match in matches.values()}
    if tensor_ranks - {0}:
        reason = f"holds {len(tensor_ranks)} tensor parallel parts (mp_rank_00 to mp_rank_{max(tensor_ranks):02d})"
        raise PartOfModelError(folder, reason, MERGE)
    return {int(match["rank"] or 0): folder / name for name, match in sorted(matches.items())}


def _module_alone(folder: Path, module: dict[str, torch.Tensor]) -> Contents:
    """The weights that the model's file itself has, where nothing of the optimizer is there."""
    if any(tensor.numel() == 0 for tensor in module.values()):
        raise PartOfModelError(folder, "lacks the optimizer states, which hold the weights under ZeRO-3", AGAIN)
    _, owners = split_aliases(module)
    specs = {name: TensorSpec.of(name, tensor) for name, tensor in module.items()}
    return Contents(specs, module.__getitem__, owners, nested=True)


class Joined:
    """Tensors that are cut over ranks: each by the pieces of the flat vectors that make it up.

    Attributes:
        pieces: name -> shape, and consecutive pieces of the tensor's entries.
    """

    def __init__(self, folder: Path, pieces: dict[str, tuple[tuple[int, ...], list[torch.Tensor]]]):
        self.folder = folder
        self.pieces = pieces

    def add_frozen(self, states: Mapping[int, Mapping[str, Any]], stage: int) -> None:
        """Adds the parameters that were not trained: complete in the file of rank 0, or cut over those of all."""
        for name, shape in (states[0].get("frozen_param_shapes") or {}).items():
            ranks = sorted(states) if stage == 3 else [0]
            pieces = [(states[rank].get("frozen_param_fragments") or {}).get(name) for rank in ranks]
            if any(not isinstance(piece, torch.Tensor) for piece in pieces):
                raise CheckpointError(self.folder, f"lacks a part of the frozen parameter {shorten(name)}", AGAIN)
            self.pieces[str(name)] = (tuple(int(n) for n in shape), [piece.reshape(-1) for piece in pieces])
        for name, (shape, pieces) in self.pieces.items():
            if sum(piece.numel() for piece in pieces) < prod(shape):
                raise CheckpointError(self.folder, f"holds too few entries of {shorten(name)}", AGAIN)

    def spec(self, name: str) -> TensorSpec:
        shape, pieces = self.pieces[name]
        return TensorSpec(name, shape, str(pieces[0].dtype if pieces else torch.float32).removeprefix("torch."))

    def read(self, name: str) -> torch.Tensor:
        """The tensor: a view where one rank holds all of it."""
        shape, pieces = self.pieces[name]
        flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return flat[: prod(shape)].view(shape)


Places = dict[str, tuple[tuple[int, ...], list[torch.Tensor]]]


def _places_2(folder: Path, shapes: list[Shapes], flat: list[list[torch.Tensor]]) -> Places:
    """ZeRO-1 and 2: the vector of a group of parameters is cut once, over the ranks; it ends in padding."""
    world, places = len(flat), {}
    if any(len(groups) != len(shapes) for groups in flat):
        raise PartOfModelError(
            folder, f"holds {len(flat[0])} groups of weights, its model states {len(shapes)}", AGAIN
        )
    for index, group in enumerate(shapes):
        parts = [groups[index] for groups in flat]
        start = 0
        for name, shape in group.items():
            places[name] = (shape, _slice(parts, start, start + prod(shape)))
            start += prod(shape)
        # DeepSpeed pads to a multiple of twice the number of ranks, in two places.
        there, unit = sum(part.numel() for part in parts), 2 * world
        if -(-start // unit) != -(-there // unit):
            reason = f"its ranks hold {there:,} entries of a group of weights that has {start:,}"
            raise PartOfModelError(folder, reason, AGAIN)
    return places


def _places_3(folder: Path, shapes: list[Shapes], flat: list[list[torch.Tensor]]) -> Places:
    """ZeRO-3: each parameter is cut over the ranks, and the parts of a rank lie behind each other."""
    world, places, start = len(flat), {}, 0
    for name, shape in (item for group in shapes for item in group.items()):
        share = -(-prod(shape) // world)
        places[name] = (shape, [piece for parts in flat for piece in _slice(parts, start, start + share)])
        start += share
    there = sum(part.numel() for parts in flat for part in parts)
    if start * world != there:
        reason = f"its ranks hold {there:,} entries, its parameters need {start * world:,} with their padding"
        raise PartOfModelError(folder, reason, AGAIN)
    return places


def _slice(parts: list[torch.Tensor], start: int, end: int) -> list[torch.Tensor]:
    """The entries from `start` to `end` of vectors that follow each other."""
    pieces, at = [], 0
    for part in parts:
        first, last = max(start - at, 0), min(end - at, part.numel())
        if first < last:
            pieces.append(part[first:last])
        at += part.numel()
    return pieces or [parts[0][:0]] if parts else []


def _contents(joined: Joined, first: Mapping[str, Any], module: dict[str, torch.Tensor]) -> Contents:
    """Joined weights, tied names, and what only the module has: in the module's order, as far as it has the names."""
    shared = {str(a): str(b) for a, b in (first.get("shared_params") or {}).items() if str(b) in joined.pieces}
    shared = {alias: name for alias, name in shared.items() if alias not in joined.pieces}
    kept = {name: tensor for name, tensor in module.items() if tensor.numel()}
    for alias, name in split_aliases(kept)[1].items():  # tied in the 16-bit module, by which older versions tell
        for one, other in ((alias, name), (name, alias)):
            if one not in joined.pieces and other in joined.pieces:
                shared[one] = other
    buffers = set(map(str, first.get("buffer_names") or ()))
    extra = {name: tensor for name, tensor in module.items() if name not in joined.pieces and name not in shared}
    empty = [name for name, tensor in extra.items() if not tensor.numel() and name not in buffers]
    if empty:
        raise CheckpointError(joined.folder, f"nowhere holds the entries of {shorten(empty[0])}", CONVERT)
    # Buffers come in float32, as zero_to_fp32 gives them; counters stay integers.
    extra = {n: t.float() if n in buffers and t.is_floating_point() else t for n, t in extra.items()}
    order = [*module, *(name for name in (*joined.pieces, *shared) if name not in module)]
    specs = {}
    for name in order:
        if name in extra:
            specs[name] = TensorSpec.of(name, extra[name])
        else:
            spec = joined.spec(shared.get(name, name))
            specs[name] = TensorSpec(name, spec.shape, spec.dtype)
    return Contents(
        specs,
        lambda name: extra[name] if name in extra else joined.read(name),
        shared,
        nested=True,
        ignored=["the state of the optimizer, and the 16-bit copy of the weights"],
    )


def mapping(source: object, value: Any) -> Mapping[str, Any]:
    """A mapping out of a checkpoint.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(value, Mapping):
        reason = f"holds a {type(value).__name__} where DeepSpeed has a mapping"
        raise CheckpointError(source, reason, CONVERT)
    return value


def _sequence(source: object, value: Any, name: str) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise CheckpointError(source, f"has no {name}, which holds the weights", CONVERT)
    return list(value)


def _vector(source: object, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(source, f"holds a {type(value).__name__} where a part of the weights is", CONVERT)
    return value.detach().reshape(-1)


def number(value: Any, default: int = 0) -> int:
    """An integer out of a checkpoint; an inert member of an enumeration gives its value."""
    arguments = getattr(value, "args", ())
    if isinstance(arguments, tuple) and arguments:
        value = arguments[0]
    return value if isinstance(value, int) else default
