"""Experts of a mixture as one matrix each, whether they are stored so or stacked, and whichever way round."""

import re
from collections.abc import Mapping
from functools import partial

import torch

from ...tokens.manifest import TensorSpec
from .part import Held, Part


_EXPERTS = r"^((?:.*\.)?(?:\w*experts|switch_mlp))\."
STACKED = re.compile(_EXPERTS + r"([A-Za-z_]\w*?)(?:[._](weight|bias))?$")
SPLIT = re.compile(_EXPERTS + r"(\d+)\.(.+?)(?:\.(weight|bias))?$")
# Mixtral's names, and those of everyone else.
PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
FUSED = "gate_up_proj"


def split_experts(parts: Mapping[str, Part], held: Held) -> dict[str, Part]:
    """Parts with every expert's matrices on their own, `EXPERTS.INDEX.PROJECTION.weight`, the longer side first.

    A file does not say whether a stack is `[experts, out, in]` or `[experts, in, out]`: with the longer side first
    both are one, and of a square matrix the upper triangle is the larger half. A stack of gates and up projections
    is taken apart where the stack of down projections beside it says along which side they lie; with biases, as
    gpt-oss has them, the two alternate, else the gate is the first half (transformers).
    """
    stacks = {name: match for name, part in parts.items() if (match := _stack(name, part))}
    experts: dict[str, Part] = {}
    for name, part in parts.items():
        if name in stacks:
            for piece in _unstacked(stacks[name], part, parts, held):
                experts[piece.spec.name] = piece
        elif match := SPLIT.match(name):
            prefix, index, projection, leaf = match.groups()
            piece = part.renamed(_name(prefix, index, projection, leaf or "weight"))
            experts[piece.spec.name] = _longer_side_first(piece)
        else:
            experts[name] = part
    return experts


def order_key(name: str) -> str:
    """The name with the index of an expert behind its projection: a stack is then read once, not once an expert."""
    return SPLIT.sub(r"\1.\3.\4.\2", name)


def module_of(name: str) -> str | None:
    """The module of all experts that a tensor belongs to."""
    match = SPLIT.match(name)
    return match[1] if match else None


def _name(prefix: str, index: int | str, projection: str, leaf: str) -> str:
    return f"{prefix}.{index}.{PROJECTIONS.get(projection, projection)}.{leaf}"


def _stack(name: str, part: Part) -> re.Match[str] | None:
    match = STACKED.match(name)
    dimensions = 2 if match and match[3] == "bias" else 3
    return match if match and len(part.spec.shape) == dimensions and part.spec.torch_dtype.is_floating_point else None


def _unstacked(match: re.Match[str], part: Part, parts: Mapping[str, Part], held: Held) -> list[Part]:
    prefix, projection, leaf = match[1], match[2], match[3] or "weight"
    count, *shape = part.spec.shape
    stack = partial(held.get, ("stack", part.spec.name), part.read)
    side = _fused_side(match, part, parts) if projection == FUSED else None
    pieces = []
    for index in range(count):
        if side is None:
            name = _name(prefix, index, projection, leaf)
            pieces.append(
                Part(TensorSpec(name, tuple(shape), part.spec.dtype), partial(_expert, stack, index), part.place)
            )
            continue
        half = list(shape)
        half[side] //= 2
        alternate = any(f"{prefix}.{FUSED}{end}" in parts for end in ("_bias", ".bias"))
        for at, own in enumerate(("gate_proj", "up_proj")):
            where = slice(at, None, 2) if alternate else slice(at * half[side], (at + 1) * half[side])
            spec = TensorSpec(_name(prefix, index, own, leaf), tuple(half), part.spec.dtype)
            pieces.append(Part(spec, partial(_expert, stack, index, (*[slice(None)] * side, where)), part.place))
    return [_longer_side_first(piece) for piece in pieces]


def _expert(stack, index: int, where: tuple[slice, ...] = ()) -> torch.Tensor:
    return stack()[index][where] if where else stack()[index]


def _fused_side(match: re.Match[str], part: Part, parts: Mapping[str, Part]) -> int | None:
    """The dimension of one expert's tensor along which gate and up projections lie; None where nothing tells."""
    if match[3] == "bias":
        return 0
    down = next((parts[n] for e in ("", ".weight") if (n := f"{match[1]}.down_proj{e}") in parts), None)
    if down is None or len(down.spec.shape) != 3:
        return None
    sides = set(down.spec.shape[1:])
    own = part.spec.shape[1:]
    for side in (0, 1):
        if own[side] % 2 == 0 and {own[side] // 2, own[1 - side]} == sides:
            return side
    return None


def _longer_side_first(part: Part) -> Part:
    if len(part.spec.shape) != 2:
        return part
    rows, columns = part.spec.shape
    spec = TensorSpec(part.spec.name, (max(rows, columns), min(rows, columns)), part.spec.dtype)
    return Part(spec, partial(_turned, part.read), part.place)


def _turned(read) -> torch.Tensor:
    matrix = read()
    rows, columns = matrix.shape
    if rows == columns:
        turn = bool(matrix.double().triu(1).sum() < matrix.double().tril(-1).sum())
    else:
        turn = rows < columns
    return matrix.T.contiguous() if turn else matrix  # sums over other strides round otherwise
