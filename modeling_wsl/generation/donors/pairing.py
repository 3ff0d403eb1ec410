"""Which tensor of a donor each tensor of the target comes from: by name, kind and relative depth.

Names are read as trees. Children without a number, and numbered ones that both networks have alike, pair by their
names. Where the numbers differ, alike children (blocks of one stage, stages, convolutions of a plain stack) pair by
relative depth.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...tokens.manifest import TensorSpec


ALIKE = 0.5  # of two numbered children: the share of tensors that they have in common


@dataclass(frozen=True)
class Pairing:
    """Attributes:
    tensors: target tensor -> donor tensor.
    extra: target tensors of blocks that repeat the donor's block before them.
    blocks: prefix of a target's block -> prefix of the donor's block.
    ends: prefix of a target's block -> the last of the donor's blocks that it stands for.
    unpaired, unused: tensors of the target, and of the donor, without a partner.
    first: blocks pair with the donor's first ones, and none is silent.
    """

    tensors: dict[str, str] = field(default_factory=dict)
    extra: set[str] = field(default_factory=set)
    blocks: dict[str, str] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)
    unpaired: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    first: bool = False

    def block_of(self, name: str) -> str | None:
        """The innermost block that a target's tensor lies in, its own module aside."""
        module = name.rsplit(".", 1)[0] + "."
        around = [prefix for prefix in self.blocks if name.startswith(prefix) and prefix != module]
        return max(around, key=len, default=None)


class _Node:
    """A part of a name, in the order of the state dict: `children` by the next part, `name` where a tensor ends."""

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.name: str | None = None
        self.shape: tuple[int, ...] = ()

    def shapes(self) -> Iterable[tuple[int, ...]]:
        if self.name is not None:
            yield self.shape
        for child in self.children.values():
            yield from child.shapes()

    def kind(self, prefix: str = "") -> frozenset[str]:
        """What lies below, whatever the number of blocks: relative names with the number of axes."""
        own = set() if self.name is None else {f"{prefix}/{len(self.shape)}"}
        for part, child in self.children.items():
            own |= child.kind(f"{prefix}.{'#' if part.isdigit() else part}")
        return frozenset(own)


def pair_tensors(target: Mapping[str, TensorSpec], donor: Mapping[str, TensorSpec], first: bool = False) -> Pairing:
    """Pairs the tensors of two networks.

    Args:
        target, donor: the stored tensors, in state-dict order.
        first: blocks pair with the donor's first ones (weight selection), not by relative depth.
    """
    pairing = Pairing(first=first)
    _pair(_tree(target), _tree(donor), "", "", pairing, extra=False)
    pairing.unpaired.extend(name for name in target if name not in pairing.tensors)
    used = set(pairing.tensors.values())
    pairing.unused.extend(name for name in donor if name not in used)
    return pairing


def _tree(specs: Mapping[str, TensorSpec]) -> _Node:
    root = _Node()
    for name, spec in specs.items():
        node = root
        for part in name.split("."):
            node = node.children.setdefault(part, _Node())
        node.name, node.shape = name, tuple(spec.shape)
    return root


def _pair(target: _Node, donor: _Node, at: str, of: str, pairing: Pairing, extra: bool) -> None:
    if target.name is not None and donor.name is not None:
        if len(target.shape) == len(donor.shape):
            pairing.tensors[target.name] = donor.name
            if extra:
                pairing.extra.add(target.name)
        return
    families: dict[str, list[str]] = {}
    for part in target.children:
        families.setdefault(_family(part), []).append(part)
    for family, parts in families.items():
        theirs = [part for part in donor.children if _family(part) == family]
        for part, partner, repeated, end in _partners(target, donor, parts, theirs, pairing.first):
            here, there = f"{at}{part}.", f"{of}{partner}."
            if len(theirs) != len(parts) or len(parts) > 1:
                pairing.blocks[here], pairing.ends[here] = there, f"{of}{end}."
            child, other = target.children[part], donor.children[partner]
            _pair(child, other, here, there, pairing, extra or (repeated and not pairing.first))


def _family(part: str) -> str:
    """`layer#` of layer3, `#` of 12; a name without a number is its own family."""
    return re.sub(r"\d+$", "#", part)


def _partners(
    target: _Node, donor: _Node, parts: Sequence[str], theirs: Sequence[str], first: bool
) -> Iterable[tuple[str, str, bool, str]]:
    """(child, the donor's child, it repeats the one before, the donor's last child that it stands for)."""
    alike = set(parts) == set(theirs) and all(
        _similar(target.children[part].kind(), donor.children[part].kind()) for part in parts
    )
    if alike or not parts[0][-1:].isdigit():
        yield from ((part, part, False, part) for part in parts if part in theirs)
        return
    stages, their_stages = _stages(target, parts), _stages(donor, theirs)
    if len(stages) != len(their_stages):
        stages, their_stages = [list(parts)], [list(theirs)]
    kinds = {part: target.children[part].kind() for part in parts}
    others = {part: donor.children[part].kind() for part in theirs}
    for stage, their_stage in zip(stages, their_stages, strict=True):
        for mine in _alike(stage, kinds):
            ends = [kinds[mine[0]], kinds[mine[-1]]]
            matching = [part for part in their_stage if any(_similar(others[part], end) for end in ends)]
            for place, partner, repeated, end in spread(len(mine), len(matching), first) if matching else ():
                yield mine[place], matching[partner], repeated, matching[end]


def _stages(node: _Node, parts: Sequence[str]) -> list[list[str]]:
    """Consecutive children of one output width: the stages of a list that runs through the whole network."""
    stages: list[list[str]] = []
    before: int | None = None
    for part in parts:
        shapes = list(node.children[part].shapes())
        widths = [shape[0] for shape in shapes if len(shape) > 1] or [shape[0] for shape in shapes if shape] or [0]
        if not stages or widths[-1] != before:
            stages.append([])
        stages[-1].append(part)
        before = widths[-1]
    return stages


def _alike(parts: Sequence[str], kinds: Mapping[str, frozenset[str]]) -> list[list[str]]:
    groups: list[list[str]] = []
    for part in parts:
        group = next((one for one in groups if any(_similar(kinds[part], kinds[other]) for other in one)), None)
        if group is None:
            groups.append([part])
        else:
            group.append(part)
    return groups


def _similar(first: frozenset[str], second: frozenset[str]) -> bool:
    return len(first & second) >= ALIKE * len(first | second)


def spread(count: int, donors: int, first: bool = False) -> Iterable[tuple[int, int, bool, int]]:
    """(block, donor's block, it repeats the one before, last donor's block that it stands for) by relative depth.

    With fewer blocks than the donor the first and the last are kept; with more, each is repeated in its place.
    """
    before = -1
    for block in range(count):
        if first:
            partner = end = min(block, donors - 1)
        elif count <= donors:
            partner = round(block * (donors - 1) / max(count - 1, 1))
            end = -(-(block + 1) * donors // count) - 1
        else:
            partner = block * donors // count
            end = (block + 1) * donors // count - 1
        yield block, partner, partner == before, max(end, 0)
        before = partner
